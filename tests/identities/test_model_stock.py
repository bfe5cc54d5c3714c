"""Model Stock: one expert, equal, orthogonal and opposite experts, golden ratios, and the point nearest the centre."""

import pytest
import torch
from torch.testing import assert_close

from byom.functional.deltas import inner_products
from byom.merge.base import Problem
from byom.merge.model_stock import ModelStock, interpolation
from byom.weights import Weights


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def merge(base, experts):
    finetuned = {str(t): Weights.of({"w": expert}) for t, expert in enumerate(experts)}
    return ModelStock()(Problem(Weights.of({"w": base}), finetuned))["w"]


def ratio(deltas):
    return interpolation(inner_products(torch.as_tensor(deltas, dtype=torch.float64)))


@pytest.mark.parametrize(
    ("deltas", "expected"),
    [
        ([[3, 4], [4, 3]], 48 / 49),
        ([[1, 0], [1, 1], [0, 1]], 2**0.5 / (1 + 2 * 2**0.5 / 3)),
        ([[1, 1, 0], [1, 0, 1]], 2 / 3),
        ([[2, 0], [0, 0]], 0),
        ([[5.0]], 1),
    ],
    ids=str,
)
def test_golden_ratios(deltas, expected):
    assert ratio(deltas) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (4, 5), (2, 3, 4)], ids=str)
@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_equal_experts_are_their_average(shape, tasks):
    base, expert = random(*shape), random(*shape, seed=1)
    assert_close(merge(base, [expert] * tasks), expert)


@pytest.mark.parametrize("tasks", [2, 3, 6])
def test_orthogonal_experts_give_the_pretrained(tasks):
    base = random(6, 6)
    changes = torch.eye(36, dtype=torch.float64).reshape(36, 6, 6)[:tasks]
    assert_close(merge(base, base + changes), base)


@pytest.mark.parametrize("signs", [(1, -1), (1, 1, -1), (1, 1, 1, -1, -1)], ids=str)
def test_a_scalar_on_which_experts_disagree_stays_bounded(signs):
    base = torch.tensor(100.0)
    merged = merge(base, [base + sign for sign in signs])
    assert 0 <= float(merged - base) <= 1


def test_a_larger_expert_does_not_change_the_ratio():
    deltas = random(3, 40) + 1
    assert ratio(deltas) == pytest.approx(ratio(deltas * torch.tensor([[1.0], [7.0], [0.01]])), rel=1e-12)


@pytest.mark.parametrize("tasks", [2, 3, 5])
def test_the_result_is_where_the_line_to_the_average_meets_the_experts_plane_at_a_right_angle(tasks):
    """The paper's geometry: every expert is the centre plus a deviation orthogonal to the centre and to the others."""
    centre, d = 3.0, tasks + 1
    changes = torch.zeros(tasks, d, dtype=torch.float64)
    changes[:, 0] = centre
    changes[range(tasks), range(1, tasks + 1)] = 2.0
    merged = merge(torch.zeros(d, dtype=torch.float64), changes)
    mean = changes.mean(0)
    target = torch.zeros(d, dtype=torch.float64)
    target[0] = centre
    foot = mean * (mean @ target) / (mean @ mean)
    assert_close(merged, foot)
