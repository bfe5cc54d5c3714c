"""Directions that only rounding has are no directions: singular Grams, and stacks of task vectors without full rank."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from byom.functional.linalg import weighted_solve, without_rounding
from byom.functional.means import precision_mean
from byom.merge.awd import AdaptiveWeightDisentanglement as Awd
from byom.merge.base import Problem
from byom.merge.core_space import CoreSpace
from byom.merge.iso_c import IsotropicMergingCommon as IsoC
from byom.merge.iso_cts import IsotropicMergingCommonTaskSpecific as IsoCts
from byom.merge.knots import KnowledgeOrientationThroughSvd as Knots
from byom.merge.model_stock import ModelStock
from byom.merge.regmean import RegMean, regression_mean
from byom.merge.tsv import TaskSingularVectors as Tsv
from byom.merge.wudi import Wudi
from byom.weights import Weights

N = 48
FP32 = torch.finfo(torch.float32).eps


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(tasks: int, rows: int, mean: float = 0.0, sizes=None):
    """Return inputs ``[T, rows, N]`` of few examples, or features of very different sizes."""
    return (normal(tasks, rows, N, seed=1) + mean) * (1 if sizes is None else sizes)


def grams(x):
    return x.mT @ x / x.shape[1]


SIZES = torch.logspace(-3, 2, N, dtype=torch.float64)


@pytest.mark.parametrize("ridge", [0.0, 1e-6])
@pytest.mark.parametrize(
    ("tasks", "rows", "mean", "sizes"), [(2, 6, 0.0, None), (3, 10, 0.0, None), (2, 6, 30.0, None), (2, 6, 0.0, SIZES)]
)
def test_grams_of_few_examples_give_the_regression_where_there_are_inputs_and_the_mean_elsewhere(
    tasks, rows, mean, sizes, ridge
):
    matrices, x = normal(tasks, 40, N), inputs(tasks, rows, mean, sizes)
    found = regression_mean("w", matrices.float(), grams(x).float(), 1.0, ridge)
    left_over = torch.linalg.svd(x.flatten(0, 1))[2][tasks * rows :]
    assert_close(found @ left_over.T, matrices.mean(0) @ left_over.T, atol=4e-3 if mean else 1e-4, rtol=0)
    exact = regression_mean("w", matrices, grams(x), 1.0, ridge)
    assert torch.linalg.matrix_norm(found) < 1.01 * torch.linalg.matrix_norm(exact) + 0.1
    if sizes is None:
        assert_close(found, exact, atol=2e-2 if mean else 2e-3, rtol=0)


def test_a_merge_of_singular_grams_in_a_file_stays_a_merge():
    matrices, x = normal(2, 40, N).float(), inputs(2, 6)
    experts = {str(t): Weights.of({"w": matrix}) for t, matrix in enumerate(matrices)}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        given = {str(t): Weights.of({"w": gram.to(dtype)}) for t, gram in enumerate(grams(x))}
        problem = Problem(Weights.of({"w": torch.zeros(40, N)}), experts, {"gram": given})
        for ridge in (0.0, 1e-6):
            merged = RegMean(off_diagonal=1.0, ridge=ridge)(problem)["w"]
            assert torch.linalg.matrix_norm(merged) < 1.5 * torch.linalg.matrix_norm(matrices[0]), (dtype, ridge)


@pytest.mark.parametrize("off_diagonal", [0.0, 0.1, 0.9, 0.95, 0.999])
def test_shrunk_grams_have_every_direction_and_are_solved_as_they_are(off_diagonal):
    matrices, x = normal(3, 8, N), inputs(3, 6, 5.0, SIZES)
    x[..., 7] = 0  # a feature that no input has
    shrunk = [off_diagonal * g.double() + (1 - off_diagonal) * g.double().diagonal().diag() for g in grams(x).float()]
    same = weighted_solve(iter(shrunk), matrices, 1e-6)
    assert torch.equal(weighted_solve(iter(shrunk), matrices, 1e-6, FP32), same)


def test_a_gram_of_full_rank_is_not_touched_and_a_zero_gram_has_no_direction():
    right, full = normal(3, N), grams(inputs(1, 4 * N))[0]
    assert without_rounding(full, right, FP32)[0] is full
    assert not without_rounding(torch.zeros_like(full), right, FP32)[0].any()
    one = torch.ones(N, N, dtype=torch.float64)
    cut, moved = without_rounding(one, right, FP32)
    assert_close(cut, one)
    assert_close(moved, right.mean(1, keepdim=True).expand(3, N))


def stack(kind: str, tasks: int = 3) -> list[torch.Tensor]:
    """Return task vectors whose directions are few: equal, of rank 1, rounded, opposite, or none at all."""
    first, second = normal(12, 1, seed=2) @ normal(1, 9, seed=3), normal(12, 9, seed=4)
    made = {
        "equal": [second] * tasks,
        "rank 1": [first * (t + 1) for t in range(tasks)],
        "rounded": [first + 1e-8 * normal(12, 9, seed=t) for t in range(tasks)],
        "opposite": [first, -first, first],
        "one is zero": [first, torch.zeros_like(first), second],
        "all are zero": [torch.zeros_like(first)] * tasks,
    }
    return [delta.float() for delta in made[kind]]


METHODS = {
    "tsv": Tsv(), "iso_c": IsoC(), "iso_cts": IsoCts(), "knots": Knots(), "core": CoreSpace(),
    "wudi": Wudi(solver="closed_form"), "model_stock": ModelStock(), "awd": Awd(),
}  # fmt: skip


@pytest.mark.parametrize("kind", ["equal", "rank 1", "rounded", "opposite", "one is zero", "all are zero"])
@pytest.mark.parametrize("name", METHODS)
def test_task_vectors_without_full_rank_are_merged_into_nothing_larger_than_they_are(name, kind):
    deltas, base = stack(kind), normal(12, 9, seed=9).float()
    experts = {str(t): Weights.of({"layer.weight": base + delta}) for t, delta in enumerate(deltas)}
    merged = METHODS[name](Problem(Weights.of({"layer.weight": base}), experts))["layer.weight"]
    moved = torch.linalg.matrix_norm(merged - base)
    scale = max(1.0, getattr(METHODS[name], "scale", 1.0))
    assert merged.isfinite().all()
    assert moved <= 1.1 * scale * sum(float(torch.linalg.matrix_norm(delta)) for delta in deltas) + 1e-5


@pytest.mark.parametrize("least", [0.0, 1e-45, 1e-38])
def test_fisher_weights_of_almost_nothing_stay_weights(least):
    deltas = torch.tensor([[1.0, -2.0, 3.0], [4.0, 5.0, 6.0]])
    merged = precision_mean(deltas, torch.tensor([[least, 1.0, 0.0], [least, 0.0, least]]), [0.5, 0.5])
    assert merged.isfinite().all() and merged.abs().max() <= 6 and merged[1] == -2
