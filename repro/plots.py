"""The kit's figures: plain matplotlib, readable in grey, every axis with its unit.

Each function draws one figure from numbers that it is handed and returns it; none computes results.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

GREYS = ("0.15", "0.45", "0.65", "0.85")  # far enough apart to tell in print
HATCHES = ("", "//", "..", "xx", "\\\\", "--", "++", "oo")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
LINES = ("-", "--", ":", "-.")


def target_figure(targets: Mapping[str, Sequence[float]], grades: Sequence[int]) -> Figure:
    """Bars of the target mass that one query's own passages get, for several settings (name -> masses)."""
    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    width = 0.8 / len(targets)
    for place, (name, masses) in enumerate(targets.items()):
        left = np.arange(len(grades)) + (place - (len(targets) - 1) / 2) * width
        axis.bar(left, masses, width, label=name, color=GREYS[place % 4], hatch=HATCHES[place % 8], edgecolor="black")
    axis.set_xticks(range(len(grades)), [f"grade {grade}" for grade in grades])
    axis.set_ylabel("target probability T (0 to 1)")
    axis.set_xlabel("the query's own passages")
    axis.set_title("What the grades ask for: T = softmax(grades / label temperature)")
    axis.legend(frameon=False)
    return figure


def loss_figure(logs: Mapping[str, Sequence[float]], window: int = 5) -> Figure:
    """Training curves as share of their start, a running mean over `window` steps (losses have different units)."""
    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for place, (name, losses) in enumerate(logs.items()):
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid") if len(losses) >= window else np.array(losses)
        steps = np.arange(len(smooth)) + (len(losses) - len(smooth)) / 2 + 1
        axis.plot(steps, smooth / smooth[0], LINES[place % 4], color=GREYS[place % 3], label=name, linewidth=2)
    axis.set_xlabel("training step (one batch of lists)")
    axis.set_ylabel("loss / first value (no unit)")
    axis.set_title(f"Training loss, mean of {window} steps")
    axis.legend(frameon=False)
    return figure


