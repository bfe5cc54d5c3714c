"""Figures from the numbers of a report: accuracy against what is put back, against size, and by task."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from byom.table import kind, name_method, percent, task_names

COLUMN = 3.5
TYPICAL_DENSITY = 0.1
STYLE = {
    "font.family": "DejaVu Sans", "font.size": 7.5, "axes.labelsize": 7.5, "axes.spines.top": False,
    "axes.spines.right": False, "axes.linewidth": 0.6, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "legend.fontsize": 7, "legend.frameon": False,
    "legend.handlelength": 2.6, "lines.linewidth": 1.2, "lines.markersize": 4.5, "pdf.fonttype": 42,
    "savefig.dpi": 200, "figure.dpi": 200, "axes.grid": False, "svg.hashsalt": "byom",
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """How one family of rows is drawn; colour, marker and dash each tell it apart alone."""

    color: str
    marker: str
    dash: str | tuple = "-"
    fill: bool = True

    @property
    def line(self) -> dict:
        """Keyword arguments of ``Axes.plot`` and ``Axes.errorbar``."""
        face = self.color if self.fill else "white"
        return {"color": self.color, "marker": self.marker, "linestyle": self.dash, "markerfacecolor": face}


LOOKS = {
    "pretrained": Look("#8a8a8a", "v", fill=False),
    "single_task": Look("#000000", "*"),
    "post_pruning": Look("#6e6e6e", "s", (0, (1.2, 1.4)), fill=False),
    "average": Look("#e69f00", "D", (0, (5, 1.5, 1, 1.5))),
    "task_arithmetic": Look("#2a9fd6", "^", (0, (4, 1.6))),
    "ties": Look("#14306b", "o"),
}
# families without a look of their own take these in turn
SPARE = (
    Look("#c1272d", "P"), Look("#00735c", "X", (0, (4, 1.6))), Look("#d98cb3", "<", (0, (5, 1.5, 1, 1.5))),
    Look("#7a3e00", ">", (0, (1.2, 1.4))), Look("#9a7fd1", "h"), Look("#3f3f3f", "p", (0, (4, 1.6))),
)  # fmt: skip


def _styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    @wraps(draw)
    def inside(*args, **kwargs) -> Figure:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return inside


def looks(families: Sequence[str]) -> dict[str, Look]:
    """Give each family a look, the same one in every figure.

    Args:
        families: Names of merge methods, or kinds of row.

    Returns:
        One look a family, distinct as long as the spare ones last.
    """
    rest = sorted(name for name in families if name not in LOOKS)
    return LOOKS | {name: SPARE[i % len(SPARE)] for i, name in enumerate(rest)}


def _kinds(frame: pd.DataFrame) -> pd.Series:
    return pd.Series(
        [kind(*pair) for pair in zip(frame["merge"], frame["variant"], strict=True)], index=frame.index
    )


def families(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Split the rows that put something back by where they start from.

    Args:
        frame: A frame made by `byom.table.numbers`.

    Returns:
        ``post_pruning`` and each merge method, its rows by density.
    """
    put_back = frame[frame["variant"].isin(["post_pruning", "fft"]) & frame["density"].notna()]
    names = put_back["merge"].where(put_back["variant"] == "fft", "post_pruning")
    return {str(name): rows.sort_values("density") for name, rows in put_back.groupby(names, sort=False)}


def _start(frame: pd.DataFrame, family: str) -> pd.DataFrame:
    """Return the row of a family at density 0: the merged model, or the pre-trained one."""
    merge = "pretrained" if family == "post_pruning" else family
    return frame[(frame["variant"] == "none") & (frame["merge"] == merge)].head(1)


def _family_label(family: str) -> str:
    return name_method("pretrained", family) if family == "post_pruning" else name_method(family, "fft")


@_styled
def accuracy_by_density(frame: pd.DataFrame) -> Figure:
    """Draw the mean accuracy against m, the part put back for each task.

    Args:
        frame: A frame made by `byom.table.numbers`.

    Returns:
        The figure; the open marker at "0" is the model nothing was put back into.
    """
    figure, axes = _figure(3.1)
    found = families(frame)
    look = looks(list(found))
    densities = sorted({m for rows in found.values() for m in rows["density"]})
    zero = _zero_place(densities)
    for name, rows in found.items():
        _errorbar(axes, 100 * rows["density"], rows, look[name], _family_label(name))
        _draw_start(axes, _start(frame, name), zero, 100 * rows["density"].iloc[0], look[name])
    _density_axis(axes, densities, zero)
    _reference(axes, frame, "single_task", "Single-task", 1.0)
    _reference(axes, frame, "pretrained", "Pre-trained", 0.0)
    axes.set_ylabel("Mean test accuracy (%)")
    _legend(figure, axes)
    return figure


def _figure(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(COLUMN, height), layout="constrained")
    return figure, figure.add_subplot()


