"""Our averages against published ones, method by method."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from byom.report.figures.style import COLUMN, Look, legend, styled

if TYPE_CHECKING:
    from byom.report.published import Pair, Published

ROW = 0.16  # inches per method
THEIRS, OURS = Look("#6e6e6e", "s", fill=False), Look("#14306b", "o")


@styled
def ours_against_published(compared: Sequence[tuple[Published, Sequence[Pair]]], marks: Sequence[str] = ()) -> Figure:
    """Draw the average of every published method, and ours where there is one.

    Args:
        compared: Published tables with their pairs; each has a part of its own.
        marks: What stands above everything, such as that these are not results.

    Returns:
        Methods from the lowest published average to the highest.
    """
    counts = [len(_names(table, pairs)) for table, pairs in compared]
    figure = Figure(figsize=(1.6 * COLUMN, 0.5 + sum(0.85 + ROW * n for n in counts)), layout="constrained")
    every = figure.subplots(len(compared), 1, squeeze=False, height_ratios=[n + 2 for n in counts])[:, 0]
    for axes, (table, pairs) in zip(every, compared, strict=True):
        _part(axes, table, sorted(pairs, key=lambda pair: pair.line.mean))
    figure.suptitle("\n".join(marks), fontweight="bold", fontsize=7.5)
    legend(figure, every[0])
    return figure


def _part(axes: Axes, table: Published, pairs: Sequence[Pair]) -> None:
    names = _names(table, pairs)
    places = np.array([names.index(table.name_of(pair.line)) for pair in pairs])
    theirs, ours = (np.array([of(pair) for pair in pairs]) for of in (lambda p: p.line.mean, lambda p: p.mean))
    joined = np.array([pair.line.mean + pair.gap for pair in pairs])  # only where the two can be subtracted
    axes.hlines(places, np.minimum(theirs, joined), np.maximum(theirs, joined), color="#bdbdbd", lw=0.9, zorder=1)
    for values, look, name in ((theirs, THEIRS, "published"), (ours, OURS, "ours")):
        axes.plot(values, places, label=name, **{**look.line, "linestyle": "none"})
    axes.set_yticks(range(len(names)), labels=names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(-0.8, len(names) - 0.2)
    axes.set_xlabel("Average over tasks (%)" if table.measure == "absolute" else "Normalised average over tasks (%)")
    lines = [f"{table.title}, {table.family}", "; ".join(_remarks(table, pairs))]
    axes.set_title("\n".join(filter(None, lines)), fontsize=7, loc="left")


def _names(table: Published, pairs: Sequence[Pair]) -> list[str]:
    """Return the source's names once each; several rows of ours may stand next to one."""
    return list(dict.fromkeys(table.name_of(pair.line) for pair in pairs))


def _remarks(table: Published, pairs: Sequence[Pair]) -> list[str]:
    remarks = [f"ours: {why}" for why in dict.fromkeys(pair.apart for pair in pairs if pair.apart)]
    return remarks + ["† not checked against the paper's PDF"] * table.dagger
