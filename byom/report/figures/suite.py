"""Figures from the numbers of a report: accuracy against what is put back, against size, and by task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from byom.report.figures import bytes as by_bytes
from byom.report.figures import models as by_models
from byom.report.figures.parts import alone, pareto_front, where
from byom.report.figures.style import (
    LOOKS,
    Look,
    blank,
    errorbar,
    legend,
    looks,
    reference_line,
    save,
    size_axis,
    spread_out,
    styled,
)
from byom.report.frame import percent, task_names
from byom.report.rows import KINDS

TYPICAL_DENSITY = 0.1
LABEL_GAP = 0.06  # the height of a line of labels, of the axes


def families(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Split the rows that put a density back for each task into curves.

    Args:
        frame: A frame made by `byom.report.frame.numbers`.

    Returns:
        For each name such as ``BYOM-FFT on TIES`` its rows by density; any variant that has a density and stores
        something for each task is among them.
    """
    put_back = where(frame, (frame["density"] > 0) & ~frame["one_model"])
    parts = put_back.groupby("method", sort=False)
    return {str(name): part.sort_values(by="density") for name, part in parts}


def _looks(frame: pd.DataFrame) -> dict[str, Look]:
    """Give every row its look, by method.

    A merged model and the first variant on it share that of the merge method; further variants have their own.
    """
    firsts: dict[str, str] = {}
    keys: dict[str, str] = {}
    shared: dict[str, str] = {}
    for method, base, merge, variant in frame[["method", "base", "merge", "variant"]].itertuples(index=False):
        first = variant == "none" or firsts.setdefault(base, variant) == variant
        shared[method] = base if first else method
        keys[shared[method]] = (variant if variant == "post_pruning" else merge) if first else variant
    drawn = looks(keys)
    return {method: drawn[name] for method, name in shared.items()}


@styled
def accuracy_by_density(frame: pd.DataFrame) -> Figure:
    """Draw the mean accuracy against m, the part put back for each task.

    Args:
        frame: A frame made by `byom.report.frame.numbers`.

    Returns:
        The figure; the open marker at "0" is the model nothing was put back into.
    """
    curves = families(frame)
    figure, axes = blank(2.75, curves)
    look = _looks(frame)
    densities = sorted({m for rows in curves.values() for m in rows["density"]})
    zero = _zero_place(densities)
    for name, rows in curves.items():
        style = look[name]
        errorbar(axes, 100 * rows["density"], rows, style, name)
        _draw_start(axes, alone(frame, rows), zero, 100 * rows["density"].iloc[0], style)
    _density_axis(axes, densities, zero)
    reference_line(axes, frame, "single_task", "Single-task", 1.0)
    reference_line(axes, frame, "pretrained", "Pre-trained", 0.0)
    axes.set_ylabel("Mean test accuracy (%)")
    legend(figure, axes)
    return figure


def _zero_place(densities: Sequence[float]) -> float:
    return 100 * densities[0] / 2.6 if densities else 0.1


def _draw_start(axes: Axes, row: pd.DataFrame, zero: float, first: float, look: Look) -> None:
    """Mark the model before anything is put back, and carry its level to where the curve begins."""
    for value in 100 * row["mean"]:
        axes.plot([zero, first], [value, value], color=look.color, linestyle="--", linewidth=0.6, zorder=1)
        axes.plot([zero], [value], **look.hollow.line, zorder=3)


def _density_axis(axes: Axes, densities: Sequence[float], zero: float) -> None:
    axes.set_xscale("log")
    places = [zero, *(100 * m for m in densities)]
    names = ["0", *(percent(m) for m in densities)]
    axes.set_xticks(places, labels=names)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(zero / 1.35, places[-1] * 1.25)
    axes.set_xlabel("Put back for each task, m (% of parameters)")
    _mark_break(axes, (zero * places[min(1, len(places) - 1)]) ** 0.5)


def _mark_break(axes: Axes, place: float) -> None:
    """Strike through the axis where the scale is not logarithmic: 0 has no place on it."""
    axes.annotate("//", (place, 0), xycoords=("data", "axes fraction"), ha="center", va="center", fontsize=7)


