"""Figures of a preview: curves for two tasks, triangles for three, parallel coordinates for more, and the agreement."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from byom.report.figures.style import COLUMN, Look, looks, save, styled
from byom.report.figures.triangle import HEIGHT, draw_triangle, places
from byom.report.preview import JOINT, OWN
from byom.storage.preview import PreviewRecord, Weighting, accuracies

PAGE = 2 * COLUMN
TRAINED = Look("#000000", "o")
ALONE = "Fine-tuned on one task"
BEST = "Best mean"
COLOURS = "cividis"  # its lightness rises all along, so that it survives greyscale
BEATEN: dict[str, Any] = {"color": "#b0b0b0", "linewidth": 0.7, "linestyle": ":"}
RING: dict[str, Any] = {"linestyle": "none", "marker": "o", "markersize": 9, "color": "#6e6e6e", "mfc": "none"}
STAR: dict[str, Any] = {"linestyle": "none", "marker": "*", "markersize": 8, "color": "white", "mec": "black"}


def save_all(record: PreviewRecord, path: Path) -> list[Path]:
    """Draw the figures of a preview and write each as PNG and PDF.

    Args:
        record: The preview's record.
        path: Its file, ``<results>/previews/<suite>/<backbone>/<name>.json``.

    Returns:
        The paths written, in ``<results>/figures``.
    """
    folder = path.parents[3] / "figures"
    stem = f"{record.suite}--{record.backbone}--preview--{path.stem}"
    drawn = {stem: preview(record)} | ({f"{stem}--agreement": agreement(record)} if record.joint else {})
    return [file for name, figure in drawn.items() for file in save(figure, folder / name)]


def preview(record: PreviewRecord) -> Figure:
    """Draw the accuracies over the weights, on the split that weights are chosen on."""
    return {2: curves, 3: triangles}.get(len(record.tasks), parallel)(record)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _percent(record: PreviewRecord, rows: Sequence[Weighting]) -> np.ndarray:
    return 100 * accuracies(rows, record.choosing)


def _weights(rows: Sequence[Weighting]) -> np.ndarray:
    return np.array([row.weights for row in rows])


def _looks(record: PreviewRecord) -> dict[str, Look]:
    titles = record.titles
    return dict(zip(titles, looks({title: name for name, title in titles.items()}).values(), strict=True))


def _legend(figure: Figure, axes: Axes, columns: int) -> None:
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=columns, columnspacing=1.2, borderpad=0.1)


# two tasks


@styled
def curves(record: PreviewRecord) -> Figure:
    """Draw both accuracies over the weight of the first task, and against each other.

    Args:
        record: The record of a preview of two tasks.

    Returns:
        The figure; rings mark the best mean of each method.
    """
    figure = Figure(figsize=(PAGE, 2.75), layout="constrained")
    one, two, plane = figure.subplots(1, 3)
    for name, look in _looks(record).items():
        _draw_curve(record, name, look, (one, two, plane))
    plane.plot([], [], label=BEST, **RING)
    for label, rows, look in _trained(record):
        _draw_points(_weights(rows)[:, 0], _percent(record, rows), label, look, (one, two, plane))
    tasks, split = [_words(task) for task in record.tasks], record.choosing
    for axes, task in ((one, tasks[0]), (two, tasks[1])):
        axes.set(xlabel=f"Weight of {tasks[0]}", ylabel=f"{task}: {split} accuracy (%)")
    plane.set(xlabel=f"{tasks[0]}: {split} accuracy (%)", ylabel=f"{tasks[1]}: {split} accuracy (%)")
    _legend(figure, plane, 3)
    return figure


def _trained(record: PreviewRecord) -> list[tuple[str, Sequence[Weighting], Look]]:
    """Return what was fine-tuned: jointly, and on one task alone, which is where all weight on it leads."""
    joint = [(JOINT, record.joint, TRAINED)] if record.joint else []
    return [*joint, (ALONE, record.experts, Look("#000000", "*", fill=False))]


def _draw_curve(record: PreviewRecord, name: str, look: Look, panels: Sequence[Axes]) -> None:
    rows = sorted(record.points[name], key=lambda row: row.weights)
    weight, (first, second) = _weights(rows)[:, 0], _percent(record, rows).T
    best = record.best(name, record.choosing)
    here = rows.index(best)
    for axes, x, y in zip(panels, (weight, weight, first), (first, second, second), strict=True):
        axes.plot(x, y, markersize=3, label=record.titles[name], **look.line)
        (ring,) = axes.plot(x[here], y[here], **RING)
        ring.set_color(look.color)


def _draw_points(weight: np.ndarray, scores: np.ndarray, label: str, look: Look, panels: Sequence[Axes]) -> None:
    first, second = scores.T
    style = look.line | {"linestyle": "none", "markersize": 7 if look.marker == "*" else 5}
    for axes, x, y in zip(panels, (weight, weight, first), (first, second, second), strict=True):
        axes.plot(x, y, label=label, zorder=4, **style)


# three tasks


@styled
def triangles(record: PreviewRecord) -> Figure:
    """Draw the mean and every task's accuracy as colour over the triangle of weights.

    Args:
        record: The record of a preview of three tasks.

    Returns:
        The figure: one row per method; discs have the colour of what joint fine-tuning reached at their place, so that
        a disc that vanishes was predicted.
    """
    methods, columns = list(record.points), ["Mean", *map(_words, record.tasks)]
    figure = Figure(figsize=(PAGE, 1.1 + 1.4 * len(methods)), layout="constrained")
    grid = figure.subplots(len(methods), len(columns), squeeze=False)
    for column, name in enumerate(columns):
        scale = _scale(record, column)
        for row, method in enumerate(methods):
            _draw_triangle(grid[row, column], record, method, column, scale)
        grid[0, column].set_title(name, fontsize=7.5)
        _colour_bar(figure, grid[:, column], scale, f"{record.choosing.capitalize()} accuracy (%)")
    for row, method in enumerate(methods):
        grid[row, 0].text(-0.3, HEIGHT / 2, record.titles[method], rotation=90, ha="center", va="center")
    _legend(figure, grid[0, 0], 3)
    return figure


def _column(record: PreviewRecord, rows: Sequence[Weighting], column: int) -> np.ndarray:
    """Return the mean accuracy for column 0, and a task's for the others."""
    scores = _percent(record, rows)
    return scores.mean(1) if column == 0 else scores[:, column - 1]


