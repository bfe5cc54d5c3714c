"""Figures of the LoRA experiments: accuracy and error against rank and bytes, singular values, recipes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from byom.report.figures.style import COLUMN, LOOKS, Look, blank, legend, spread_out, styled
from byom.report.frame import task_names
from experiments.lora.tables import EQUAL

PAGE = 2 * COLUMN
LINES = {
    "lora": Look("#c1272d", "P"),
    "lora_global": Look("#00735c", "X", (0, (3, 1.3))),
    "lora_merged": Look("#e69f00", "D", (0, (3.5, 1.2, 1, 1.2))),
    "fft": LOOKS["ties"],
    "post_pruning": LOOKS["post_pruning"],
}
LEVELS = {"single_task": Look("#000000", ""), "merged": Look("#14306b", ""), "pretrained": Look("#8a8a8a", "")}
RECIPES = {
    "rank1": Look("#c1272d", "P", fill=False), "adapters": Look("#c1272d", "P"), "ia3": Look("#2a9fd6", "^"),
    "bottleneck": Look("#14306b", "o"), "full": Look("#000000", "*"),
}  # fmt: skip
LAWS: dict[str, tuple[str, dict[str, Any]]] = {
    "exponential": ("Exponential", {"color": "#14306b", "linestyle": "--", "linewidth": 0.8}),
    "power": ("Power law", {"color": "#e69f00", "linestyle": (0, (1.2, 1.4)), "linewidth": 1.0}),
}
EXACT = 1e-4  # what is left of a difference below this is rounding of fp32 and has no place on a logarithmic axis
GAP = 0.065  # the height of a line of labels, of the axes
MANY = 200  # times as large as its start, the end of an axis with too many marks
ROOM = 0.16  # the height that the legend takes for each of its lines, in inches


def _where(frame: pd.DataFrame, mask: Any) -> pd.DataFrame:
    return pd.DataFrame(frame.loc[mask])


def _curves(frame: pd.DataFrame, families: Sequence[str]) -> dict[str, tuple[Look, pd.DataFrame]]:
    """Return what is drawn as lines: name to look and rows."""
    parts = {name: _where(frame, frame["method"] == name) for name in dict.fromkeys(frame["method"])}
    kinds = {name: str(rows["family"].iloc[0]) for name, rows in parts.items()}
    return {name: (LINES[kinds[name]], rows) for name, rows in parts.items() if kinds[name] in families}


def _levels(frame: pd.DataFrame, families: Sequence[str]) -> dict[str, tuple[float, Look]]:
    """Return what is drawn as horizontal lines; of the merged models the best on the test split stands for all."""
    ordered = frame.sort_values("mean", ascending=False, kind="stable")
    best = [_where(ordered, ordered["family"] == what).head(1) for what in families]
    rows = [row for part in best for row in part.to_dict("records")]
    return {_level_name(row): (100 * row["mean"], LEVELS[row["family"]]) for row in rows}


def _level_name(row: Mapping[Any, Any]) -> str:
    return row["method"] + " (best merge)" * (row["family"] == "merged")


def _draw_levels(axes: Axes, levels: Mapping[str, tuple[float, Look]]) -> None:
    """Draw labelled lines across, the labels on the right just beyond the axes, moved apart where they meet."""
    ordered = sorted(levels.items(), key=lambda pair: pair[1][0])
    for _, (value, look) in ordered:
        axes.axhline(value, color=look.color, linewidth=0.8, zorder=0)
    low, high = axes.get_ylim()
    heights = spread_out(np.array([value for _, (value, _) in ordered]), GAP * (high - low))
    for (name, (_, look)), height in zip(ordered, heights, strict=True):
        spot: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "fontsize": 7, "va": "center"}
        axes.annotate(name, (1.015, height), color=look.color, annotation_clip=False, **spot)


def _rank_axis(axes: Axes, ranks: Any) -> None:
    every = sorted(set(ranks))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(every))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set(xlim=(every[0] / 1.25, every[-1] * 1.25), xlabel="Singular values kept of each matrix, q")


def _errorbar(axes: Axes, x: Any, rows: pd.DataFrame, look: Look, label: str) -> None:
    spread = 100 * rows["mean_std"].fillna(0)
    axes.errorbar(x, 100 * rows["mean"], yerr=spread, capsize=1.8, elinewidth=0.7, label=label, **look.line)


@styled
def accuracy_by_rank(frame: pd.DataFrame) -> Figure:
    """Draw the mean accuracy against q.

    Args:
        frame: What `experiments.lora.tables.ranked` returned, with at least one BYOM-LoRA.

    Returns:
        The figure: a line per allocation or reference; levels of the tasks' own models, the best merged model and the
        pre-trained one.
    """
    found = _curves(frame, ("lora", "lora_global", "lora_merged"))
    figure, axes = blank(2.5, found)
    for name, (look, rows) in found.items():
        _errorbar(axes, rows["rank"], rows, look, name)
    _rank_axis(axes, [rank for _, rows in found.values() for rank in rows["rank"]])
    _draw_levels(axes, _levels(frame, ("single_task", "merged", "pretrained")))
    axes.set_ylabel("Mean test accuracy (%)")
    legend(figure, axes)
    return figure


@styled
def error_by_rank(frames: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw what is lost of the tasks' differences against q, one thin line per task and their mean.

    Args:
        frames: Title to what `experiments.lora.tables.ranked` returned; one panel each. Only uniform ranks are drawn,
            and no
            error that is rounding.

    Returns:
        The figure.
    """
    figure, panels = _panels(frames, 2.4)
    for axes, frame in zip(panels, frames.values(), strict=True):
        rows = _where(frame, frame["family"] == "lora")
        for task in task_names(rows):
            _draw_error(axes, rows, f"error_{task}", color="#a0a0a0", linewidth=0.6, zorder=1)
        _draw_error(axes, rows, "error", label="Mean over tasks", **LINES["lora"].line)
        axes.plot([], [], color="#a0a0a0", linewidth=0.6, label="Each task")
        axes.set_yscale("log")
        _round_axis(axes.yaxis)
        _rank_axis(axes, rows["rank"])
        _note_exact(axes, rows)
    panels[0].set_ylabel(
        "Relative error of the difference,\n" + r"$\|\Delta_t - \Delta_t^{(q)}\|_F\,/\,\|\Delta_t\|_F$"
    )
    legend(figure, panels[0])
    return figure


