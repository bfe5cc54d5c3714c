"""Every method at a glance: accuracy, needs, and what serving it stores."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.transforms import blended_transform_factory

from byom.report.figures.style import COLUMN, Look, legend, styled
from byom.report.frame import percent

NEEDS = {
    "weights": Look("#14306b", "o"),
    "unlabelled inputs": Look("#2a9fd6", "D"),
    "labelled inputs": Look("#e69f00", "s"),
    "test inputs": Look("#c1272d", "^", fill=False),
    "another model": Look("#6e6e6e", "v", fill=False),
}
GROUPS = ("references", "one merged model", "a model for each task", "task not known")
ROW = 0.145  # inches per method


def groups(frame: pd.DataFrame) -> pd.Series:
    """Return the part of the figure that each row of `byom.report.methods.methods` belongs to, a number."""
    reference = frame["kind"].eq("pretrained") | frame["given"].eq("another model")
    alone = frame["variant"].eq("none") | frame["one_model"]
    routed = frame["right"].notna()
    return pd.Series(np.select([reference, routed, alone], [0, 3, 1], default=2), index=frame.index)


@styled
def accuracy_by_method(frame: pd.DataFrame) -> Figure:
    """Draw every method as a dot, the best of each group on top.

    Args:
        frame: A frame made by `byom.report.methods.methods`.

    Returns:
        Mean test accuracy against methods in four groups; the marker says what a method needs, the number on the
        right how many MB serve all tasks.
    """
    sorted_ = frame.assign(group=groups(frame)).sort_values(["group", "mean"], ascending=[True, False])
    ordered = sorted_.reset_index(drop=True)
    places = np.arange(len(ordered)) + ordered["group"].to_numpy() * 1.4
    figure = Figure(figsize=(2 * COLUMN, 0.9 + ROW * (len(ordered) + 4)), layout="constrained")
    axes = figure.add_subplot()
    _dots(axes, ordered, places)
    _sides(axes, ordered, places)
    axes.set_xlabel("Mean test accuracy (%)")
    legend(figure, axes)
    return figure


def _dots(axes: Axes, ordered: pd.DataFrame, places: np.ndarray) -> None:
    for name, look in NEEDS.items():
        chosen = ordered["given"].eq(name).to_numpy()
        if chosen.any():
            style = {**look.line, "linestyle": "none"}
            spread = 100 * ordered["mean_std"].fillna(0)[chosen]
            means = 100 * ordered["mean"][chosen]
            axes.errorbar(means, places[chosen], xerr=spread, label=name, capsize=0, elinewidth=0.8, **style)
    for place in places:
        axes.axhline(place, color="#e4e4e4", linewidth=0.4, zorder=0)


def _sides(axes: Axes, ordered: pd.DataFrame, places: np.ndarray) -> None:
    pairs = zip(ordered["method"], ordered["density"], strict=True)
    names = [name if np.isnan(density) else f"{name}, {percent(density)} %" for name, density in pairs]
    axes.set_yticks(places, labels=names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(places[-1] + 0.8, -2.0)
    aside = blended_transform_factory(axes.transAxes, axes.transData)
    for place, size in zip(places, ordered["bytes"], strict=True):
        axes.text(1.01, place, f"{size / 1e6:.0f}", transform=aside, va="center", fontsize=6.5)
    axes.text(1.01, -1.3, "MB", transform=aside, va="center", fontsize=6.5)
    for group in sorted(set(ordered["group"])):
        top = places[(ordered["group"] == group).to_numpy()][0]
        axes.text(0.005, top - 0.95, GROUPS[group], transform=aside, va="center", fontsize=6.5, style="italic")