def _zero_place(densities: Sequence[float]) -> float:
    return 100 * densities[0] / 2.6 if densities else 0.1


def _errorbar(axes: Axes, x: pd.Series, rows: pd.DataFrame, look: Look, label: str) -> None:
    spread = 100 * rows["mean_std"].fillna(0)
    axes.errorbar(x, 100 * rows["mean"], yerr=spread, capsize=1.8, elinewidth=0.7, label=label, **look.line)


def _draw_start(axes: Axes, row: pd.DataFrame, zero: float, first: float, look: Look) -> None:
    """Mark the model before anything is put back, and carry its level to where the curve begins."""
    for value in 100 * row["mean"]:
        axes.plot([zero, first], [value, value], color=look.color, linestyle="--", linewidth=0.6, zorder=1)
        axes.plot([zero], [value], color=look.color, marker=look.marker, markerfacecolor="white", zorder=3)


def _density_axis(axes: Axes, densities: Sequence[float], zero: float) -> None:
    axes.set_xscale("log")
    places = [zero, *(100 * m for m in densities)]
    names = ["0", *(percent(m) for m in densities)]
    axes.set_xticks(places, labels=names)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(zero / 1.35, places[-1] * 1.25)
    axes.set_xlabel("Put back for each task, m (% of parameters; 0: merged model alone)")


def _reference(axes: Axes, frame: pd.DataFrame, what: str, label: str, right: float) -> None:
    """Draw a labelled line across, and its label just above, at the left or right end."""
    for value in 100 * frame.loc[_kinds(frame) == what, "mean"].head(1):
        axes.axhline(value, color=LOOKS[what].color, linewidth=0.8, zorder=0)
        side = "right" if right else "left"
        spot = {"xytext": (-2 if right else 2, 2), "textcoords": "offset points", "ha": side, "va": "bottom"}
        axes.annotate(label, (right, value), xycoords=("axes fraction", "data"), fontsize=7, **spot)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, columnspacing=1.2, borderpad=0.1)


@_styled
def accuracy_by_size(frame: pd.DataFrame) -> Figure:
    """Draw the mean accuracy against the bytes stored for all tasks together.

    Args:
        frame: A frame made by `byom.table.numbers`.

    Returns:
        The figure; open markers are merged models alone, the light line is the Pareto front.
    """
    figure, axes = _figure(3.1)
    found = families(frame)
    look = looks([*found, *frame["merge"].unique()])
    for name, rows in found.items():
        _errorbar(axes, rows["bytes"] / 1e6, rows, look[name], _family_label(name))
    _draw_front(axes, frame)
    shared = frame[_kinds(frame).isin(["pretrained", "merged"])]
    _label_shared(axes, shared, look)
    _label_single(axes, frame)
    _size_axis(axes, frame["bytes"] / 1e6)
    axes.set_ylabel("Mean test accuracy (%)")
    _legend(figure, axes)
    return figure


