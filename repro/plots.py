"""The kit's figures: colours of Okabe and Ito, with markers and hatches so that they read in grey too.

Each function draws numbers that it is handed into a matplotlib `Axes`; none computes a result.
`python -m repro.plots FILE.png` writes the picture that opens README and section 5 of the notebook.
"""

import sys
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from repro.checkpoints import checked_output, ending

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000", "#F0E442")
HATCHES = ("", "///", "...", "\\\\\\", "xx", "--", "++", "oo")
MARKERS, LINES = ("o", "s", "^", "D", "v", "P", "X", "*"), ("-", "--", "-.", ":")
PLACES = {"InfoNCE": 0, "KL": 1, "1-D W": 2, "Gaussian W2": 3}  # a loss looks the same in all figures

def panels(count: int, width: float = 9.0, height: float = 3.3) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels side by side, sizes in inches."""
    figure, axes = plt.subplots(1, count, figsize=(width, height), layout="constrained", squeeze=False)
    return figure, list(axes[0])

def label(axis: Axes, title: str, x: str, y: str, legend: bool = True) -> None:
    """Title, axis labels (with their unit) and a legend."""
    axis.set(title=title, xlabel=x, ylabel=y)
    axis.spines[["top", "right"]].set_visible(False)
    if legend:
        axis.legend(frameon=False, fontsize="small")

def bars(axis: Axes, series: Mapping[str, Sequence[float]], groups: Sequence[str], stacked=False) -> None:
    """Bars side by side, or stacked: {name: one value a group}."""
    below, width = np.zeros(len(groups)), 0.7 if stacked else 0.8 / len(series)
    for n, (name, values) in enumerate(series.items()):
        x = np.arange(len(groups)) + (0 if stacked else (n - (len(series) - 1) / 2) * width)
        style = {"color": COLOURS[PLACES.get(name, n)], "hatch": HATCHES[PLACES.get(name, n)]}
        axis.bar(x, values, width, below if stacked else 0, label=name, edgecolor="k", linewidth=0.6, **style)
        below = below + values
    axis.set_xticks(range(len(groups)), groups)
    axis.axhline(0, color="black", linewidth=0.8)

def masses(axes: Sequence[Axes], p: Sequence[float], t: Sequence[float], grades: Sequence[float]) -> None:
    """P and T as stems on the line of grades; their cumulative curves, the area between them shaded."""
    order = np.argsort(grades)
    x, curves = np.array(grades, float)[order], []
    for n, name, values in ((0, "P, the model", p), (3, "T, the grades", t)):
        mass, shift = np.array(values)[order], (n - 1.5) / 40
        style = {"color": COLOURS[n], "linestyle": LINES[n // 3], "linewidth": 2.5}
        axes[0].vlines(x + shift, 0, mass, **style)
        axes[0].plot(x + shift, mass, MARKERS[n], color=COLOURS[n], markersize=8, label=name)
        curves.append(mass.cumsum())
        ends = np.array([x[0] - 0.4, *x, x[-1] + 0.4]), np.array([0, *curves[-1], 1])
        axes[1].step(*ends, where="post", label=name, **style)
    axes[1].fill_between(x, *curves, step="post", color="0.82")
    strips = np.diff(x) * np.abs(curves[0] - curves[1])[:-1]
    for middle, height, strip in zip((x[1:] + x[:-1]) / 2, (curves[0] + curves[1]) / 2, strips, strict=False):
        axes[1].text(middle, height, f"{strip:.2f}", ha="center", va="center")
    label(axes[0], "Mass on each grade", "grade of the passage", "probability (0 to 1)")
    title = f"Shaded area = 1-D W = {strips.sum():.2f} grades"
    label(axes[1], title, "grade of the passage", "mass up to this grade (0 to 1)")
    plt.setp(axes, xticks=x, ylim=(0, 1.05))

def lines(axis: Axes, curves: Mapping[str, Mapping[float, Sequence[float]]], shift: float = 0.0) -> None:
    """Lines {name: {x: values}} of means, with bars of one standard deviation, each `shift` further right."""
    for n, (name, points) in enumerate(curves.items()):
        values, look, x = list(points.values()), PLACES.get(name, n), np.array(list(points)) + n * shift
        bars = [np.std(v, ddof=1) if len(v) > 1 else np.nan for v in values]
        style = {"color": COLOURS[look], "marker": MARKERS[look], "linestyle": LINES[look % 4], "capsize": 3}
        axis.errorbar(x, [np.mean(v) for v in values], bars, label=name, markersize=5, elinewidth=1, **style)

def forest(axis: Axes, rows: Mapping[str, Mapping[str, tuple[float, float, float]]]) -> None:
    """Differences with intervals, {row: {series: (difference, low, high)}}, the first row on top."""
    for n, name in enumerate(names := list(dict.fromkeys(name for row in rows.values() for name in row))):
        found = {place: row[name] for place, row in enumerate(rows.values()) if name in row}
        y = [place + (n - (len(names) - 1) / 2) * 0.25 for place in found]
        middle, low, high = np.array(list(found.values())).T
        style = {"color": COLOURS[3 * n], "marker": MARKERS[3 * n], "linestyle": "", "capsize": 3}
        axis.errorbar(middle, y, xerr=[middle - low, high - middle], label=name, **style)
    axis.set(yticks=range(len(rows)), yticklabels=list(rows), ylim=(len(rows) - 0.5, -0.5))
    axis.axvline(0, color="black", linewidth=0.8)

def main(path: str) -> None:
    """Write README's picture.  ValueError if another file than a PNG is there."""
    figure, axes = panels(2)
    masses(axes, [0.40, 0.25, 0.15, 0.20], [0.03, 0.09, 0.24, 0.64], range(4))
    figure.savefig(checked_output(path, lambda line: "PNG" in line), dpi=130, metadata={"Software": None})

if __name__ == "__main__":
    sys.exit(ending(lambda: main("".join(sys.argv[1:2]))))
