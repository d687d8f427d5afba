"""Figures in the colours of Okabe and Ito, with markers and hatches so that they read in grey too.

Every function draws the numbers it is handed into a matplotlib `Axes`.  `python -m repro.plots
FOLDER` writes the drawing of the method, method.png.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from repro.support.files import run_command

COLOURS = (
    "#0072B2",  # blue
    "#E69F00",  # orange
    "#009E73",  # green
    "#D55E00",  # vermilion
    "#56B4E9",  # sky blue
    "#CC79A7",  # purple
)
HATCHES = ("", "///", "...", "\\\\\\", "xx", "--")
MARKERS = "os^DvP"
LINES = ("-", "-.", ":", "--", "-", "-.")
PLACES = {"InfoNCE": 0, "KL": 1, "1-D W": 2, "Gaussian W2": 3}  # a loss looks the same everywhere
HEAPS = (("P, the model", 0), ("T, the grades", 3))  # and so do these two

Values = Sequence[float]
Interval = tuple[float, float, float]  # difference, low, high

PASSAGES = "grade 3: the answer\ngrade 2: some of it\ngrade 1: on the topic\ngrade 0: no use"
BOXES = (  # of the method: x, y, text, colour
    (0.5, 2.5, "query", "#CFE3F2"),
    (2.1, 1.4, "writer:\na language\nmodel", "#FBE6BF"),
    (4.6, 1.4, PASSAGES, "#CFE3F2"),
    (7.2, 2.3, "encoder:\nscores", "#FBE6BF"),
    (7.2, 0.6, "grades\n3, 2, 1, 0", "#C4E8DC"),
    (9.3, 2.3, "P, the model\n▅ ▂ ▃ ▇", "white"),
    (9.3, 0.6, "T, the grades\n█ ▄ ▂ ▁", "white"),
    (11.5, 1.4, "loss:\nhow far\nfrom P to T", "#C4E8DC"),
)
ARROWS = ((0, 1), (0, 3), (1, 2), (2, 3), (2, 4), (3, 5), (4, 6), (5, 7), (6, 7))


def panels(count: int, width: float = 9.0, height: float = 3.3) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels side by side, sizes in inches."""
    figure = plt.figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def label(axis: Axes, title: str, x: str, y: str, legend: bool = True) -> None:
    """Title, axis labels (with their unit) and a legend."""
    axis.set(title=title, xlabel=x, ylabel=y)
    axis.spines[["top", "right"]].set_visible(False)
    if legend:
        axis.legend()


def method(axis: Axes) -> None:
    """Query -> writer -> passages -> encoder -> P; grades -> T; the loss between P and T."""
    axis.set(xlim=(0, 12.3), ylim=(0, 3))
    axis.axis("off")
    patches = []
    for x, y, text, colour in BOXES:
        box = {"boxstyle": "round,pad=0.4", "facecolor": colour}
        text = axis.text(x, y, text, ha="center", va="center", bbox=box)
        patches.append(text.get_bbox_patch())
    for tail, head in ARROWS:
        arrow = {"arrowstyle": "->", "patchA": patches[tail], "patchB": patches[head]}
        axis.annotate("", BOXES[head][:2], BOXES[tail][:2], arrowprops=arrow)


def bars(
    axis: Axes, series: Mapping[str, Values], groups: Sequence[str], stacked: bool = False
) -> None:
    """Bars side by side, or on top of each other: {name: one value a group}."""
    x = np.arange(len(groups))
    below = np.zeros(len(groups))
    width = 0.8 / len(series)
    for n, (name, values) in enumerate(series.items()):
        look = PLACES.get(name, n)
        style = {"color": COLOURS[look], "hatch": HATCHES[look], "edgecolor": "black"}
        if stacked:
            axis.bar(x, values, 0.7, below, label=name, **style)
            below = below + values
        else:
            place = x + (n + 0.5) * width - 0.4
            axis.bar(place, values, width, label=name, **style)
    axis.set_xticks(x, groups)
    axis.axhline(0, color="black", linewidth=0.8)


def stems(axis: Axes, p: Values, t: Values, places: Values) -> None:
    """P and T as heaps of mass, each passage at its place on the line."""
    for (name, n), mass in zip(HEAPS, (p, t), strict=True):
        x = np.array(places) + (n - 1.5) / 40
        axis.vlines(x, 0, mass, color=COLOURS[n], linestyle=LINES[n], linewidth=2.5)
        axis.plot(x, mass, MARKERS[n], color=COLOURS[n], label=name)


def cumulative(axis: Axes, p: Values, t: Values, places: Values) -> None:
    """P and T added up from the left end of the line, the area between them shaded."""
    order = np.argsort(places)
    x = np.array(places)[order]
    ends = [x[0] - 0.4, *x, x[-1] + 0.4]
    curves = [np.array(mass)[order].cumsum() for mass in (p, t)]
    axis.fill_between(x, *curves, step="post", color="0.82")
    for (name, n), curve in zip(HEAPS, curves, strict=True):
        axis.step(
            ends,
            [0, *curve, 1],
            where="post",
            label=name,
            color=COLOURS[n],
            linestyle=LINES[n],
            linewidth=2.5,
        )


def lines(
    axis: Axes,
    curves: Mapping[str, Mapping[float, Values]],
    span: tuple[float, float] = (0, 1),
) -> None:
    """Lines {name: {x: values}}: a mark at the median, a bar between two quantiles.

    By default the bar reaches from the least value to the largest.
    """
    for n, (name, points) in enumerate(curves.items()):
        look = PLACES.get(name, n)
        rows = [np.quantile(values, (0.5, *span)) for values in points.values()]
        y, low, high = np.array(rows).T
        axis.errorbar(
            list(points),
            y,
            (y - low, high - y),
            label=name,
            color=COLOURS[look],
            marker=MARKERS[look],
            linestyle=LINES[look],
            capsize=3,
        )


def forest(axis: Axes, rows: Mapping[str, Mapping[str, Interval]]) -> None:
    """{row: {series: (difference, low, high)}}: a mark with its interval, the first row on top."""
    for n, name in enumerate(max(rows.values(), key=len)):
        found = {y + n / 5: row[name] for y, row in enumerate(rows.values()) if name in row}
        middle, low, high = np.array(list(found.values())).T
        axis.errorbar(
            middle,
            list(found),
            xerr=(middle - low, high - middle),
            label=name,
            color=COLOURS[3 * n],
            fmt=MARKERS[3 * n],
            capsize=3,
        )
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.axvline(0, color="black", linewidth=0.8)


def main(argv: list[str] | None = None) -> int:
    """The command line: draw method.png into a folder."""
    parser = argparse.ArgumentParser("python -m repro.plots", description=__doc__)
    parser.add_argument("folder", help="gets method.png; it must exist")
    folder = parser.parse_args(argv).folder

    def work() -> None:
        figure, (axis,) = panels(1, height=2.6)
        method(axis)
        figure.savefig(f"{folder}/method.png", dpi=150)

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
