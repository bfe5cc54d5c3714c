"""Accuracy against size, from one merged model to every task's own."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from byom.report.figures.parts import curves_along
from byom.report.figures.style import LOOKS, Look, blank, errorbar, legend, looks, reference_line, styled
from byom.report.rows import SIZE


def curves(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the rows that differ in their size alone, by name, each curve by size; those of few sizes are left out.

    Args:
        frame: A frame made by `byom.report.frame.numbers`.
    """
    return curves_along(frame, SIZE, "models")


@styled
def accuracy_by_models(frame: pd.DataFrame) -> Figure:
    """Draw the mean accuracy against the size of what serves all tasks, in models' worth of parameters.

    Args:
        frame: A frame made by `byom.report.frame.numbers`.

    Returns:
        The figure; the open markers are the merged models alone, and the star is every task's own model.
    """
    drawn = curves(frame)
    figure, axes = blank(2.5, drawn)
    look = looks({name: str(part["merge"].iloc[0]) for name, part in drawn.items()})
    for name, part in drawn.items():
        errorbar(axes, part["models"], part, look[name], name)
        _draw_merged(axes, frame, part, look[name])
    for row in frame.loc[frame["kind"] == "single_task"].head(1).to_dict("records"):
        style = LOOKS["single_task"]
        axes.plot(row["models"], 100 * row["mean"], color=style.color, marker=style.marker, markersize=7, zorder=3)
    reference_line(axes, frame, "single_task", "Single-task", 0.0)
    reference_line(axes, frame, "pretrained", "Pre-trained", 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel("Size for all tasks (models' worth of parameters)")
    axes.set_ylabel("Mean test accuracy (%)")
    legend(figure, axes)
    return figure


def _draw_merged(axes: Axes, frame: pd.DataFrame, part: pd.DataFrame, look: Look) -> None:
    """Mark the merged model that a curve begins with, unfilled and a little larger than its own first marker."""
    alone = frame.loc[(frame["kind"] == "merged") & frame["method"].isin(list(part["base"]))]
    for models, mean in np.asarray(alone[["models", "mean"]], float):
        axes.plot(models, 100 * mean, **{**look.hollow.line, "linestyle": "none"}, markersize=7, zorder=1)
