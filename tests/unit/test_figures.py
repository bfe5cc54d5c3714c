from __future__ import annotations

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from byom.report.figures import suite as figures
from byom.report.figures.style import LOOKS, SPARE, looks, spread_out
from tests.unit import synthetic_runs as synthetic


def numbers(made: list[dict]) -> pd.DataFrame:
    return synthetic.tables(made).frame


DRAWN = list(figures.FIGURES.values())


def two_settings() -> list[dict]:
    """Return a sweep with two densities of TIES."""
    made, other = (synthetic.records(seeds=(0,)) for _ in range(2))
    changed = [one for one in other if one["choices"]["merge"] == "ties"]
    for one in changed:
        one["hyperparameters"]["merge"]["density"] = 0.1
    return made + changed


SWEEP, ONE_SEED, TWO_SETTINGS = synthetic.records(), synthetic.records((0,)), two_settings()


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    return numbers(synthetic.records())


def texts(figure: Figure) -> list[Text]:
    figure.draw_without_rendering()
    found = [text for text in figure.findobj(Text) if isinstance(text, Text)]
    return [text for text in found if text.get_visible() and text.get_text().strip()]


def on_page(figure: Figure) -> list[Text]:
    """Return the texts that are drawn; ticks beyond the limits keep theirs."""
    shown, (axes,) = texts(figure), figure.axes
    beyond = [t.label1 for t in axes.xaxis.get_major_ticks() if not _within(t.get_loc(), axes.get_xlim())]
    beyond += [t.label1 for t in axes.yaxis.get_major_ticks() if not _within(t.get_loc(), axes.get_ylim())]
    return [text for text in shown if text not in beyond]


def _within(value: float, limits: tuple[float, float]) -> bool:
    return min(limits) <= value <= max(limits)


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in on_page(figure)]


def curves(figure: Figure) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    handles, names = figure.axes[0].get_legend_handles_labels()
    lines = [handle[0] if isinstance(handle, tuple) else handle for handle in handles]
    pairs = zip(names, lines, strict=True)
    return {name: (np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)) for name, line in pairs}


@pytest.mark.slow
@pytest.mark.parametrize("draw", DRAWN)
@pytest.mark.parametrize("rows", [SWEEP, ONE_SEED, TWO_SETTINGS])
def test_no_text_overlaps_or_leaves_the_page(draw, rows):
    figure = draw(numbers(rows))
    boxes = [(text.get_text(), text.get_window_extent()) for text in on_page(figure)]
    page = figure.bbox
    assert not [name for name, box in boxes if box.x0 < -0.5 or box.y0 < -0.5 or box.x1 > page.x1 + 0.5]
    assert not [(a, b) for (a, one), (b, two) in combinations(boxes, 2) if one.padded(-0.5).overlaps(two)]


@pytest.mark.parametrize("draw", DRAWN)
def test_legend_stands_outside_the_data(draw, frame):
    figure = draw(frame)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert not legend.get_window_extent().overlaps(figure.axes[0].get_window_extent())


def test_density_figure_plots_the_frame(frame):
    found = curves(figures.accuracy_by_density(frame))
    assert set(found) == {
        "Post-Pruning",
        *(f"BYOM-FFT on {m}" for m in ("Averaging", "Task Arithmetic", "TIES")),
    }
    for name, (x, y) in found.items():
        expected = frame[frame["method"] == name]
        np.testing.assert_allclose(x, 100 * expected["density"])
        np.testing.assert_allclose(y, 100 * expected["mean"])


def test_density_figure_shows_spread_and_references(frame):
    figure = figures.accuracy_by_density(frame)
    axes = figure.axes[0]
    bars = next(c for c in axes.containers if c.get_label() == "BYOM-FFT on TIES").lines[2][0].get_segments()
    expected = frame[frame["method"] == "BYOM-FFT on TIES"]
    np.testing.assert_allclose([b[1, 1] - b[0, 1] for b in bars], 200 * expected["mean_std"])
    levels = {round(line.get_ydata()[0], 6) for line in axes.lines if list(line.get_xdata()) == [0, 1]}
    single = frame.set_index("method")["mean"][["Single-task", "Pre-trained"]]
    assert levels == {round(100 * value, 6) for value in single}
    assert {"Single-task", "Pre-trained", "0", "1", "20", "Mean test accuracy (%)"} <= set(words(figure))


def test_merged_models_stand_at_zero(frame):
    axes = figures.accuracy_by_density(frame).axes[0]
    zero = axes.get_xticks()[0]
    here = {round(line.get_ydata()[0], 6) for line in axes.lines if list(line.get_xdata()) == [zero]}
    named = frame.set_index("method")["mean"][["Pre-trained", "Averaging", "Task Arithmetic", "TIES"]]
    assert here == {round(100 * value, 6) for value in named}


def test_size_figure_plots_the_frame(frame):
    figure = figures.accuracy_by_size(frame)
    found = curves(figure)
    expected = frame[frame["method"] == "Post-Pruning"]
    np.testing.assert_allclose(found["Post-Pruning"][0], expected["bytes"] / 1e6)
    np.testing.assert_allclose(found["Post-Pruning"][1], 100 * expected["mean"])
    named = {
        "Single-task",
        "Pre-trained",
        "Averaging",
        "Task Arithmetic",
        "TIES",
        "1 %",
        "10 %",
        "Pareto front",
    }
    assert named | {"Stored for all tasks (MB)", "100", "200", "500"} <= set(words(figure))


