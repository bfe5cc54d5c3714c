"""Figures of the anatomy of task vectors: mass, concentration, conflicts, distances, cosines, what is put back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from byom.report.anatomy import FIRST, normal_concentration, shares, sums
from byom.report.figures.style import COLUMN, SPARE, Look, blank, legend, looks, styled
from byom.report.frame import percent

PAGE = 2 * COLUMN
FILLS: dict[str, dict[str, Any]] = {
    "attention": {"color": "#14306b"},
    "MLP": {"color": "#e69f00"},
    "embedding": {"facecolor": "#d9d9d9", "edgecolor": "#6e6e6e", "hatch": "////", "linewidth": 0},
    "normalisation": {"facecolor": "white", "edgecolor": "#c1272d", "hatch": "xxxx", "linewidth": 0},
    "other": {"facecolor": "white", "edgecolor": "#6e6e6e", "hatch": "....", "linewidth": 0},
}
LEVEL: dict[str, Any] = {
    "linestyle": "none", "marker": "_", "color": "black", "markersize": 9,
    "path_effects": [withStroke(linewidth=2.4, foreground="white")],  # dark bars lie behind it
}  # fmt: skip
UNSEEN = 0.2  # a kind whose share of the mass is below this in every layer could not be seen, in per cent
STEPS = (Look("#2a9fd6", "^", (0, (3, 1.3))), Look("#14306b", "o"), Look("#c1272d", "P"), Look("#e69f00", "D"))
CHANCE: dict[str, Any] = {"linestyle": (0, (1.2, 1.4)), "linewidth": 0.9}
THIN: dict[str, Any] = {"color": "#b0b0b0", "linewidth": 0.6, "zorder": 1}


@styled
def mass_by_layer(frame: pd.DataFrame) -> Figure:
    """Draw which share of the squared norm of a task vector lies in which layer, by kind of parameter.

    Args:
        frame: A frame made by `byom.report.anatomy.masses`; the mean over tasks is drawn.

    Returns:
        The figure: stacked bars, and dots for the share of the parameters.
    """
    table = pd.DataFrame(100 * shares(frame, "layer", "kind").unstack(fill_value=0.0))
    kinds = [kind for kind in FILLS if kind in table and table[kind].to_numpy().max() > UNSEEN]
    figure, axes = blank(2.3, [*kinds, "Share of the parameters"])
    bottom, places = np.zeros(len(table)), np.arange(len(table))
    for kind in kinds:
        axes.bar(places, table[kind], 0.8, bottom, label=kind[0].upper() + kind[1:], **FILLS[kind])
        bottom += table[kind].to_numpy()
    entries = sums(frame, ["layer"], "entries").to_numpy()
    axes.plot(places, 100 * entries / entries.sum(), label="Share of the parameters", **LEVEL)
    _layer_axis(axes, table.index)
    axes.set_ylabel("Share of the squared norm (%)")
    legend(figure, axes)
    return figure


def _layer_axis(axes: Axes, layers: Sequence[Any] | pd.Index) -> None:
    words = [{FIRST: "emb."}.get(layer, str(layer).replace("decoder ", "d")) for layer in layers]
    axes.set_xticks(range(len(words)), labels=words)
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("Block, as the model numbers it")


@styled
def concentration(whole: pd.DataFrame, within: pd.DataFrame) -> Figure:
    """Draw which share of the squared norm the largest entries hold.

    Args:
        whole: A row per density, a column per task, of `byom.report.anatomy.concentration`: the largest entries of the
            model.
        within: The same where each tensor gives its largest entries.

    Returns:
        The figure: a thin line per task, and means next to those of normally distributed entries.
    """
    figure, axes = blank(2.4, ["Largest of the whole model"] * 4)
    axes.plot(100 * whole.index, 100 * whole, **THIN)
    for frame, label, look in (
        (whole, "Largest of the whole model", STEPS[1]),
        (within, "Largest of each tensor", STEPS[2]),
    ):
        axes.plot(100 * frame.index, 100 * frame.mean(axis=1), label=label, **look.line)
    normal = [100 * normal_concentration(density) for density in whole.index]
    axes.plot(100 * whole.index, normal, color="black", label="Normal distribution", **CHANCE)
    axes.plot([], [], label="Each task, whole model", **THIN)
    axes.set_xscale("log")
    _density_axis(axes, whole.index)
    axes.set_ylabel("Share of the squared norm (%)")
    legend(figure, axes)
    return figure


def _density_axis(axes: Axes, densities: Sequence[float] | pd.Index) -> None:
    axes.xaxis.set_major_locator(FixedLocator([100 * density for density in densities]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("Largest entries, m (% of all)")


@styled
def conflicts(frames: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw how many of the entries that several tasks move are moved both up and down, layer by layer.

    Args:
        frames: What was trimmed, in words, to what `byom.report.anatomy.conflicts` returned.

    Returns:
        The figure: a line each; dotted where signs would be coins.
    """
    figure, axes = blank(2.3, [*frames, "If signs were coins"])
    for (title, frame), look in zip(frames.items(), (STEPS[1], STEPS[2], *SPARE), strict=False):
        rows = sums(frame, ["layer"], "conflicting", "by_chance", "shared")
        conflicting, by_chance, shared = rows.to_numpy().T
        axes.plot(100 * conflicting / shared, label=title, **look.line)
        axes.plot(100 * by_chance / shared, color=look.color, **CHANCE)
        _layer_axis(axes, rows.index)
    axes.plot([], [], color="black", label="If signs were coins", **CHANCE)
    axes.set(ylabel="Moved both up and down\n(% of entries that tasks share)", ylim=(None, 102))
    legend(figure, axes)
    return figure


