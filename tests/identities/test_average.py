"""Identities of averaging with task weights (methods.md, section 24, simple merging)."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from torch.testing import assert_close

from byom.errors import OptionError
from byom.functional.deltas import total
from byom.merge.average import Average
from byom.merge.base import Problem
from byom.storage.signature import signature
from byom.weights import Weights
from tests.problems import BUFFERS, FLOATS, bits, models, problem

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def vertex(tasks, one):
    return tuple(float(task == one) for task in range(tasks))


def vectors(*experts):
    return Problem(
        Weights.of({"w": torch.zeros(len(experts[0]))}),
        {str(t): Weights.of({"w": torch.tensor(e)}) for t, e in enumerate(experts)},
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("one", [0, 1, 2])
def test_all_weight_on_one_task_gives_that_task(dtype, one):
    base, finetuned = models(3, dtype)
    merged = Average(vertex(3, one))(problem(base, finetuned))
    expected = list(finetuned.values())[one]
    for name in FLOATS:
        assert torch.equal(merged[name], expected[name])
    assert all(bits(merged[name]) == bits(base[name]) for name in BUFFERS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tasks", [1, 2, 5, 8])
def test_equal_weights_are_the_mean(tasks, dtype):
    held = problem(*models(tasks, dtype))
    uniform, weighted = Average()(held), Average((0.7,) * tasks)(held)
    for name in FLOATS:
        assert_close(weighted[name], uniform[name])


def test_without_weights_nothing_has_changed():
    held = problem(*models(5))
    for name in FLOATS:
        stacked = torch.stack([expert[name] for expert in held.finetuned.values()])
        assert bits(Average()(held)[name]) == bits(total(stacked) / 5)
    assert signature(Average()) == signature(Average(())) == signature(Average(weights=[]))
    assert [field.name for field in fields(Average)] == ["weights"]


def test_golden_by_hand():
    held = vectors([4.0, -8.0, 0.0], [0.0, 8.0, 2.0])
    assert Average((0.25, 0.75))(held)["w"].tolist() == [1.0, 4.0, 1.5]
    assert Average((1, 3))(held)["w"].tolist() == [1.0, 4.0, 1.5]


def test_only_ratios_matter():
    held = problem(*models(3))
    one, other = Average((0.2, 0.3, 0.5))(held), Average((2.0, 3.0, 5.0))(held)
    for name in FLOATS:
        assert_close(one[name], other[name])


def test_it_minimises_the_weighted_squared_distance():
    held, alpha = vectors([1.0, 5.0], [-2.0, 3.0], [0.5, 0.0]), torch.tensor([0.5, 0.2, 0.3])
    point = Average(tuple(alpha.tolist()))(held)["w"].clone().requires_grad_()
    loss = sum(a * (point - w["w"]).square().sum() for a, w in zip(alpha, held.finetuned.values(), strict=True))
    loss.backward()
    assert point.grad is not None
    assert_close(point.grad, torch.zeros(2))


def test_tasks_and_weights_permute_together():
    base, finetuned = models(3, torch.float64)
    merged = Average((0.2, 0.3, 0.5))(problem(base, finetuned))
    turned = Average((0.5, 0.3, 0.2))(problem(base, dict(reversed(finetuned.items()))))
    for name in FLOATS:
        assert_close(turned[name], merged[name])


def test_golden_a_task_of_negative_weight_is_moved_away_from():
    held = vectors([4.0, -8.0, 0.0], [0.0, 8.0, 2.0])
    assert Average((1.5, -0.5))(held)["w"].tolist() == [6.0, -16.0, -1.0]
    assert Average((3, -1))(held)["w"].tolist() == [6.0, -16.0, -1.0]


@pytest.mark.parametrize("weights", [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan")), "12", 1.0])
def test_what_is_no_list_of_finite_numbers_is_refused(weights):
    with pytest.raises(OptionError, match=r"merge\.weights=.* is not a list of finite numbers"):
        Average(weights)


@pytest.mark.parametrize("weights", [(0.5, -0.6), (0.0, 0.0), (0,), (-1.0,), (0.1, 0.2, -0.3), (1e308, 1e308)])
def test_weights_without_a_positive_sum_are_refused(weights):
    with pytest.raises(OptionError, match=r"merge\.weights=.* have no positive, finite sum"):
        Average(weights)


@pytest.mark.parametrize("weights", [(1.0,), (0.2, 0.3, 0.5)])
def test_a_wrong_number_of_weights_is_refused(weights):
    with pytest.raises(OptionError, match=f"merge.weights has {len(weights)} values for 2 tasks"):
        Average(weights)(vectors([1.0], [2.0]))["w"]