def arms_figure(
    per_query: Mapping[str, Mapping[str, float]], collection: str, measure: str = "nDCG@10", reference: str | None = None
) -> Figure:
    """One bar an arm: mean over queries, with the 95 % interval of that mean over queries (normal, 1.96 s.e.).

    `per_query` is {arm: {query id: value}}; a dotted line carries the `reference` arm's mean across.
    """
    figure, axis = plt.subplots(figsize=(7, 0.45 * len(per_query) + 1.4), layout="constrained")
    names = list(per_query)[::-1]
    for place, name in enumerate(names):
        values = np.array(list(per_query[name].values()))
        error = 1.96 * values.std(ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
        axis.barh(place, values.mean(), xerr=error, color=GREYS[2], edgecolor="black", hatch=HATCHES[place % 8], capsize=3)
        axis.text(0.01, place, f"{values.mean():.3f}", va="center", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
    if reference:
        mean = np.mean(list(per_query[reference].values()))
        axis.axvline(mean, color="black", linestyle=":", label=f"mean of {reference}")
        axis.legend(frameon=False, loc="lower right")
    axis.set_yticks(range(len(names)), names)
    axis.set_xlim(0, 1)
    axis.set_xlabel(f"{measure} (0 to 1), mean over {len(next(iter(per_query.values())))} queries, bars: 95 % interval of the mean")
    axis.set_title(f"{measure} on {collection}")
    return figure


def effects_figure(effects: Mapping[str, Mapping[str, tuple[float, float, float]]], measure: str = "nDCG@10") -> Figure:
    """Differences with their intervals: one row a comparison, one mark a collection; {comparison: {collection: (mean, low, high)}}."""
    collections = list(dict.fromkeys(name for row in effects.values() for name in row))
    figure, axis = plt.subplots(figsize=(8, 0.62 * len(effects) + 1.3), layout="constrained")
    for place, (_, row) in enumerate(reversed(effects.items())):
        for name, (mean, low, high) in row.items():
            which = collections.index(name)
            height = place + 0.62 * (0.5 - (which + 0.5) / len(collections))
            label = name if name not in axis.get_legend_handles_labels()[1] else None
            marks = {"marker": MARKERS[which % len(MARKERS)], "markersize": 5, "color": GREYS[which % 3], "capsize": 2}
            axis.errorbar([mean], [height], xerr=[[mean - low], [high - mean]], linestyle="", label=label, **marks)
        axis.axhline(place - 0.5, color="0.85", linewidth=0.6)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set_yticks(range(len(effects)), list(effects)[::-1], fontsize=8)
    axis.set_ylim(-0.5, len(effects) - 0.5)
    axis.set_xlabel(f"difference in {measure} (-1 to 1); bars: 95 % interval")
    axis.set_title("What each comparison found, by collection")
    axis.legend(frameon=False, fontsize=8, loc="best")
    return figure


def lines_figure(
    curves: Mapping[str, Mapping[str, Mapping[float, float]]], x_label: str, title: str, measure: str = "nDCG@10",
    reference: Mapping[str, float] | None = None,
) -> Figure:
    """One panel a collection, one line an arm: {arm: {collection: {x: mean}}}; dotted: `reference`, {collection: mean}."""
    collections = list(dict.fromkeys(name for row in curves.values() for name in row))
    figure, axes = plt.subplots(1, len(collections), figsize=(3.1 * len(collections), 3.2), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], collections, strict=True):
        for place, (arm, row) in enumerate(curves.items()):
            points = sorted(row.get(name, {}).items())
            style = {"linestyle": LINES[place % 4], "marker": MARKERS[place % len(MARKERS)], "color": GREYS[place % 3]}
            axis.plot([x for x, _ in points], [y for _, y in points], label=arm, markersize=4, **style)
        if reference and name in reference:
            axis.axhline(reference[name], color="black", linestyle=":", linewidth=1, label="start")
        axis.set_xscale("log")
        ticks = sorted({x for row in curves.values() for x in row.get(name, {})})
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axis.minorticks_off()
        axis.set_xlabel(x_label)
        axis.set_title(name, fontsize=10)
    axes[0][0].set_ylabel(f"{measure} (0 to 1)")
    figure.suptitle(title)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(5, len(labels)), frameon=False)
    return figure


def levels_figure(reports: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str]) -> Figure:
    """What the passages of each grade are like: one panel a measure, one line a source (`repro.quality`'s reports)."""
    reports = {source: content for source, content in reports.items() if content["lists"]}
    names = list(dict.fromkeys(name for content in reports.values() for name in content["measures"]))
    figure, axes = plt.subplots(1, len(names), figsize=(3.4 * len(names), 3.6), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        grades = set()
        for place, (source, content) in enumerate(reports.items()):
            levels = {int(grade): value for grade, value in content["measures"].get(name, {}).get("levels", {}).items()}
            grades |= levels.keys()
            shift = 0.05 * (place - (len(reports) - 1) / 2)  # so that bars of two sources do not hide each other
            style = {"marker": MARKERS[place % len(MARKERS)], "linestyle": LINES[place % 4], "color": str(0.65 * place / max(1, len(reports) - 1))}
            means, deviations = ([value[key] for value in levels.values()] for key in ("mean", "deviation"))
            axis.errorbar([g + shift for g in levels], means, yerr=deviations, label=source, capsize=2, elinewidth=0.7, markersize=5, **style)
        axis.set_xlabel("grade of the passage")
        axis.set_ylabel(labels.get(name, name))
        axis.set_xticks(sorted(grades))
    figure.suptitle("What the passages of each grade are like (mean and standard deviation over lists)")
    handles, sources = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, sources, loc="outside lower center", ncols=min(5, len(sources)), frameon=False)
    return figure