def pareto_front(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the rows that no other row beats in both bytes and mean accuracy, smallest first."""
    ordered = frame.sort_values(["bytes", "mean"], ascending=[True, False])
    before = ordered["mean"].cummax().shift(fill_value=-np.inf)
    return ordered[ordered["mean"] > before]


def _draw_front(axes: Axes, frame: pd.DataFrame) -> None:
    front = pareto_front(frame)
    shade = {"color": "#d9d9d9", "linewidth": 4, "solid_capstyle": "round", "solid_joinstyle": "round"}
    axes.plot(front["bytes"] / 1e6, 100 * front["mean"], zorder=0, label="Pareto front", **shade)


def _label_shared(axes: Axes, rows: pd.DataFrame, look: dict[str, Look]) -> None:
    """Mark the models without anything put back, their names to the left, moved apart where they meet."""
    ordered = rows.sort_values("mean")
    heights = spread_out(100 * ordered["mean"].to_numpy(), 3.2)
    for height, (_, row) in zip(heights, ordered.iterrows(), strict=True):
        here, style = (row["bytes"] / 1e6, 100 * row["mean"]), look[row["merge"]]
        axes.plot(*here, color=style.color, marker=style.marker, markerfacecolor="white", zorder=3)
        axes.annotate(row["method"], here, (here[0] * 0.93, height), ha="right", va="center", fontsize=7)


def spread_out(values: np.ndarray, gap: float) -> np.ndarray:
    """Move ascending values apart until neighbours are `gap` away, and keep their mean."""
    steps = np.arange(len(values)) * gap
    moved = np.maximum.accumulate(values - steps) + steps
    return moved - (moved - values).mean()


def _label_single(axes: Axes, frame: pd.DataFrame) -> None:
    for _, row in frame[frame["variant"] == "single_task"].head(1).iterrows():
        here, style = (row["bytes"] / 1e6, 100 * row["mean"]), LOOKS["single_task"]
        axes.plot(*here, color=style.color, marker=style.marker, markersize=7)
        spot = {"xytext": (3, -6), "textcoords": "offset points", "ha": "right", "va": "top", "fontsize": 7}
        axes.annotate("Single-task", here, **spot)


def _size_axis(axes: Axes, sizes: pd.Series) -> None:
    axes.set_xscale("log")
    axes.set_xlim(sizes.min() / 2.1, sizes.max() * 1.15)
    axes.xaxis.set_major_locator(FixedLocator(_round_sizes(sizes.min(), sizes.max())))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("Stored for all tasks (MB)")


def _round_sizes(low: float, high: float) -> list[float]:
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    return [d * 10.0**e for e in decades for d in (1, 2, 5) if 0.95 * low <= d * 10.0**e <= 1.05 * high]


@_styled
def accuracy_by_task(frame: pd.DataFrame) -> Figure:
    """Draw the accuracy on each task of the rows that tell the story.

    Args:
        frame: A frame made by `byom.table.numbers`.

    Returns:
        The figure: one line a task, one marker a row of `selected`.
    """
    tasks = task_names(frame)
    figure, axes = _figure(1.2 + 0.24 * (len(tasks) + 1))
    places = [*range(len(tasks)), len(tasks) + 0.4]
    axes.hlines(places, 0, 1, transform=axes.get_yaxis_transform(), color="#e4e4e4", linewidth=0.7, zorder=0)
    for place, (name, row) in enumerate(selected(frame).items()):
        values = [100 * row[f"accuracy_{task}"] for task in tasks] + [100 * row["mean"]]
        style = TASK_LOOKS[place]
        axes.plot(values, places, **{**style.line, "linestyle": "none"}, label=name)
    axes.axhline(len(tasks) - 0.3, color="black", linewidth=0.5)
    axes.set_yticks(places, labels=[*(task.replace("_", " ") for task in tasks), "Mean"])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(places[-1] + 0.6, -0.6)
    axes.set_xlabel("Test accuracy (%)")
    _legend(figure, axes)
    return figure


TASK_LOOKS = (
    Look("#8a8a8a", "v", fill=False), Look("#e69f00", "D"), Look("#6e6e6e", "s", fill=False),
    Look("#14306b", "o"), Look("#000000", "|"),
)  # fmt: skip


def selected(frame: pd.DataFrame) -> dict[str, pd.Series]:
    """Pick the rows of the figure by task; what is best is decided on validation data.

    Args:
        frame: A frame made by `byom.table.numbers`.

    Returns:
        Up to five rows by name: pre-trained, best merged model, post-pruning and BYOM-FFT on that merge at the
        density nearest 10 %, single-task.
    """
    kinds = _kinds(frame)
    merged = frame[kinds == "merged"].nlargest(1, "validation")
    fft = frame[kinds == "fft"]
    same = fft[fft["merge"].isin(merged["merge"])]
    picks = [frame[kinds == "pretrained"], merged, _typical(frame[kinds == "post_pruning"])]
    picks += [_typical(same if len(same) else fft), frame[kinds == "single_task"]]
    found = [rows.iloc[0] for rows in picks if len(rows)]
    return {_row_label(row): row for row in found}


def _typical(rows: pd.DataFrame) -> pd.DataFrame:
    nearest = (rows["density"] - TYPICAL_DENSITY).abs()
    return rows[nearest == nearest.min()].nlargest(1, "validation")


def _row_label(row: pd.Series) -> str:
    return row["method"] + ("" if np.isnan(row["density"]) else f", {percent(row['density'])} %")


FIGURES = {
    "accuracy-by-density": accuracy_by_density,
    "accuracy-by-size": accuracy_by_size,
    "accuracy-by-task": accuracy_by_task,
}


def save_all(frame: pd.DataFrame, folder: Path, stem: str) -> list[Path]:
    """Draw every figure the rows allow and write each as PNG and PDF.

    Args:
        frame: A frame made by `byom.table.numbers`.
        folder: Where the files go.
        stem: What their names begin with.

    Returns:
        The paths written; the figures against density and size need a row with a density.
    """
    names = FIGURES if len(families(frame)) else ["accuracy-by-task"]
    return [path for name in names for path in save(FIGURES[name](frame), folder / f"{stem}--{name}")]


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write a figure as PNG (200 dpi) and PDF, the same bytes for the same figure.

    Args:
        figure: The figure.
        stem: The path without its ending.

    Returns:
        The two paths.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    return [_save(figure, stem, *ending) for ending in (("png", "Software"), ("pdf", "CreationDate"))]


def _save(figure: Figure, stem: Path, ending: str, stamp: str) -> Path:
    path = stem.with_name(f"{stem.name}.{ending}")
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    with mpl.rc_context(STYLE):
        figure.savefig(fresh, format=ending, metadata={stamp: None})
    fresh.replace(path)
    return path
