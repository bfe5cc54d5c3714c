"""Accuracy against the bytes stored for each task, of a method that takes any number of them and of all others."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from byom.report.figures.labels import Label, place
from byom.report.figures.parts import alone, curves_along, pareto_front, where
from byom.report.figures.style import COLUMN, LOOKS, SPARE, Look, blank, legend, looks, round_sizes, styled
from byom.report.frame import percent
from byom.report.rows import KILOBYTES

WIDTH = 2 * COLUMN
GREY, PALE = "#606060", "#c4c4c4"
MOST = 20  # other rows that all have names
BELOW = 0.35  # room below the lowest point of a curve, of what all span above
ARROW = {"marker": "$\\downarrow$", "markersize": 7, "color": GREY, "linestyle": "none", "zorder": 4}
DRAWN = (LOOKS["ties"], replace(SPARE[0], dash=(0, (3, 1.3))), *SPARE[1:])  # of curves, in turn


def curves(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Return the rows that differ in their kilobytes alone, by name, each by bytes; those of few sizes are left out.

    Args:
        frame: A frame made by `byom.report.frame.numbers`.
    """
    return curves_along(frame, KILOBYTES, "task_bytes")


@styled
def accuracy_by_bytes(frame: pd.DataFrame) -> Figure:
    """Draw the mean accuracy against the bytes that a task takes beside one model.

    Bars are one standard deviation over seeds, or the 95 % interval over test examples where there is one seed.

    Args:
        frame: A frame made by `byom.report.frame.numbers`.

    Returns:
        The figure, two columns wide: curves of the rows that differ in their kilobytes alone, a named marker for every
        other row that stores something for each task, and lines for the tasks' own models and the merged ones alone.
        A row far below the curves is an arrow at the lower edge, with its accuracy. Of more than `MOST` other rows
        those have names that no other of them beats at the same or fewer bytes; the rest are pale, where they fit.
    """
    drawn = dict(sorted(curves(frame).items(), key=lambda curve: -curve[1]["mean"].max()))
    others, pale = _others(frame)
    figure, axes = blank(3.4, drawn, WIDTH)
    for (name, part), look in zip(drawn.items(), cycle(DRAWN), strict=False):
        _errorbar(axes, part, look, name, zorder=3, linewidth=1.8, markersize=5.5)
    look = {name: replace(one.hollow, color=GREY) for name, one in looks({v: v for v in others["variant"]}).items()}
    for _, part in others.groupby("method", sort=False):  # a line through the densities of one
        style = look[str(part["variant"].iloc[0])]
        _errorbar(axes, part.sort_values(by="task_bytes"), style, "_other", zorder=2, linewidth=0.7)
    axes.plot(pale["task_bytes"], 100 * pale["mean"], color=PALE, marker=".", linestyle="none", zorder=1)
    merged = pd.concat([alone(frame, part) for part in drawn.values()]).drop_duplicates("method")
    _byte_axis(axes, pd.concat([*drawn.values(), others, pale]))
    _level(axes, where(frame, frame["kind"] == "single_task").head(1), "Single-task", 0.0)
    for row in merged["method"]:
        _level(axes, where(merged, merged["method"] == row), f"{row}, one model for all tasks", 1.0)
    _accuracy_axis(axes, pd.concat([*drawn.values(), merged]))
    legend(figure, axes)
    _name(figure, axes, others)
    return figure


def _others(frame: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows that store something for each task and are no part of a curve: those with names and the rest."""
    own = frame["kind"].eq("single_task") | frame["curve"].isin(list(curves(frame)))
    rows = where(frame, (frame["task_bytes"] > 0) & ~frame["one_model"] & ~own)
    named = rows if len(rows) <= MOST else pareto_front(rows.assign(bytes=rows["task_bytes"]))
    return named, rows.drop(index=named.index)


def _errorbar(axes: Axes, rows: pd.DataFrame, look: Look, label: str, **style: Any) -> None:
    means, (low, high) = rows["mean"].to_numpy(float), _ends(rows)
    bars = 100 * np.array([means - low, high - means]).clip(0)
    style |= {"capsize": 1.8, "elinewidth": 0.7, **look.line}
    axes.errorbar(rows["task_bytes"], 100 * means, yerr=bars, label=label, **style)


def _ends(rows: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Return the ends of the bars: a deviation over seeds, or the interval over test examples of one seed."""
    columns = ("mean", "mean_std", "test_lower", "test_upper")
    mean, std, low, high = (rows[name].to_numpy(float) for name in columns)
    several, known = ~np.isnan(std), ~np.isnan(low)
    return (
        np.where(several, mean - std, np.where(known, low, mean)),
        np.where(several, mean + std, np.where(known, high, mean)),
    )


def _level(axes: Axes, row: pd.DataFrame, label: str, right: float) -> None:
    """Draw a dashed line across at the accuracy of a row, its label just above at the left (0) or right (1) end."""
    for value in 100 * row["mean"]:
        axes.axhline(value, color="black", linewidth=0.8, linestyle=(0, (5, 3)), zorder=0)
        side = "right" if right else "left"
        spot = {"xytext": (-2 if right else 2, 2), "textcoords": "offset points", "ha": side, "va": "bottom"}
        axes.annotate(label, (right, value), xycoords=("axes fraction", "data"), fontsize=7, **spot)


def _byte_axis(axes: Axes, rows: pd.DataFrame) -> None:
    sizes = rows["task_bytes"].to_numpy(float)
    low, high = sizes.min() / 1.25, sizes.max() * 1.25
    axes.set_xscale("log")
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator(round_sizes(low, high)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _size(value)))
    axes.set_xlabel("Stored for each task, beside one model for all")


def _size(value: float) -> str:
    return f"{value / 1e6:g} MB" if value >= 1e6 else f"{value / 1e3:g} kB"


def _accuracy_axis(axes: Axes, rows: pd.DataFrame) -> None:
    """Leave room below the curves and the merged models for a third of what they span, and for no more."""
    top, low = axes.get_ylim()[1], 100 * float(np.min(_ends(rows)[0]))
    axes.set_ylim(max(axes.get_ylim()[0], low - BELOW * (top - low)), top)
    axes.set_ylabel("Mean test accuracy (%)")


def _name(figure: Figure, axes: Axes, others: pd.DataFrame) -> None:
    """Write the names of the markers beside them, or beside arrows where the axis ends above them."""
    (floor, top), labels = axes.get_ylim(), []
    for row in others.to_dict("records"):
        text, mean = row["method"], 100 * row["mean"]
        text += "" if np.isnan(row["density"]) else f", {percent(row['density'])} %"
        height = mean if mean >= floor else floor + 0.02 * (top - floor)
        if mean < floor:
            axes.plot(row["task_bytes"], height, **ARROW)
            text += f": {mean:.1f}"
        labels.append(Label(text, row["task_bytes"], height))
    place(figure, axes, labels, _covered(axes), fontsize=7, color=GREY)


def _covered(axes: Axes) -> list[np.ndarray]:
    """Return what is drawn so far as lines in data coordinates: curves, bars and levels."""
    left, right = axes.get_xlim()
    found = [np.asarray(line.get_xydata(), float) for line in axes.lines if line.get_linestyle() != "None"]
    lines = [
        np.array([[left, y[0]], [right, y[0]]]) if x.tolist() == [0, 1] else one for one in found for x, y in [one.T]
    ]
    drawn = [one.lines[2] for one in axes.containers if isinstance(one, ErrorbarContainer)]
    return [*lines, *(bar for parts in drawn for part in parts for bar in part.get_segments())]