@styled
def accuracy_by_size(frame: pd.DataFrame) -> Figure:
    """Draw the mean accuracy against the bytes stored for all tasks together.

    Args:
        frame: A frame made by `byom.report.frame.numbers`.

    Returns:
        The figure; open markers are merged models alone, the light line is the Pareto front.
    """
    curves = families(frame)
    figure, axes = blank(2.75, [*curves, "Pareto front"])
    look = _looks(frame)
    for name, rows in curves.items():
        errorbar(axes, rows["bytes"] / 1e6, rows, look[name], name)
    shared = where(frame, frame["kind"].isin(["pretrained", "merged"]))
    _draw_front(axes, pd.concat([*curves.values(), shared, where(frame, frame["variant"] == "single_task")]))
    _label_single(axes, frame)
    _label_shared(axes, shared, look)
    _label_densities(axes, curves)
    size_axis(axes, frame["bytes"] / 1e6, longest=max(map(len, shared["method"]), default=0))
    axes.set_ylabel("Mean test accuracy (%)")
    legend(figure, axes)
    return figure


def _draw_front(axes: Axes, frame: pd.DataFrame) -> None:
    front = pareto_front(frame)
    shade = {"color": "#d9d9d9", "linewidth": 4, "solid_capstyle": "round", "solid_joinstyle": "round"}
    axes.plot(front["bytes"] / 1e6, 100 * front["mean"], zorder=0, label="Pareto front", **shade)


def _label_shared(axes: Axes, rows: pd.DataFrame, look: dict[str, Look]) -> None:
    """Mark the models without anything put back, their names to the left, moved apart where they meet."""
    ordered = rows.sort_values(by="mean")
    for row in ordered.to_dict("records"):
        axes.plot(row["bytes"] / 1e6, 100 * row["mean"], **look[row["method"]].hollow.line, zorder=3)
    low, high = axes.get_ylim()
    heights = spread_out(100 * ordered["mean"].to_numpy(), LABEL_GAP * (high - low))
    for height, row in zip(heights, ordered.to_dict("records"), strict=True):
        here = (row["bytes"] / 1e6, 100 * row["mean"])
        axes.annotate(row["method"], here, (here[0] * 0.93, height), ha="right", va="center", fontsize=7)


def _label_single(axes: Axes, frame: pd.DataFrame) -> None:
    for row in where(frame, frame["variant"] == "single_task").head(1).to_dict("records"):
        here, style = (row["bytes"] / 1e6, 100 * row["mean"]), LOOKS["single_task"]
        axes.plot(*here, color=style.color, marker=style.marker, markersize=7)
        spot = {"xytext": (3, -6), "textcoords": "offset points", "ha": "right", "va": "top", "fontsize": 7}
        axes.annotate("Single-task", here, **spot)


def _label_densities(axes: Axes, curves: dict[str, pd.DataFrame]) -> None:
    """Write m below the lowest point of each density."""
    points = pd.concat([*curves.values()]).sort_values(by="mean")
    for low in points.drop_duplicates("density").to_dict("records"):
        spot = {"xytext": (4, -4), "textcoords": "offset points", "ha": "left", "va": "top"}
        here = (low["bytes"] / 1e6, 100 * low["mean"])
        axes.annotate(f"{percent(low['density'])} %", here, color="#555555", fontsize=6.5, **spot)


@styled
def accuracy_by_task(frame: pd.DataFrame) -> Figure:
    """Draw the accuracy on each task of the rows that tell the story.

    Args:
        frame: A frame made by `byom.report.frame.numbers`.

    Returns:
        The figure: one line per task, one marker per row of `selected`.
    """
    tasks = task_names(frame)
    rows = selected(frame)
    figure, axes = blank(0.7 + 0.24 * (len(tasks) + 1), rows)
    places = [*range(len(tasks)), len(tasks) + 0.4]
    axes.hlines(places, 0, 1, transform=axes.get_yaxis_transform(), color="#e4e4e4", linewidth=0.7, zorder=0)
    look = _looks(frame)
    for name, row in rows.items():
        values = [100 * row[f"accuracy_{task}"] for task in tasks] + [100 * row["mean"]]
        axes.plot(values, places, label=name, **_task_marker(row, look))
    axes.axhline(len(tasks) - 0.3, color="black", linewidth=0.5)
    axes.set_yticks(places, labels=[*(task.replace("_", " ") for task in tasks), "Mean"])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(places[-1] + 0.6, -0.6)
    axes.set_xlabel("Test accuracy (%)")
    legend(figure, axes)
    return figure