def _scale(record: PreviewRecord, column: int) -> ScalarMappable:
    every = [*record.points.values(), *([record.joint] if record.joint else [])]
    return _scale_of(np.concatenate([_column(record, rows, column) for rows in every]))


def _scale_of(values: np.ndarray, colours: str = COLOURS) -> ScalarMappable:
    low, high = values.min(), values.max()
    return ScalarMappable(Normalize(low, high if high > low else low + 1), colours)


def _draw_triangle(axes: Axes, record: PreviewRecord, method: str, column: int, scale: ScalarMappable) -> None:
    rows = record.points[method]
    draw_triangle(axes, _weights(rows), _column(record, rows, column), scale, [*map(_words, record.tasks)])
    _draw_discs(axes, record, column, scale)
    if column == 0:
        best = places(_weights(rows))[record.chosen[method].best]
        (star,) = axes.plot(*best, label=BEST, zorder=4, **STAR)
        star.set_markeredgewidth(0.6)


def _draw_discs(axes: Axes, record: PreviewRecord, column: int, scale: ScalarMappable) -> None:
    if record.joint:
        style = {"s": 40, "cmap": scale.cmap, "norm": scale.norm, "edgecolors": "white", "zorder": 3}
        values = _column(record, record.joint, column)
        axes.scatter(*places(_weights(record.joint)).T, c=values, **style)
        axes.plot([], [], linestyle="none", marker="o", markersize=6, color="#8a8a8a", label=JOINT)


def _colour_bar(figure: Figure, panels: Any, scale: ScalarMappable, label: str) -> None:
    bar = figure.colorbar(scale, ax=list(panels), orientation="horizontal", fraction=0.03, aspect=22, pad=0.01)
    bar.set_label(label, fontsize=6)
    bar.ax.tick_params(labelsize=6)


# four tasks or more


