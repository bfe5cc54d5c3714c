"""Names beside their markers, where they hide the least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation

ANGLES = np.deg2rad(np.arange(0, 360, 22.5))
DISTANCES = (5.0, 9.0, 14.0, 20.0, 28.0, 38.0, 50.0)  # of a name from its marker, in points
FAR = 9.0  # from where on a thin line leads to the marker
MARGIN = 1.5  # around a name, in points
OUTSIDE, NAME, MARK = 40.0, 12.0, 3.0  # costs: off the axes, on a whole other name, on a point of a line or marker


@dataclass(frozen=True)
class Label:
    """A name and the point that it names, in data coordinates."""

    text: str
    x: float
    y: float


def place(figure: Figure, axes: Axes, labels: Sequence[Label], lines: Sequence[np.ndarray], **style: Any) -> None:
    """Write names beside their points, each where it covers the least of lines, markers and other names.

    Names are placed one after the other, those with the most neighbours first; none covers a text that the axes hold
    already where that can be helped. The limits of the axes must not change afterwards.

    Args:
        figure: The figure, complete but for the names.
        axes: The axes.
        labels: Names and points.
        lines: For each line that names should not cover its points, ``[N, 2]`` in data coordinates.
        style: Keyword arguments of ``Axes.annotate``.
    """
    figure.draw_without_rendering()  # which lays the axes out
    point = figure.dpi / 72
    to_points = axes.transData.transform
    spots = to_points([(one.x, one.y) for one in labels]) / point if labels else np.empty((0, 2))
    taken = np.concatenate([spots, *(_dense(to_points(line) / point) for line in lines)])
    frame = np.array(axes.get_window_extent().extents) / point
    boxes = [np.array(text.get_window_extent().extents) / point for text in axes.texts]
    for number in np.argsort([-_neighbours(spots, spot) for spot in spots], kind="stable"):
        label, spot = labels[number], spots[number]
        note = axes.annotate(label.text, (label.x, label.y), xytext=(0, 0), textcoords="offset points", **style)
        note.set_in_layout(False)
        box, distance, shift = _best(spot, _size(note) / point, taken, boxes, frame)
        note.set_position(shift)
        note.set_horizontalalignment("center")
        note.set_verticalalignment("center")
        boxes.append(box)
        if distance > FAR:
            end = np.clip(spot, box[:2], box[2:])
            taken = np.concatenate([taken, _dense(np.array([spot, end]))])
            away = axes.transData.inverted().transform(end * point)
            axes.plot([label.x, away[0]], [label.y, away[1]], color="#b0b0b0", linewidth=0.5, zorder=0.5)


def _size(note: Annotation) -> np.ndarray:
    extent = note.get_window_extent()
    return np.array([extent.width, extent.height])


def _best(
    spot: np.ndarray, size: np.ndarray, taken: np.ndarray, boxes: Sequence[np.ndarray], frame: np.ndarray
) -> tuple[np.ndarray, float, tuple[float, float]]:
    """Return the cheapest box, how far it is from its marker, and its centre relative to that, all in points."""
    best, found = np.inf, None
    for distance in DISTANCES:
        for angle in ANGLES:
            way = np.array([np.cos(angle), np.sin(angle)])
            shift = way * distance + np.sign(np.round(way, 6)) * np.minimum(1, 2 * np.abs(way)) * size / 2
            box = np.concatenate([spot + shift - size / 2, spot + shift + size / 2])
            cost = _cost(box, taken, boxes, frame) + distance / 6
            if cost < best:
                best, found = cost, (box, distance, (float(shift[0]), float(shift[1])))
    assert found is not None  # as a cost is finite
    return found


def _cost(box: np.ndarray, taken: np.ndarray, boxes: Sequence[np.ndarray], frame: np.ndarray) -> float:
    outside = np.maximum(frame[:2] - box[:2], 0).sum() + np.maximum(box[2:] - frame[2:], 0).sum()
    wide = box + MARGIN * np.array([-1, -1, 1, 1])
    hidden = ((taken > wide[:2]) & (taken < wide[2:])).all(axis=1).sum()
    area = np.prod(box[2:] - box[:2])
    shared = sum(np.maximum(np.minimum(wide[2:], o[2:]) - np.maximum(wide[:2], o[:2]), 0).prod() for o in boxes)
    return float(OUTSIDE * (outside > 0) + outside + MARK * hidden + NAME * shared / area)


def _neighbours(spots: np.ndarray, spot: np.ndarray) -> int:
    return int((np.abs(spots - spot) < (60, 20)).all(axis=1).sum())


def _dense(line: np.ndarray) -> np.ndarray:
    """Return points of a line at most 3 points apart, so that what covers the line covers one of them."""
    steps = [np.linspace(a, b, 2 + int(np.hypot(*(b - a)) / 3)) for a, b in pairwise(line)]
    return np.concatenate([line, *steps])
