"""The kit's figures: plain matplotlib, readable in grey, every axis with its unit.

Each function draws one figure from numbers that it is handed and returns it; none computes results.
"""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

GREYS = ("0.15", "0.45", "0.65", "0.85")  # far enough apart to tell in print
HATCHES = ("", "//", "..", "xx", "\\\\", "--", "++", "oo")
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