@styled
def parallel(record: PreviewRecord) -> Figure:
    """Draw every weighting as a line over the tasks, the Pareto set coloured by its mean.

    Args:
        record: The record of a preview of any number of tasks.

    Returns:
        The figure: a panel a method, with what was jointly fine-tuned in black.
    """
    methods = list(record.points)
    figure = Figure(figsize=(PAGE, 0.8 + 1.75 * len(methods)), layout="constrained")
    panels = figure.subplots(len(methods), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    fronts = {name: said.pareto for name, said in record.chosen.items()}
    means = np.concatenate([_column(record, record.points[name], 0)[list(front)] for name, front in fronts.items()])
    scale = _scale_of(means, f"{COLOURS}_r")  # on white the best lines must be the darkest
    for axes, method in zip(panels, methods, strict=True):
        _draw_lines(axes, record, method, scale)
        _draw_trained(axes, record)
        axes.set_title(record.titles[method], fontsize=7.5, loc="left")
        axes.set_ylabel(f"{record.choosing.capitalize()} accuracy (%)")
    panels[-1].set_xticks(range(len(record.tasks) + 1), labels=[*map(_words, record.tasks), "Mean"])
    bar = figure.colorbar(scale, ax=list(panels), aspect=40, pad=0.01)
    bar.set_label(f"Pareto set: mean {record.choosing} accuracy (%)")
    _legend(figure, panels[0], 4)
    return figure


def _draw_lines(axes: Axes, record: PreviewRecord, method: str, scale: ScalarMappable) -> None:
    """Draw beaten weightings in grey, the others on top of them in the order of their means, and the best."""
    said, lines = record.chosen[method], _with_mean(_percent(record, record.points[method]))
    for line in np.delete(lines, list(said.pareto), axis=0):
        axes.plot(line, zorder=1, **BEATEN)
    for line in sorted(lines[list(said.pareto)], key=lambda line: line[-1]):
        axes.plot(line, color=scale.to_rgba(line[-1]), linewidth=0.8, zorder=2)
    axes.plot([], [], label="Not in the Pareto set", **BEATEN)
    axes.plot(lines[said.best], color="#c1272d", linewidth=2, zorder=3, label=BEST)


def _draw_trained(axes: Axes, record: PreviewRecord) -> None:
    style = {"color": "black", "linestyle": (0, (2, 1.5)), "linewidth": 0.9, "zorder": 4}
    for place, line in enumerate(_with_mean(_percent(record, record.joint)) if record.joint else ()):
        axes.plot(line, label="_" if place else JOINT, **style)
    own = 100 * record.single_task(record.choosing)
    axes.plot(own, linestyle="none", color="black", marker="_", markersize=10, label=OWN, zorder=5)


def _with_mean(scores: np.ndarray) -> np.ndarray:
    return np.concatenate([scores, scores.mean(1, keepdims=True)], 1)


# any number of tasks


@styled
def agreement(record: PreviewRecord) -> Figure:
    """Draw by how much each preview missed what joint fine-tuning reached at the same weights, task by task.

    Args:
        record: The record of a preview with jointly fine-tuned points.

    Returns:
        The figure: a marker a method and weighting.
    """
    methods, names = _looks(record), [*map(_words, record.tasks), "Mean"]
    figure = Figure(figsize=(COLUMN, 0.9 + 0.36 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    truth = _with_mean(_percent(record, record.joint))
    for place, (name, look) in enumerate(methods.items()):
        gaps = _with_mean(_percent(record, _matching(record, name))) - truth
        rows = np.arange(len(names)) + 0.7 * ((place + 0.5) / len(methods) - 0.5)
        style = look.line | {"linestyle": "none", "markersize": 4}
        axes.plot(gaps.ravel(), np.tile(rows, len(gaps)), label=record.titles[name], **style)
    axes.axvline(0, color="black", linewidth=0.6, zorder=0)
    axes.hlines(np.arange(len(names)) - 0.5, 0, 1, transform=axes.get_yaxis_transform(), color="#e4e4e4", linewidth=0.6)
    axes.set_yticks(range(len(names)), labels=names)
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(f"Previewed less jointly fine-tuned\n{record.choosing} accuracy (points)")
    _legend(figure, axes, 2)
    return figure


def _matching(record: PreviewRecord, method: str) -> list[Weighting]:
    """Return the previews at the weights of the jointly fine-tuned points, in their order."""
    by_weights = {row.weights: row for row in record.points[method]}
    return [by_weights[row.weights] for row in record.joint]
