"""The figure of accuracy against the number of models: curves by size, from one merged model to every task's own."""

from __future__ import annotations

import numpy as np
import pytest

from byom.report.figures import suite as figures
from byom.report.figures.models import accuracy_by_models, curves
from byom.report.frame import csv
from tests.unit import synthetic_runs as synthetic
from tests.unit.test_figures import curves as drawn
from tests.unit.test_figures import numbers, on_page, words

SIZES = (1, 1.5, 2, 4, 8)


def sized(merge: str, size: float, seed: int, blocks: str = "module") -> dict:
    """Return a record of a variant that was asked for a size, and reached a little less."""
    one = synthetic.record(merge, "fft", seed, (size - 0.99) / 7.1)
    one["choices"]["byom"], one["hyperparameters"]["byom"] = "flex", {"size": size, "blocks": blocks}
    one["signature"] = f"{merge}{blocks}{size}-{seed}"
    one["storage"]["parameters"] = synthetic.SIZE * (size - 0.03 * (1 < size < 8))
    return one | {
        "titles": {"merge": {"ties": "TIES"}.get(merge, "Task Arithmetic"), "byom": "FlexMerge", "router": ""}
    }


def sweep(*others: dict, seeds: tuple[int, ...] = (0, 1)) -> list[dict]:
    plain = [("pretrained", "none"), ("pretrained", "single_task"), ("ties", "none"), ("task_arithmetic", "none")]
    made = [synthetic.record(*cell, seed) for cell in plain for seed in seeds]
    return [*made, *(sized(m, size, s) for m in ("ties", "task_arithmetic") for size in SIZES for s in seeds), *others]


def test_rows_that_differ_in_their_size_are_a_curve():
    frame = numbers(sweep())
    assert set(frame["method"]) >= {"FlexMerge on TIES (size 1.5)", "FlexMerge on TIES (size 8)", "TIES"}
    found = curves(frame)
    assert list(found) == ["FlexMerge on Task Arithmetic", "FlexMerge on TIES"]
    for part in found.values():
        np.testing.assert_allclose(part["models"], [1, 1.47, 1.97, 3.97, 8])
    assert {"models", "curve", "base"}.isdisjoint(csv(frame).splitlines()[0].split(","))


def test_curves_of_other_settings_are_told_apart_and_few_sizes_are_none():
    other = [sized("ties", size, 0, "layer") for size in SIZES[:3]]
    found = curves(numbers(sweep(*other, seeds=(0,))))
    assert list(found) == [
        "FlexMerge on Task Arithmetic",
        "FlexMerge on TIES (blocks layer)",
        "FlexMerge on TIES (blocks module)",
    ]
    few = [one for one in sweep() if one["hyperparameters"]["byom"].get("size") not in SIZES[2:]]
    assert curves(numbers(few)) == {}


def test_the_figure_plots_the_frame_and_both_ends():
    frame = numbers(sweep())
    figure = accuracy_by_models(frame)
    for name, (x, y) in drawn(figure).items():
        np.testing.assert_allclose(x, curves(frame)[name]["models"])
        np.testing.assert_allclose(y, 100 * curves(frame)[name]["mean"])
    points = {tuple(np.round(line.get_xydata()[0], 6)) for line in figure.axes[0].lines if len(line.get_xydata()) == 1}
    ends = frame.set_index("method")["mean"][["TIES", "Task Arithmetic", "Single-task"]]
    assert points == {(models, round(100 * mean, 6)) for models, mean in zip((1, 1, 8), ends, strict=True)}
    assert {"Single-task", "Pre-trained", "Size for all tasks (models' worth of parameters)", "8"} <= set(words(figure))


def test_no_text_leaves_the_page():
    figure = accuracy_by_models(numbers(sweep()))
    page = figure.bbox
    for box in (text.get_window_extent() for text in on_page(figure)):
        assert box.x0 >= -0.5 and box.y0 >= -0.5 and box.x1 <= page.x1 + 0.5


@pytest.mark.parametrize("made", [sweep(seeds=(0,)), synthetic.records((0,))[:5]])
def test_a_report_has_the_figure_where_there_are_curves(made, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "save", lambda figure, stem: [stem])
    names = {path.name for path in figures.save_all(numbers(made), tmp_path, "s")}
    assert ("s--accuracy-by-models" in names) == (len(made) > 5)
