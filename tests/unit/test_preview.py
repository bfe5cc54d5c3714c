"""Weightings, Pareto sets and agreement against slow oracles, and what a preview refuses and says."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import comb, fsum

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from byom.cli import config
from byom.errors import OptionError
from byom.functional.pareto import agreement, hypervolume, rank_correlation, unbeaten
from byom.functional.simplex import _grained, simplex, spread, trained
from byom.merge.average import Average
from byom.merge.hessian_weighted import HessianWeighted
from byom.merge.mtl import JointFineTuning
from byom.merge.ties import Ties
from byom.pipeline.preview import Preview, require_known, require_weighable, summary
from byom.report.preview import agreement_table, best_table, text
from byom.storage.place import Place
from byom.storage.preview import accuracies
from tests.unit.synthetic_previews import TASKS, record

# integers, so that ties are frequent and sums exact
SCORES = st.integers(1, 3).flatmap(
    lambda tasks: arrays.arrays(float, st.tuples(st.integers(1, 7), st.just(tasks)), elements=st.integers(0, 4))
)


def corners(tasks):
    return [tuple(float(t == one) for t in range(tasks)) for one in range(tasks)]


# weightings


@pytest.mark.parametrize(("tasks", "steps"), [(1, 4), (2, 1), (2, 20), (3, 6), (4, 3), (5, 2)])
def test_the_lattice_is_every_multiple_of_a_step(tasks, steps):
    whole = [counts for counts in product(range(steps + 1), repeat=tasks) if sum(counts) == steps]
    found = simplex(tasks, steps)
    assert found == [tuple(n / steps for n in counts) for counts in whole]
    assert len(found) == len(set(found)) == comb(steps + tasks - 1, tasks - 1)


def test_a_lattice_without_end_is_refused_before_it_is_made():
    with pytest.raises(OptionError, match="steps=20 over 8 tasks are 888,030 weightings; use fewer steps"):
        simplex(8, 20)


@pytest.mark.parametrize("tasks", [2, 4, 8])
def test_a_sample_holds_corners_centre_and_middles(tasks):
    found = spread(tasks, 50)
    assert found[: tasks + 1] == [*corners(tasks), (1 / tasks,) * tasks]
    for a, b in product(range(tasks), repeat=2):
        middle = tuple(0.5 * (t == a) + 0.5 * (t == b) for t in range(tasks))
        assert middle in found
    assert len(found) == len(set(found)) >= tasks + 50
    assert all(fsum(point) == pytest.approx(1, abs=1e-12) and min(point) >= 0 for point in found)


def test_a_sample_is_uniform_and_the_same_each_time():
    drawn = np.array(spread(4, 4000)[11:])
    # of a uniform point on a simplex of four corners, the first moments are 1/4 and the second 1/10
    np.testing.assert_allclose(drawn.mean(0), 0.25, atol=0.01)
    np.testing.assert_allclose((drawn**2).mean(0), 0.1, atol=0.01)
    np.testing.assert_allclose(1000 * drawn, np.round(1000 * drawn), atol=1e-9)
    assert spread(4, 30) == spread(4, 30) != spread(4, 30, seed=1)
    assert spread(4, 30) == spread(4, 60)[: len(spread(4, 30))]


def test_the_largest_remainders_of_a_drawn_weighting_round_up():
    for shares, rounded in (([1.75, 1.25, 997], [2, 1, 997]), ([0.5, 0.75, 998.75], [0, 1, 999])):
        assert _grained(np.array(shares) / 1000) == rounded


def test_trained_points_begin_at_the_centre_and_near_the_corners():
    third, sixth = 1 / 3, 1 / 6
    assert trained(3, 4) == [
        (third, third, third),
        (2 / 3, sixth, sixth),
        (sixth, 2 / 3, sixth),
        (sixth, sixth, 2 / 3),
    ]
    assert trained(2, 5) == [(0.5, 0.5), (0.75, 0.25), (0.25, 0.75), (0.875, 0.125), (0.125, 0.875)]
    assert trained(2, 0) == []


@pytest.mark.parametrize("tasks", [2, 3, 8])
@pytest.mark.parametrize("count", [1, 5, 40])
def test_as_many_points_are_trained_as_asked_and_none_on_one_task_alone(tasks, count):
    found = trained(tasks, count)
    assert len(found) == len(set(found)) == count
    assert all(max(point) < 1 for point in found)
    assert found == trained(tasks, 40)[:count] or count > 1 + 2 * tasks


def test_trained_points_of_a_matching_lattice_are_points_of_it():
    assert set(trained(3, 4)) <= set(simplex(3, 6))
    assert set(trained(2, 5)) <= set(simplex(2, 8))


# Pareto sets


@given(SCORES)
def test_the_pareto_set_is_what_no_point_beats(scores):
    def beats(a, b):
        return all(x >= y for x, y in zip(a, b, strict=True)) and any(x > y for x, y in zip(a, b, strict=True))

    expected = [not any(beats(other, one) for other in scores) for one in scores]
    assert unbeaten(scores).tolist() == expected
    assert any(expected)


@given(SCORES)
def test_the_volume_is_that_of_the_union_of_boxes(scores):
    cells = product(range(4), repeat=scores.shape[1])  # unit cells, by their lower corner
    expected = sum(any(all(c < s for c, s in zip(cell, one, strict=True)) for one in scores) for cell in cells)
    assert hypervolume(scores) == expected


def test_volumes_by_hand():
    assert hypervolume(np.array([[1.0, 0.5], [0.5, 1.0]])) == 0.75
    assert hypervolume(np.ones((2, 3))) == 1.0
    assert hypervolume(np.empty((0, 3))) == 0.0


# agreement


@given(st.integers(3, 8).flatmap(lambda n: arrays.arrays(float, (2, n), elements=st.integers(0, 5))))
def test_rank_correlation_is_the_correlation_of_mean_ranks(pair):
    left, right = (pd.Series(row).rank() for row in pair)
    found = rank_correlation(*pair)
    if left.nunique() == 1 or right.nunique() == 1:
        assert found is None
    else:
        assert found == pytest.approx(float(np.corrcoef(left, right)[0, 1]), abs=1e-12)


def test_two_points_have_no_rank_correlation():
    assert rank_correlation(np.array([0.1, 0.2]), np.array([0.3, 0.4])) is None
    assert rank_correlation(np.array([1.0, 2, 3]), np.array([9.0, 5, 1])) == -1.0


@given(st.integers(1, 5).flatmap(lambda n: arrays.arrays(float, (2, n, 3), elements=st.floats(0, 1))))
def test_agreement_against_loops(pair):
    previewed, truth = pair
    found, count = agreement(previewed, truth), len(truth)
    gaps = [[p - t for p, t in zip(*rows, strict=True)] for rows in zip(previewed, truth, strict=True)]
    means = [[sum(row) / 3 for row in side] for side in (previewed.tolist(), truth.tolist())]
    assert found.points == count
    assert found.difference == pytest.approx([sum(abs(g[t]) for g in gaps) / count for t in range(3)], abs=1e-12)
    assert found.bias == pytest.approx([sum(g[t] for g in gaps) / count for t in range(3)], abs=1e-12)
    off = [abs(a - b) for a, b in zip(*means, strict=True)]
    assert found.mean_difference == pytest.approx(sum(off) / count, abs=1e-12)
    assert 0 <= found.regret <= max(means[1]) - min(means[1]) + 1e-12


def test_a_perfect_preview_agrees_and_a_shifted_one_still_ranks():
    truth = np.array([[0.9, 0.2], [0.5, 0.7], [0.2, 0.8]])
    perfect, shifted = agreement(truth, truth), agreement(truth - 0.1, truth)
    assert perfect.difference == (0, 0) and perfect.mean_difference == 0
    assert perfect.rank == shifted.rank == (1.0, 1.0)
    assert shifted.difference == pytest.approx((0.1, 0.1)) and shifted.bias == pytest.approx((-0.1, -0.1))
    assert perfect.regret == shifted.regret == 0
    assert agreement(truth[::-1], truth).rank == (-1.0, -1.0)


def test_regret_is_what_trusting_the_preview_costs():
    truth = np.array([[0.5, 0.5], [0.9, 0.5], [0.1, 0.5]])
    previewed = np.array([[0.8, 0.8], [0.7, 0.8], [0.1, 0.1]])
    assert agreement(previewed, truth).regret == pytest.approx(0.2)


# options


def test_defaults_are_those_of_the_configuration():
    resolved = config.resolve([], "preview").values
    assert Preview.of(resolved) == Preview()


@pytest.mark.parametrize(("tasks", "count"), [(2, 21), (3, 45), (4, 4 + 1 + 6 + 64), (8, 8 + 1 + 28 + 64)])
def test_default_grids(tasks, count):
    assert len(Preview().grid(tasks)) == count
    assert Preview(steps=2).grid(tasks) == simplex(tasks, 2)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"steps": 0}, "steps=0"),
        ({"steps": "a"}, "steps=a"),
        ({"points": -1}, "points=-1"),
        ({"joint": -1}, "joint=-1"),
        ({"components": 0}, "components=0"),
        ({"examples": 0}, "examples=0"),
        ({"methods": ()}, "previews nothing"),
    ],
)
def test_options_out_of_range_are_refused(options, said):
    with pytest.raises(OptionError, match=said):
        Preview(**options)


def test_one_name_needs_no_brackets():
    assert Preview(tasks="mnist", methods="average") == Preview(tasks=("mnist",), methods=("average",))  # pyright: ignore


def test_tasks_keep_the_order_of_the_suite_and_unknown_ones_are_refused():
    suite = config.option("suite", "vision8_offline")
    chosen = Preview(tasks=("chess", "mnist")).narrowed(suite)
    assert [task.name for task in chosen.tasks] == ["mnist", "chess"]
    assert Preview().narrowed(suite) == suite
    with pytest.raises(OptionError, match="no task 'ches'; did you mean 'chess'"):
        Preview(tasks=("mnist", "ches")).narrowed(suite)
    with pytest.raises(OptionError, match="two tasks or more"):
        Preview(tasks=("mnist",)).narrowed(suite)


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("step=3", "knows no 'step'; did you mean 'steps'"),
        ("byom=fft", "knows no 'byom'"),
        ("tune=validation", "knows no 'tune'"),
        ("-m", "knows no '-m'"),
        ("merge=ties", r"write methods=\[ties\]"),
        ("merge.weights=[1,2]", "goes through all weights"),
    ],
)
def test_what_a_preview_would_ignore_is_refused(argument, said):
    with pytest.raises(OptionError, match=said):
        require_known(["suite=vision8_offline", argument])
    require_known(["tasks=[mnist,chess]", "~suite.tasks.digits", "+suite.skip_missing=true", "merge.prior=0"])


def test_only_methods_with_task_weights_are_previewed():
    for method in (Average(), HessianWeighted()):
        require_weighable("it", method)
    for method in (Ties(), JointFineTuning()):
        with pytest.raises(OptionError, match="it cannot be previewed"):
            require_weighable("it", method)


# what is said


def test_the_summary_is_of_the_points():
    made = record(3, joint=4)
    for name, said in made.summary["validation"].items():
        rows = made.points[name]
        scores = accuracies(rows, "validation")
        assert scores.shape == (len(rows), 3)
        assert said.best == int(np.argmax(scores.mean(1)))
        assert said.pareto == tuple(np.flatnonzero(unbeaten(scores)))
        assert said.hypervolume == hypervolume(scores)
        same = [row for point in made.joint for row in rows if row.weights == point.weights]
        expected = agreement(accuracies(same, "validation"), accuracies(made.joint, "validation"))
        assert said.agreement.difference == expected.difference
    assert record(3, joint=0).summary["validation"]["average"].agreement is None
    many = record(8).summary["validation"]["average"]
    assert many.hypervolume is None


def test_a_joint_point_that_was_not_previewed_is_an_error():
    made = record(2)
    with pytest.raises(KeyError):
        summary({"average": made.points["average"][:1]}, made.joint, "validation")


def test_the_table_shows_the_best_weights_and_what_they_reach():
    made = record(2, joint=3)
    table = best_table(made, "validation", "validation").set_index("Model")
    assert list(table.index) == [*made.titles.values(), "Jointly fine-tuned", "Single-task", "Pre-trained"]
    best = made.points["average"][made.summary["validation"]["average"].best]
    assert table.loc["Average", "Weights (%)"] == " ".join(f"{100 * w:.0f}" for w in best.weights)
    assert table.loc["Average", TASKS[0]] == f"{100 * best.accuracy['validation'][0]:.1f}"
    assert table.loc["Average", "Mean"] == f"{100 * np.mean(best.accuracy['validation']):.1f}"
    assert table.loc["Single-task", "Relative"] == "100.0"
    assert table.loc["Average", "Pareto"].endswith(f"of {len(made.points['average'])}")


def test_weights_chosen_on_validation_are_shown_on_test():
    made = record(2, splits=("validation", "test"))
    assert "accuracy in % on test data, weights chosen on validation data" in text(made)
    best = made.points["mixture"][made.summary["validation"]["mixture"].best]
    table = best_table(made, "validation", "test").set_index("Model")
    assert table.loc["Mixture of Gaussians", TASKS[0]] == f"{100 * best.accuracy['test'][0]:.1f}"


def test_weights_of_joint_fine_tuning_are_chosen_on_validation_too():
    made = record(2, joint=2, splits=("validation", "test"))
    first, second = (
        replace(row, accuracy={"validation": (high, high), "test": (1 - high, 1 - high)})
        for row, high in zip(made.joint, (0.4, 0.7), strict=True)
    )
    table = best_table(replace(made, joint=(first, second)), "validation", "test").set_index("Model")
    assert table.loc["Jointly fine-tuned", "Weights (%)"] == " ".join(f"{100 * w:.0f}" for w in second.weights)
    assert table.loc["Jointly fine-tuned", "Mean"] == "30.0"


def test_the_agreement_is_shown_in_points():
    made = record(2, joint=3)
    row = agreement_table(made, "validation").set_index("Preview").loc["Average"]
    found = made.summary["validation"]["average"].agreement
    assert row[TASKS[1]] == f"{100 * found.difference[1]:.1f} ({found.rank[1]:+.2f})"
    assert row["Regret"] == f"{100 * found.regret:.1f}"
    two = agreement_table(record(2, joint=2), "validation")
    assert two[TASKS[0]].str.endswith("(—)").all()
    assert "jointly fine-tuned models" not in text(record(2, joint=0))


@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_the_text_fits_a_terminal(tasks):
    assert max(map(len, text(record(tasks, joint=4)).splitlines())) <= 160


def test_records_of_previews_lie_beside_those_of_runs(tmp_path):
    from byom.pipeline.preview import PreviewPlace

    place = PreviewPlace(tmp_path, "suite", "vit", "a+b", "0123")
    assert place.done == tmp_path / "previews" / "suite" / "vit" / "a+b--0123.json"
    assert replace(place, label="c").failed == tmp_path / "previews" / "suite" / "vit" / "c--0123.failed.json"
    assert Place(tmp_path, "suite", "vit", "a+b", "0123").done != place.done