def test_pareto_front():
    points = pd.DataFrame({"bytes": [1, 1, 2, 3, 4], "mean": [0.5, 0.6, 0.55, 0.8, 0.8]}, index=list("abcde"))
    assert list(figures.pareto_front(points).index) == ["b", "d"]
    near = pd.DataFrame({"bytes": [1.0, 1.01, 1.1], "mean": [0.5, 0.6, 0.7]}, index=list("abc"))
    assert list(figures.pareto_front(near).index) == ["b", "c"]


def test_task_figure_plots_the_frame(frame):
    found = curves(figures.accuracy_by_task(frame))
    names = ["Pre-trained", "TIES", "Post-Pruning, 10 %", "BYOM-FFT on TIES, 10 %", "Single-task"]
    assert list(found) == names
    row = frame[(frame["method"] == "BYOM-FFT on TIES") & (frame["density"] == 0.1)].iloc[0]
    values = [row[f"accuracy_{task}"] for task in synthetic.TASKS] + [row["mean"]]
    np.testing.assert_allclose(found["BYOM-FFT on TIES, 10 %"][0], 100 * np.array(values))


def test_best_merge_is_chosen_on_validation(frame):
    other = frame.copy()
    other.loc[other["method"] == "Averaging", "validation"] = 1.0
    assert "BYOM-FFT on Averaging, 10 %" in figures.selected(other)


def test_without_validation_the_last_merge_stands_in(frame):
    assert "TIES" in figures.selected(frame.assign(validation=np.nan))


def test_two_settings_of_one_merge_are_two_curves():
    found = curves(figures.accuracy_by_density(numbers(TWO_SETTINGS)))
    assert {"BYOM-FFT on TIES (density 0.1)", "BYOM-FFT on TIES (density 0.2)"} <= set(found)


def test_looks_are_apart_in_colour_and_marker():
    every = [*LOOKS.values(), *SPARE]
    assert len({look.color for look in every}) == len({look.marker for look in every}) == len(every)
    given = looks({"TIES (density 0.1)": "ties", "TIES (density 0.2)": "ties", "New": "new"})
    assert len(set(given.values())) == 3


def test_spread_out_keeps_order_mean_and_gap():
    moved = spread_out(np.array([1.0, 1.1, 1.2, 9.0]), 0.5)
    assert np.diff(moved).min() >= 0.5 - 1e-12
    np.testing.assert_allclose(moved, [0.6, 1.1, 1.6, 9.0])


def test_without_densities_only_the_task_figure_is_drawn(tmp_path):
    merged = [r for r in synthetic.records() if r["choices"]["byom"] in ("none", "single_task")]
    files = figures.save_all(numbers(merged), tmp_path, "s")
    assert [path.name for path in files] == ["s--accuracy-by-task.png", "s--accuracy-by-task.pdf"]


@pytest.mark.slow
def test_files_are_the_same_each_time(tmp_path, frame):
    one, two = (figures.save_all(frame, tmp_path / name, "s") for name in "ab")
    assert [path.suffix for path in one] == [".png", ".pdf"] * 3
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_more_methods_than_can_be_told_apart_are_drawn_by_task_alone(tmp_path, frame, monkeypatch):
    monkeypatch.setattr(figures, "MOST", frame["method"].nunique() - 1)
    assert [path.stem for path in figures.save_all(frame, tmp_path, "s")] == ["s--accuracy-by-task"] * 2


def row_wise(density: float, seed: int = 0) -> dict:
    """Return a record of a variant that no file of the report names."""
    one = synthetic.record("ties", "fft", seed, density)
    one["choices"]["byom"], one["signature"] = "row_wise", f"row{density}"
    return one | {"titles": {"merge": "TIES", "byom": "Row-wise", "router": ""}}


def test_a_new_variant_with_densities_is_a_curve_with_a_look_of_its_own():
    made = numbers([*ONE_SEED, *(row_wise(m) for m in (0.01, 0.1))])
    for draw in (figures.accuracy_by_density, figures.accuracy_by_size):
        found = curves(draw(made))
        assert {"Row-wise on TIES", "BYOM-FFT on TIES"} <= set(found)
    look = figures._looks(made)
    assert look["BYOM-FFT on TIES"] == look["TIES"] == LOOKS["ties"] != look["Row-wise on TIES"]
    assert look["BYOM-FFT on TIES"] == figures._looks(numbers(ONE_SEED))["BYOM-FFT on TIES"]


def test_a_merge_method_is_found_by_its_row_and_not_by_its_label():
    made = numbers(
        [one | {"titles": {"merge": "Sum on Top", "byom": "FFT"}} for one in (row_wise(0.01), row_wise(0.1))]
    )
    assert set(made["base"]) == {"Sum on Top"} and set(made["method"]) == {"FFT on Sum on Top"}


def test_what_stores_nothing_for_its_tasks_puts_no_density_back():
    one = row_wise(0.1)
    one["storage"]["task_parameters"] = dict.fromkeys(synthetic.TASKS, 0)
    assert "Row-wise on TIES" not in figures.families(numbers([*ONE_SEED, one]))