def _task_marker(row: dict, look: dict[str, Look]) -> dict:
    """Return the marker of a row: as in the other figures, but a tick that stays visible for single-task."""
    if row["kind"] == "single_task":
        return {"color": "black", "marker": "|", "markersize": 9, "markeredgewidth": 1.3, "linestyle": "none"}
    style = look[row["method"]]
    return {**(style.hollow if row["kind"] == "merged" else style).line, "linestyle": "none"}


def selected(frame: pd.DataFrame) -> dict[str, dict]:
    """Pick the rows of the figure by task; what is best is decided on validation data.

    Args:
        frame: A frame made by `byom.report.frame.numbers`.

    Returns:
        Up to five rows by name: pre-trained, best merged model, post-pruning and BYOM-FFT on that merge at
        the density nearest 10 %, single-task.
    """
    parts = {kind: where(frame, frame["kind"] == kind) for kind in KINDS}
    merged = _best(parts["merged"])
    same = where(parts["fft"], parts["fft"]["base"].isin(merged["method"]))
    fft = same if len(same) else parts["fft"]
    pruned = _typical(parts["post_pruning"])
    picks = [parts["pretrained"], merged, pruned, _typical(fft), parts["single_task"]]
    first = [row for rows in picks for row in rows.head(1).to_dict("records")]
    return {_row_label(row): row for row in first}


def _typical(rows: pd.DataFrame) -> pd.DataFrame:
    nearest = (rows["density"] - TYPICAL_DENSITY).abs()
    return _best(where(rows, nearest == nearest.min()))


def _best(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the best row on validation data, or the last in table order where validation was not evaluated."""
    measured = where(rows, rows["validation"].notna())
    return measured.nlargest(1, columns="validation") if len(measured) else rows.tail(1)


def _row_label(row: dict) -> str:
    return row["method"] + ("" if np.isnan(row["density"]) else f", {percent(row['density'])} %")


MOST = 40  # methods in a figure whose legend names each
FIGURES = {
    "accuracy-by-density": accuracy_by_density,
    "accuracy-by-size": accuracy_by_size,
    "accuracy-by-task": accuracy_by_task,
}
CURVES = {  # drawn where there are curves of their sort
    "accuracy-by-models": (by_models.curves, by_models.accuracy_by_models),
    "accuracy-by-bytes": (by_bytes.curves, by_bytes.accuracy_by_bytes),
}


def save_all(frame: pd.DataFrame, folder: Path, stem: str) -> list[Path]:
    """Draw every figure the rows allow and write each as PNG and PDF.

    Args:
        frame: A frame made by `byom.report.frame.numbers`.
        folder: Where the files go.
        stem: What their names begin with.

    Returns:
        The paths written; those against density and size need several densities, and at most `MOST` methods, and where
        accuracy against bytes per task is drawn, the one against size is not.
    """
    several = len(set(frame["method"])) <= MOST and any(p["density"].nunique() > 1 for p in families(frame).values())
    drawn = FIGURES if several else {"accuracy-by-task": accuracy_by_task}
    drawn = drawn | {name: draw for name, (curves, draw) in CURVES.items() if curves(frame)}
    if "accuracy-by-bytes" in drawn:  # which has every method; the front of those with a density alone would mislead
        drawn = {name: draw for name, draw in drawn.items() if name != "accuracy-by-size"}
    return [path for name, draw in drawn.items() for path in save(draw(frame), folder / f"{stem}--{name}")]