def _draw_error(axes: Axes, rows: pd.DataFrame, name: str, **style: Any) -> None:
    shown = rows[name] > EXACT
    axes.plot(rows["rank"][shown], rows[name][shown], **style)


def _note_exact(axes: Axes, rows: pd.DataFrame) -> None:
    exact = _where(rows, rows["error"] <= EXACT)["rank"]
    if len(exact):
        spot: dict[str, Any] = {"xycoords": "axes fraction", "ha": "right", "va": "top", "fontsize": 7}
        axes.annotate(f"exact at q = {exact.min():.0f}", (0.99, 0.98), **spot)


@styled
def accuracy_by_bytes(frames: Mapping[str, pd.DataFrame]) -> Figure:
    """Draw the mean accuracy against the bytes stored for each task, low-rank beside sparse.

    Args:
        frames: Title to what `experiments.lora.tables.ranked` returned; one panel each.

    Returns:
        The figure; the level is that of the tasks' own models.
    """
    curves = {title: _curves(frame, ("lora", "lora_global", "post_pruning", "fft")) for title, frame in frames.items()}
    names = dict.fromkeys(name for found in curves.values() for name in found)
    figure, panels = _panels(frames, 2.4, len(names))
    for axes, found in zip(panels, curves.values(), strict=True):
        for name, (look, rows) in found.items():
            _errorbar(axes, rows["task_bytes"] / 1e3, rows, look, name)
        axes.set(xscale="log", xlabel="Stored for each task (kB)")
        _round_axis(axes.xaxis)
    for axes, frame in zip(panels, frames.values(), strict=True):  # once all curves have set the common scale
        _draw_single(axes, frame)
    panels[0].set_ylabel("Mean test accuracy (%)")
    legend(figure, max(panels, key=lambda axes: len(axes.get_legend_handles_labels()[1])))
    return figure


def _draw_single(axes: Axes, frame: pd.DataFrame) -> None:
    """Draw the level of the tasks' own models, its name above the line on the left, where curves are lowest."""
    for row in _where(frame, frame["family"] == "single_task").head(1).to_dict("records"):
        low, high = axes.get_ylim()
        axes.set_ylim(low, max(high, 100 * row["mean"] + 0.1 * (high - low)))
        value, said = 100 * row["mean"], f"{row['method']}, {row['task_bytes'] / 1e3:,.0f} kB"
        axes.axhline(value, color="black", linewidth=0.8, zorder=0)
        spot: dict[str, Any] = {"xytext": (2, 2), "textcoords": "offset points", "fontsize": 7}
        axes.annotate(said, (0, value), xycoords=("axes fraction", "data"), va="bottom", **spot)


