"""MagMax: golden vectors, one task, what dominates, and ties."""

from itertools import permutations

import pytest
import torch
from torch.testing import assert_close

from byom.merge.magmax import MagMax, largest
from byom.merge.task_arithmetic import TaskArithmetic
from tests.problems import grid, models, problem

VECTORS = torch.tensor([[3, -1, 0.5, 0.125, -4], [1, 2, -0.5, 0.25, -2], [-6, 1, 0.5, -0.375, 1]])


def test_golden_vectors():
    assert largest(VECTORS).tolist() == [-6, 2, 0.5, -0.375, -4]


@pytest.mark.parametrize("order", list(permutations(range(3))))
@pytest.mark.parametrize("sign", [1, -1])
def test_golden_vectors_in_any_order_and_either_sign(order, sign):
    assert largest(sign * VECTORS[list(order)]).tolist() == [sign * x for x in (-6, 2, 0.5, -0.375, -4)]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([2, -2], 0), ([2, 2], 2), ([-2, 2, -2], -2), ([1, -2, 2, 1], 0), ([0, 0], 0), ([0.1, 0.1, 0.1], 0.1)],
    ids=str,
)
def test_equal_magnitudes_take_their_majority_and_the_very_value(values, expected):
    assert largest(torch.tensor(values, dtype=torch.float64)[:, None]).tolist() == [expected]


def test_disjoint_tasks_add_up():
    base, finetuned = models(2, torch.float64, values=grid)
    for index, state in enumerate(finetuned.values()):
        for name in ("layer.weight", "layer.bias"):
            part = torch.arange(base[name].numel()).reshape(base[name].shape) % 2 == index
            state[name] = torch.where(part, state[name], base[name])
    given = problem(base, finetuned)
    for name in ("layer.weight", "layer.bias"):
        assert_close(MagMax(0.5)(given)[name], TaskArithmetic(0.5)(given)[name], rtol=0, atol=0)


def test_one_task_at_scale_1_is_that_task():
    base, finetuned = models(1, torch.float64, values=grid)
    merged = MagMax(1.0)(problem(base, finetuned))
    assert_close(merged["embed"], finetuned["task1"]["embed"], rtol=0, atol=0)


def test_the_result_is_no_larger_than_the_largest_change():
    deltas = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0))
    assert torch.equal(largest(deltas).abs(), deltas.abs().max(0).values)
    assert (largest(deltas) == deltas).any(0).all()