@styled
def distances(frame: pd.DataFrame, titles: Mapping[str, str]) -> Figure:
    """Draw how far every task's model is from the pre-trained and from merged models.

    Args:
        frame: A frame made by `byom.report.anatomy.distances`.
        titles: Column to how the legend writes it.

    Returns:
        The figure: a row per task, a marker per reference.
    """
    figure = Figure(figsize=(COLUMN, 1.1 + 0.2 * len(frame)), layout="constrained")
    axes = figure.add_subplot()
    for name, look in looks({name: name for name in frame}).items():
        style: dict[str, Any] = {**look.line, "linestyle": "none"}
        axes.plot(frame[name], range(len(frame)), label=titles[name], **style)
    axes.set_yticks(range(len(frame)), labels=[str(task).replace("_", " ") for task in frame.index])
    axes.set_ylim(len(frame) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    axes.set(xlim=(0, None), xlabel=r"Distance of $\theta_t$, Euclidean norm", axisbelow=True)
    legend(figure, axes)
    return figure


@styled
def cosines(frame: pd.DataFrame) -> Figure:
    """Draw the cosine between every two task vectors.

    Args:
        frame: A frame made by `byom.report.anatomy.cosines`; the ones on the diagonal are left white.

    Returns:
        The figure.
    """
    values = np.where(np.eye(len(frame), dtype=bool), np.nan, frame.to_numpy())
    side = 1.0 + 0.31 * len(frame)
    figure = Figure(figsize=(side + 0.5, side), layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(values, cmap="cividis_r")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for (row, column), value in np.ndenumerate(values):
        if row != column:
            color = "white" if value > middle else "black"
            axes.text(column, row, f"{round(value, 2) + 0.0:.2f}", ha="center", va="center", color=color, fontsize=6)
    names = [str(task).replace("_", " ") for task in frame.index]
    axes.set_xticks(range(len(names)), labels=names, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names)), labels=names)
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, shrink=0.8, label="Cosine of two task vectors")
    return figure


@styled
def put_back(frame: pd.DataFrame) -> Figure:
    """Draw which part of every layer is put back, by number and by squared norm.

    Args:
        frame: A frame made by `byom.report.anatomy.put_back`; of several tasks one below the other, which are taken
            together.

    Returns:
        The figure: two panels, a line per density; dotted lines are what an equal share of each layer would be.
    """
    figure = Figure(figsize=(PAGE, 2.4), layout="constrained")
    panels = figure.subplots(1, 2, sharex=True)
    for density, look in zip(sorted(set(frame["density"])), (*STEPS, *SPARE), strict=False):
        rows = sums(pd.DataFrame(frame[frame["density"] == density]), ["layer"], "kept", "entries", "kept_mass", "mass")
        largest, entries, largest_mass, mass = rows.to_numpy().T
        for axes, shown in zip(panels, (largest / entries, largest_mass / mass), strict=True):
            axes.plot(100 * shown, label=f"m = {percent(density)} %", **look.line)
            _layer_axis(axes, rows.index)
        panels[0].axhline(100 * density, color=look.color, zorder=0, **CHANCE)
    panels[0].set_ylabel("Entries put back (%)")
    panels[1].set_ylabel("Squared norm put back (%)")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    return figure
