"""The look of figures, in print and in greyscale, and how they are saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import wraps
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from byom.storage.atomic import drafted

COLUMN = 3.5
# the width of a letter, of the axes
LETTER = 0.0185
# letters that fit in half a column next to a legend's handle
HALF_LINE = 27
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 7.5, "axes.labelsize": 7.5, "axes.spines.top": False,
    "axes.spines.right": False, "axes.linewidth": 0.6, "xtick.labelsize": 7, "ytick.labelsize": 7,
    "xtick.major.width": 0.6, "ytick.major.width": 0.6, "legend.fontsize": 7, "legend.frameon": False,
    "legend.handlelength": 3.2, "lines.linewidth": 1.2, "lines.markersize": 4.5, "pdf.fonttype": 42,
    "savefig.dpi": 200, "figure.dpi": 200, "axes.grid": False, "svg.hashsalt": "byom",
}  # fmt: skip


@dataclass(frozen=True)
class Look:
    """The look of one family of rows; colour, marker and dash each tell it apart alone."""

    color: str
    marker: str
    dash: str | tuple = "-"
    fill: bool = True

    @property
    def hollow(self) -> Look:
        """The same look, unfilled: nothing is put back."""
        return replace(self, fill=False)

    @property
    def line(self) -> dict:
        """Keyword arguments of ``Axes.plot`` and ``Axes.errorbar``."""
        face = self.color if self.fill else "white"
        return {"color": self.color, "marker": self.marker, "linestyle": self.dash, "markerfacecolor": face}


LOOKS = {
    "pretrained": Look("#8a8a8a", "v", fill=False),
    "single_task": Look("#000000", "*"),
    "post_pruning": Look("#6e6e6e", "s", (0, (1.2, 1.4)), fill=False),
    "average": Look("#e69f00", "D", (0, (3.5, 1.2, 1, 1.2))),
    "task_arithmetic": Look("#2a9fd6", "^", (0, (3, 1.3))),
    "ties": Look("#14306b", "o"),
}
# families without a look of their own take these in turn
SPARE = (
    Look("#c1272d", "P"), Look("#00735c", "X", (0, (3, 1.3))), Look("#d98cb3", "<", (0, (3.5, 1.2, 1, 1.2))),
    Look("#7a3e00", ">", (0, (1.2, 1.4))), Look("#9a7fd1", "h"), Look("#3f3f3f", "p", (0, (3, 1.3))),
)  # fmt: skip


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Return `draw` with the style of these figures around it, and matplotlib's own settings untouched."""

    @wraps(draw)
    def inside(*args: Any, **kwargs: Any) -> Figure:
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return inside


def looks(keys: Mapping[str, str]) -> dict[str, Look]:
    """Give each name a look of its own.

    Args:
        keys: For each name the merge method or kind of row whose look it takes, if it is the first to.

    Returns:
        One look per name, distinct as long as the spare ones last.
    """
    spare, taken, out = cycle(SPARE), set(), {}
    for name, key in keys.items():
        out[name] = LOOKS[key] if key in LOOKS and key not in taken else next(spare)
        taken.add(key)
    return out


def blank(height: float, entries: Iterable[str], width: float = COLUMN) -> tuple[Figure, Axes]:
    """Return an empty figure one print column wide.

    Args:
        height: Of everything but the legend, in inches.
        entries: Names in the legend, which stands below.
        width: Of all, in inches, where it is not one column.

    Returns:
        The figure and its axes.
    """
    names = list(entries)
    height += 0.16 * -(-len(names) // _columns(names))
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.add_subplot()


def _columns(names: Sequence[str]) -> int:
    return 2 if max(map(len, names), default=0) <= HALF_LINE else 1


def legend(figure: Figure, axes: Axes) -> None:
    """Draw the legend below the axes, outside the data."""
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=_columns(names), columnspacing=1.2, borderpad=0.1)


def spread_out(values: np.ndarray, gap: float) -> np.ndarray:
    """Move ascending values apart until neighbours are `gap` away, by the least squared distance."""
    steps = np.arange(len(values)) * gap
    blocks: list[list[float]] = []
    for value in values - steps:
        blocks.append([value])
        while len(blocks) > 1 and np.mean(blocks[-2]) > np.mean(blocks[-1]):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return np.concatenate([np.full(len(b), np.mean(b)) for b in blocks] or [steps]) + steps


def errorbar(axes: Axes, x: Any, rows: pd.DataFrame, look: Look, label: str) -> None:
    """Draw the mean accuracy of some rows, with bars of one deviation over seeds.

    Args:
        axes: The axes.
        x: One place per row.
        rows: Rows of a frame made by `byom.report.frame.numbers`.
        look: Their look.
        label: Their name in the legend.
    """
    spread = 100 * rows["mean_std"].fillna(0)
    axes.errorbar(x, 100 * rows["mean"], yerr=spread, capsize=1.8, elinewidth=0.7, label=label, **look.line)


def reference_line(axes: Axes, frame: pd.DataFrame, what: str, label: str, right: float) -> None:
    """Draw a labelled line across, and its label just above, at the left (0) or right (1) end.

    Args:
        axes: The axes.
        frame: A frame made by `byom.report.frame.numbers`; without such a row nothing is drawn.
        what: The kind of row whose mean accuracy it is.
        label: What it is called.
        right: The end.
    """
    for value in 100 * frame.loc[frame["kind"] == what, "mean"].head(1):
        axes.axhline(value, color=LOOKS[what].color, linewidth=0.8, zorder=0)
        side = "right" if right else "left"
        spot = {"xytext": (-2 if right else 2, 2), "textcoords": "offset points", "ha": side, "va": "bottom"}
        axes.annotate(label, (right, value), xycoords=("axes fraction", "data"), fontsize=7, **spot)


def size_axis(axes: Axes, sizes: Any, longest: int) -> None:
    """Make the axis logarithmic, with room on its left for the longest label.

    Args:
        axes: The axes.
        sizes: In MB.
        longest: Letters of the longest label.
    """
    axes.set_xscale("log")
    low, high, room = sizes.min(), sizes.max() * 1.15, min(0.5, 0.06 + LETTER * longest)
    axes.set_xlim(low * (high / low) ** (-room / (1 - room)), high)
    axes.xaxis.set_major_locator(FixedLocator(round_sizes(sizes.min(), sizes.max())))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("Stored for all tasks (MB)")


def round_sizes(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten from `low` to `high`."""
    decades = range(int(np.floor(np.log10(low))), int(np.ceil(np.log10(high))) + 1)
    return [d * 10.0**e for e in decades for d in (1, 2, 5) if 0.95 * low <= d * 10.0**e <= 1.05 * high]


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
    with mpl.rc_context(STYLE), drafted(path) as draft:
        figure.savefig(draft, format=ending, metadata={stamp: None})
    return path
