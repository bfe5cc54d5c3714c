"""The figure of accuracy against bytes per task: curves by kilobytes, all other rows named, labels moved apart."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure

from byom.cli.why import _row
from byom.report import bootstrap
from byom.report.bootstrap import mean_interval
from byom.report.figures import bytes as by_bytes
from byom.report.figures import suite as figures
from byom.report.figures.bytes import accuracy_by_bytes, curves
from byom.report.figures.labels import Label, place
from byom.report.frame import csv
from byom.storage.parts import TaskScore
from tests.unit import synthetic_runs as synthetic
from tests.unit.test_figures import curves as drawn
from tests.unit.test_figures import numbers, on_page, words

BUDGETS = (50.0, 250.0, 3000.0)
TASKS = len(synthetic.TASKS)
MODEL = 4 * synthetic.SIZE


def stored(one: dict, each: float, shared: int = 0) -> dict:
    """Return a record that stores so many bytes for each task, and so many for all beside one model."""
    one["storage"] |= {"task_bytes": dict.fromkeys(synthetic.TASKS, int(each)), "bytes": MODEL + shared + TASKS * each}
    return one


def budget(kilobytes: float, seed: int = 0, inputs: str = "none") -> dict:
    """Return a record of a variant that was asked for kilobytes and took a little less."""
    one = stored(synthetic.record("ties", "fft", seed, 0.01 * kilobytes**0.4), 990 * kilobytes)
    one["choices"]["byom"], one["hyperparameters"]["byom"] = "budget", {"kilobytes": kilobytes, "inputs": inputs}
    one["signature"] = f"{inputs}{kilobytes}-{seed}"
    return one | {"titles": {"merge": "TIES", "byom": "BYOM-Budget", "router": ""}}


def other(name: str, kilobytes: float, density: float = 0.05, shared: int = 0) -> dict:
    """Return a record of any other variant that stores something for each task."""
    one = stored(synthetic.record("pretrained", "fft", 0, density), 1000 * kilobytes, shared)
    one["choices"]["byom"], one["hyperparameters"]["byom"], one["signature"] = name, {}, name
    return one | {"titles": {"merge": "Pre-trained", "byom": name.title(), "router": ""}}


def sweep(*others: dict, seeds: tuple[int, ...] = (0,)) -> list[dict]:
    plain = [("pretrained", "none"), ("pretrained", "single_task"), ("ties", "none")]
    cells = [(k, i) for k in BUDGETS for i in ("none", "train")]
    made = [synthetic.record(*cell, seed) for cell in plain for seed in seeds]
    return [*made, *(budget(k, seed, i) for k, i in cells for seed in seeds), *others]


CROWD = [other(f"neighbour {n}", 240 + 8 * n, 0.05 + 0.001 * n) for n in range(6)]


def test_labels_say_kilobytes_and_what_else_differs():
    table = synthetic.tables(sweep())
    names = [row.label for row in table.rows if row.variant == "budget"]
    assert names[:2] == ["BYOM-Budget on TIES (inputs none), 50 kB", "BYOM-Budget on TIES (inputs none), 250 kB"]
    assert names[-1] == "BYOM-Budget on TIES (inputs train), 3000 kB"
    assert [_row(table, row.named) for row in table.rows] == table.rows
    few = synthetic.tables([budget(50.0), budget(90.5)]).rows
    assert [row.label for row in few] == ["BYOM-Budget on TIES, 50 kB", "BYOM-Budget on TIES, 90.5 kB"]


def test_rows_that_differ_in_kilobytes_alone_are_a_curve():
    frame = numbers(sweep())
    found = curves(frame)
    assert list(found) == ["BYOM-Budget on TIES (inputs none)", "BYOM-Budget on TIES (inputs train)"]
    for part in found.values():
        np.testing.assert_allclose(part["task_bytes"], [990 * k for k in BUDGETS])
    assert {"along", "task_bytes", "test_lower"}.isdisjoint(csv(frame).splitlines()[0].split(","))
    assert curves(numbers([one for one in sweep() if one["hyperparameters"]["byom"].get("kilobytes") != 250.0])) == {}


def test_what_tasks_share_beside_one_model_is_divided_among_them():
    row = numbers(sweep(other("twin", 10, shared=MODEL))).set_index("method").loc["Twin"]
    assert row["task_bytes"] == 10_000 + MODEL / TASKS


def test_the_figure_plots_the_frame_with_names_and_levels():
    frame = numbers(sweep(other("sparse", 500)))
    figure = accuracy_by_bytes(frame)
    for name, (x, y) in drawn(figure).items():
        np.testing.assert_allclose(x, curves(frame)[name]["task_bytes"])
        np.testing.assert_allclose(y, 100 * curves(frame)[name]["mean"])
    named = {"Sparse", "Single-task", "TIES, one model for all tasks", "50 kB", "1 MB"}
    assert named <= set(words(figure))
    lines = [np.asarray(line.get_xydata(), float) for line in figure.axes[0].lines]
    levels = {round(line[0, 1], 6) for line in lines if line[:, 0].tolist() == [0, 1]}
    assert levels == {round(100 * v, 6) for v in frame.set_index("method")["mean"][["Single-task", "TIES"]]}


def bars(figure: Figure, name: str) -> np.ndarray:
    every = [c for c in figure.axes[0].containers if isinstance(c, ErrorbarContainer)]
    held = next(c for c in every if c.get_label() == name)
    return np.array([bar[:, 1] for bar in held.lines[2][0].get_segments()]) / 100


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_bars_are_the_interval_of_one_seed_and_the_deviation_of_several(seeds):
    frame = numbers(sweep(seeds=seeds))
    name, part = next(iter(curves(frame).items()))
    low = part["mean"] - part["mean_std"] if len(seeds) > 1 else part["test_lower"]
    high = part["mean"] + part["mean_std"] if len(seeds) > 1 else part["test_upper"]
    np.testing.assert_allclose(bars(accuracy_by_bytes(frame), name), np.stack([low, high], axis=1))
    assert np.all(np.array([low, part["mean"]]) < np.array([part["mean"], high]))


def test_a_row_far_below_is_an_arrow_with_its_accuracy():
    frame = numbers(sweep(other("poor", 100, 1e-6)))
    frame.loc[frame["method"] == "Poor", ["mean", "test_lower", "test_upper"]] = 0.123, 0.1, 0.15
    figure = accuracy_by_bytes(frame)
    assert "Poor: 12.3" in words(figure) and figure.axes[0].get_ylim()[0] > 30


def test_no_text_overlaps_or_leaves_the_page():
    figure = accuracy_by_bytes(numbers(sweep(*CROWD)))
    boxes = [(text.get_text(), text.get_window_extent()) for text in on_page(figure)]
    assert {f"Neighbour {n}" for n in range(6)} <= {name for name, _ in boxes}
    assert not [n for n, box in boxes if box.x0 < -0.5 or box.y0 < -0.5 or box.x1 > figure.bbox.x1 + 0.5]
    assert not [(a, b) for (a, one), (b, two) in combinations(boxes, 2) if one.padded(-0.5).overlaps(two)]


def test_of_many_rows_the_best_have_names(monkeypatch):
    monkeypatch.setattr(by_bytes, "MOST", len(CROWD) - 1)
    shown = words(accuracy_by_bytes(numbers(sweep(*CROWD, other("worse", 900, 0.001)))))
    assert "Neighbour 0" in shown and "Worse" not in shown


def test_names_avoid_lines_where_there_is_room():
    figure = Figure(figsize=(3, 2))
    axes = figure.add_subplot()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    line = np.array([(0.0, 0.5), (1.0, 0.5)])
    place(figure, axes, [Label("a name", 0.5, 0.5)], [line])
    figure.draw_without_rendering()
    box = axes.texts[0].get_window_extent()
    height = axes.transData.transform(line)[0, 1]
    assert height < box.y0 or height > box.y1


def test_the_interval_of_a_mean_score(monkeypatch):
    right = TaskScore("accuracy", 0.5, 400, "f0" * 50)
    low, high = mean_interval([{"a": right}])
    np.testing.assert_allclose((low, high), (0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025), atol=0.004)
    assert mean_interval([{"a": right, "b": right}])[0] > low
    monkeypatch.setattr(bootstrap, "RESAMPLES", 20)  # correlations are computed again on each
    same = TaskScore("matthews", 1.0, 30, predictions=(0.0, 1.0, 1.0) * 10, labels=(0.0, 1.0, 1.0) * 10)
    assert mean_interval([{"a": same}]) == pytest.approx((1.0, 1.0))


@pytest.mark.parametrize("made", [sweep(), synthetic.records((0,))[:5]])
def test_a_report_has_the_figure_where_there_are_curves(made, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "save", lambda figure, stem: [stem])
    names = {path.name for path in figures.save_all(numbers(made), tmp_path, "s")}
    assert ("s--accuracy-by-bytes" in names) == (len(made) > 5)


@pytest.mark.parametrize("more", [[], sweep()])
def test_beside_it_no_front_is_drawn_of_those_with_a_density_alone(more, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "save", lambda figure, stem: [stem])
    dense = [one for one in synthetic.records((0,)) if not more or one["choices"]["byom"] == "fft"]
    names = {path.name for path in figures.save_all(numbers([*dense, *more]), tmp_path, "s")}
    assert "s--accuracy-by-density" in names
    assert ("s--accuracy-by-bytes" in names) == bool(more)
    assert ("s--accuracy-by-size" in names) == (not more)
