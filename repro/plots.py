"""Figures in the colours of Okabe and Ito, with markers and hatches so that they read in grey too.

Every function draws the numbers it is handed into a matplotlib `Axes`.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

COLOURS = (
    "#0072B2",  # blue
    "#E69F00",  # orange
    "#009E73",  # green
    "#D55E00",  # vermilion
    "#56B4E9",  # sky blue
)
HATCHES = ("", "///", "...", "\\\\\\", "xx")
MARKERS = "os^Dv"
LINES = ("-", "-.", ":", "--", "-")
# A loss looks the same everywhere, and so do the two distributions.
PLACES = {
    "InfoNCE": 0,
    "KL": 1,
    "1-D W": 2,
    "Gaussian W2": 3,
    "P, the model": 0,
    "T, the grades": 3,
}


def panels(count: int, width: float = 9.0, height: float = 3.3) -> tuple:
    """A figure with `count` panels side by side, sizes in inches."""
    figure = plt.figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def label(axis: Axes, title: str, x: str, y: str, legend: bool = True) -> None:
    """Title, axis labels (with their unit) and a legend."""
    axis.set(title=title, xlabel=x, ylabel=y)
    axis.spines[["top", "right"]].set_visible(False)
    if legend:
        axis.legend()


def bars(axis: Axes, series: dict, groups: list, stacked: bool = False) -> None:
    """Bars side by side, or on top of each other: {name: one value a group}."""
    looks = [PLACES.get(name, n) for n, name in enumerate(series)]
    colours = [COLOURS[look] for look in looks]
    frame = pd.DataFrame(series, groups)
    frame.plot.bar(
        ax=axis, stacked=stacked, color=colours, width=0.8, rot=0, edgecolor="black", legend=False
    )
    for look, patches in zip(looks, axis.containers, strict=True):
        plt.setp(patches, hatch=HATCHES[look])
    axis.axhline(0, color="black", linewidth=0.8)


def cumulative(axis: Axes, heaps: dict, places: list) -> None:
    """Two heaps of mass added up from the left end of a line, the area between them shaded.

    {name: the mass of each passage}; the passages lie at `places`.
    """
    heights = []
    for name, mass in heaps.items():
        look = PLACES[name]
        curve = axis.ecdf(
            places, mass, label=name, color=COLOURS[look], linestyle=LINES[look], linewidth=2.5
        )
        x, y = curve.get_data()
        heights.append(y)
    axis.fill_between(x, *heights, step="post", color="0.82")


def lines(axis: Axes, curves: dict, span: tuple = (0, 1)) -> None:
    """Lines {name: {x: values}}: a mark at the median, a bar between two quantiles.

    By default the bar reaches from the least value to the largest.
    """
    for n, (name, points) in enumerate(curves.items()):
        look = PLACES.get(name, n)
        rows = [np.quantile(values, (0.5, *span)) for values in points.values()]
        y, low, high = np.transpose(rows)
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


def forest(axis: Axes, series: dict) -> None:
    """{series: {row: (difference, low, high)}}: marks with intervals, the first row on top."""
    for n, (name, rows) in enumerate(series.items()):
        middle, low, high = np.transpose(list(rows.values()))
        y = np.arange(len(rows)) + n / 5
        axis.errorbar(
            middle,
            y,
            xerr=(middle - low, high - middle),
            label=name,
            color=COLOURS[3 * n],
            fmt=MARKERS[3 * n],
            capsize=3,
        )
        axis.set_yticks(y - n / 5, list(rows))
    axis.margins(y=0.2)
    axis.invert_yaxis()
    axis.axvline(0, color="black", linewidth=0.8)
