"""Consensus merging and TALL-masks: golden vectors, limits of agreement and of the mask scale, TIES inside."""

from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from byom.errors import OptionError
from byom.functional.deltas import tall_mask
from byom.merge.base import Problem
from byom.merge.consensus import ConsensusMerging, consensus
from byom.merge.task_arithmetic import TaskArithmetic
from byom.merge.ties import Ties
from byom.weights import Weights
from tests.problems import grid, models, problem, same

VECTORS = torch.tensor([[3, -1, 0.5, 0.125, -4], [1, 2, -0.5, 0.25, -2], [-6, 1, 0.5, -0.375, 1]])
UNIFIED = [-2, 2, 0.5, 0, -5]
INSIDE = ["sum", "ties"]


def golden(**fields):
    experts = {str(t): Weights.of({"w": vector}) for t, vector in enumerate(VECTORS)}
    return ConsensusMerging(**fields)(Problem(Weights.of({"w": torch.zeros(5)}), experts))["w"].tolist()


def test_golden_masks():
    unified = torch.tensor(UNIFIED)
    masks = torch.stack([tall_mask(vector, unified, 0.4) for vector in VECTORS])
    assert masks.int().tolist() == [[1, 0, 1, 1, 1], [0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert masks.sum(0).tolist() == [2, 2, 3, 3, 2]


def test_golden_consensus():
    assert golden(scale=1.0, agreement=2) == UNIFIED
    assert golden(scale=0.5, agreement=3) == [0, 0, 0.25, 0, 0]
    assert golden(scale=1.0, agreement=4) == [0] * 5


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("scale", [1.0, 0.3])
def test_no_agreement_asked_for_is_the_multi_task_vector(inside, scale):
    given = problem(*models(4, torch.float64, values=grid))
    merged = ConsensusMerging(0.4, 0, scale, inside)(given)
    expected = {"sum": TaskArithmetic(scale), "ties": Ties(0.2, scale, "sum")}[inside](given)
    for name in expected.mergeable():
        assert_close(merged[name], expected[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("inside", INSIDE)
@pytest.mark.parametrize("tasks", [1, 3])
def test_more_agreement_than_tasks_is_the_pretrained(inside, tasks):
    base, finetuned = models(tasks)
    merged = ConsensusMerging(agreement=tasks + 1, unified=inside)(problem(base, finetuned))
    assert same(merged, base)


def test_one_task_alone_is_its_own_consensus():
    base, finetuned = models(1, torch.float64, values=grid)
    merged = ConsensusMerging(0.4, 1, 1.0)(problem(base, finetuned))
    assert_close(merged["embed"], finetuned["task1"]["embed"], rtol=0, atol=0)


def test_masks_of_one_task_or_of_disjoint_ones_lose_nothing():
    assert torch.equal(VECTORS[0] * tall_mask(VECTORS[0], VECTORS[0], 0.4), VECTORS[0])
    disjoint = torch.diag(torch.tensor([1.0, 2, 3]))
    for vector in disjoint:
        assert torch.equal(disjoint.sum(0) * tall_mask(vector, disjoint.sum(0), 0.4), vector)


def test_masks_shrink_as_the_scale_grows():
    deltas = torch.randn(3, 1000, generator=torch.Generator().manual_seed(0))
    deltas[0, :10] = 0
    unified = deltas.sum(0)
    masks = [tall_mask(deltas[0], unified, scale) for scale in (0.0, 0.2, 0.4, 1.0, 5.0)]
    assert torch.equal(masks[0], deltas[0] != 0)
    for wider, narrower in pairwise(masks):
        assert (wider | ~narrower).all() and wider.sum() > narrower.sum()


def test_agreement_is_counted_by_the_definition():
    deltas = torch.randn(5, 200, generator=torch.Generator().manual_seed(1))
    unified = deltas.sum(0)
    for agreement in range(7):
        expected = [
            sum(abs(t) > 0.3 * abs(u - t) for t in column) >= agreement
            for column, u in zip(deltas.T.tolist(), unified.tolist(), strict=True)
        ]
        assert consensus(deltas, unified, 0.3, agreement).tolist() == expected


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"mask_scale": -0.1}, r"merge\.mask_scale=-0\.1"),
        ({"mask_scale": float("nan")}, r"merge\.mask_scale=nan"),
        ({"agreement": -1}, r"merge\.agreement=-1"),
        ({"agreement": 1.5}, r"merge\.agreement=1\.5"),
        ({"unified": "mean"}, "use sum or ties"),
        ({"density": 20}, r"merge\.density=20 is not a fraction"),
    ],
    ids=str,
)
def test_what_is_out_of_range_is_refused(values, said):
    with pytest.raises(OptionError, match=said):
        ConsensusMerging(**values)