@styled
def singular_values(spectra: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Draw the singular values of all matrices relative to the largest, with the two laws that were fitted to them.

    Args:
        spectra: Title to what ``experiments.spectra`` wrote; one panel each.

    Returns:
        The figure: the median over matrices, the band from 10 to 90 %, and the fits with their R² of log sigma.
    """
    figure, panels = _panels(spectra, 2.5, 4)
    for axes, spectrum in zip(panels, spectra.values(), strict=True):
        _draw_spectrum(axes, spectrum["all"])
        axes.set_xlabel("Index of the singular value, i")
    panels[0].set_ylabel(r"Relative singular value, $\sigma_i / \sigma_1$")
    legend(figure, panels[0])
    return figure


def _draw_spectrum(axes: Axes, found: Mapping[str, Any]) -> None:
    places = np.arange(1, len(found["median"]) + 1)
    band = [np.maximum(found[end], EXACT) for end in ("low", "high")]
    axes.fill_between(places, *band, color="#d9d9d9", linewidth=0, label="10 to 90 % of matrices")
    axes.plot(places, np.maximum(found["median"], EXACT), color="black", label="Median over matrices")
    said = [_draw_law(axes, law, fit, places) for law, fit in found["fits"].items()]
    axes.set_yscale("log")
    _round_axis(axes.yaxis)
    spot: dict[str, Any] = {"xycoords": "axes fraction", "ha": "right", "va": "top", "fontsize": 7}
    axes.annotate("\n".join([*said, f"{found['matrices']} matrices"]), (0.99, 0.98), **spot)


def _draw_law(axes: Axes, law: str, fit: Mapping[str, float], places: np.ndarray) -> str:
    name, style = LAWS[law]
    along = places if law == "exponential" else np.log(places)
    axes.plot(places, np.exp(fit["intercept"] + fit["slope"] * along), label=f"{name} fit", **style)
    return f"{name}: R² = {fit['r2']:.3f}"


@styled
def recipes(frame: pd.DataFrame) -> Figure:
    """Draw the mean accuracy of single-task models against what a recipe stores for each.

    Args:
        frame: What `experiments.lora.tables.recipes` returned.

    Returns:
        The figure: a labelled dot per recipe; thin lines join those of equal size.
    """
    figure, axes = blank(2.6, ())
    where = {row["recipe"]: (row["task_parameters"], 100 * row["mean"]) for row in frame.to_dict("records")}
    for one, two in EQUAL.items():
        if one in where and two in where:
            axes.plot(*zip(where[one], where[two], strict=True), color="#b0b0b0", linewidth=0.7, zorder=0)
    for row in frame.to_dict("records"):
        style = {**RECIPES[row["recipe"]].line, "linestyle": "none", "markersize": 6}
        axes.errorbar(*where[row["recipe"]], yerr=100 * np.nan_to_num(row["mean_std"]), **style)
    axes.set(xscale="log", xmargin=0.12, ymargin=0.15)
    _round_axis(axes.xaxis, _count)
    _label_dots(axes, frame)
    axes.set(xlabel="Values stored for each task", ylabel="Mean test accuracy (%),\nsingle-task models")
    return figure


def _label_dots(axes: Axes, frame: pd.DataFrame) -> None:
    """Write names on the inner side of the dots, those of one side below each other, and the largest below its dot."""
    for row in _where(frame, frame["recipe"] == "full").to_dict("records"):
        spot: dict[str, Any] = {
            "xytext": (6, -6),
            "textcoords": "offset points",
            "ha": "right",
            "va": "top",
            "fontsize": 7,
        }
        axes.annotate(row["method"], (row["task_parameters"], 100 * row["mean"]), **spot)
    _label_pairs(axes, _where(frame, frame["recipe"] != "full"))


def _label_pairs(axes: Axes, frame: pd.DataFrame) -> None:
    middle, (low, high) = np.sqrt(np.prod(axes.get_xlim())), axes.get_ylim()
    for left in (True, False):
        side = _where(frame, (frame["task_parameters"] < middle) == left).sort_values("mean", kind="stable")
        edge = side["task_parameters"].max() * 1.6 if left else side["task_parameters"].min() / 1.6
        heights = spread_out(100 * side["mean"].to_numpy(float), GAP * (high - low))
        for row, height in zip(side.to_dict("records"), heights, strict=True):
            style: dict[str, Any] = {"ha": "left" if left else "right", "va": "center", "fontsize": 7}
            arrow = {"arrowstyle": "-", "color": "#8a8a8a", "linewidth": 0.5, "shrinkA": 1, "shrinkB": 3}
            here = (row["task_parameters"], 100 * row["mean"])
            axes.annotate(row["method"], here, (edge, height), arrowprops=arrow, **style)


def _panels(titles: Mapping[str, Any], height: float, entries: int = 2) -> tuple[Figure, list[Axes]]:
    """Return an empty figure, two print columns wide, with a titled panel for each title."""
    figure = Figure(figsize=(PAGE, height + ROOM * -(-entries // 2)), layout="constrained")
    panels = list(figure.subplots(1, len(titles), sharey=True, squeeze=False)[0])
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=7.5, loc="left")
    return figure, panels


def _round_axis(axis: Any, words: Callable[[float], str] = "{:,g}".format) -> None:
    """Mark 1, 2 and 5 of every decade of a logarithmic axis, or 1 and 3 of many decades, written by `words`."""
    low, high = axis.get_view_interval()
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    digits = (1, 2, 5) if high < MANY * low else (1, 3)
    axis.set_major_locator(FixedLocator([digit * 10.0**decade for decade in decades for digit in digits]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: words(value)))


def _count(value: float) -> str:
    return f"{value / 1e6:g} M" if value >= 1e6 else f"{value / 1e3:g} k"
