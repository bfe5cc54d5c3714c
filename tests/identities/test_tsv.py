"""TSV-M: one task, orthogonal tasks, identical tasks, golden vectors, and the definition by plain LAPACK."""

import pytest
import torch
from torch.testing import assert_close

from byom.errors import OptionError
from byom.merge.base import Problem
from byom.merge.tsv import TaskSingularVectors, add_orthogonalised
from byom.weights import Weights

SHAPES = [(6, 4), (4, 6), (12, 12), (40, 24)]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(n, seed):
    return torch.linalg.qr(random(n, n, seed=seed))[0]


def merge(method, deltas, name="w"):
    """Return the merged change of one tensor, from task vectors ``[T, ...]`` on a pre-trained model of zeros."""
    experts = {str(t): Weights.of({name: delta}) for t, delta in enumerate(deltas)}
    return method(Problem(Weights.of({name: torch.zeros_like(deltas[0])}), experts))[name]


def truncation(matrix, rank):
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]


def by_definition(deltas):
    rank = min(deltas[0].shape) // len(deltas)
    pieces = [torch.linalg.svd(delta, full_matrices=False) for delta in deltas]
    left = torch.cat([piece[0][:, :rank] for piece in pieces], 1)
    right = torch.cat([piece[2][:rank] for piece in pieces])
    p, _, q = torch.linalg.svd(left, full_matrices=False)
    v, _, w = torch.linalg.svd(right, full_matrices=False)
    return p @ q @ torch.diag(torch.cat([piece[1][:rank] for piece in pieces])) @ v @ w


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tasks", [1, 2, 3, 4])
def test_the_definition(shape, tasks):
    deltas = random(tasks, *shape)
    assert_close(add_orthogonalised(deltas), by_definition(deltas), rtol=1e-6, atol=1e-6)


def test_golden_of_crossed_diagonals():
    deltas = torch.tensor([[[3.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 3.0]]])
    assert_close(merge(TaskSingularVectors(), deltas), 3 * torch.eye(2))


def test_golden_of_equal_left_directions():
    deltas = torch.tensor([[[2.0, 0.0], [0.0, 0.0]], [[0.0, 5.0], [0.0, 0.0]]])
    half = 0.5**0.5
    assert_close(merge(TaskSingularVectors(), deltas), torch.tensor([[2 * half, 5 * half], [0.0, 0.0]]))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_task_at_scale_1_is_that_task(shape, dtype):
    delta = random(1, *shape).to(dtype)
    assert_close(merge(TaskSingularVectors(), delta), delta[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_tasks_in_orthogonal_spaces_add_up(rank):
    left, right = rotation(12, 1), rotation(9, 2)
    cuts = [slice(t * rank, (t + 1) * rank) for t in range(3)]
    deltas = torch.stack([left[:, cut] @ random(rank, rank, seed=t) @ right[cut] for t, cut in enumerate(cuts)])
    assert_close(merge(TaskSingularVectors(), deltas), deltas.sum(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("tasks", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_identical_tasks_give_their_truncation(tasks, dtype):
    delta = random(40, 24).to(dtype)
    expected = truncation(delta.double(), 24 // tasks).to(dtype)
    assert_close(merge(TaskSingularVectors(), torch.stack([delta] * tasks)), expected, rtol=1e-5, atol=1e-5)


def test_tasks_that_differ_by_a_factor_give_a_truncation():
    delta = random(40, 24)
    found = merge(TaskSingularVectors(), torch.stack([delta, 3 * delta]))
    assert_close(found, 2 * truncation(delta, 12), rtol=1e-6, atol=1e-6)


def test_the_singular_values_of_tasks_are_those_of_the_result():
    deltas = random(3, 12, 9)
    kept = torch.cat([torch.linalg.svdvals(delta)[:3] for delta in deltas]).sort(descending=True).values
    assert_close(torch.linalg.svdvals(add_orthogonalised(deltas)), kept, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("idle", [0, 1, 2])
def test_an_idle_task_costs_its_share_of_the_rank_and_nothing_else(idle):
    delta = random(40, 24)
    deltas = torch.stack([delta if t == idle else torch.zeros_like(delta) for t in range(3)])
    assert_close(merge(TaskSingularVectors(), deltas), truncation(delta, 8), rtol=1e-6, atol=1e-6)


def test_a_task_of_low_rank_disturbs_no_other():
    left, right = rotation(12, 1), rotation(12, 2)
    one = left[:, :1] @ right[:1]
    other = left[:, 1:5] @ random(4, 4) @ right[1:5]
    assert_close(merge(TaskSingularVectors(), torch.stack([one, other])), one + other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", [(), (3,), (1, 4), (2, 3, 4), (2, 9)], ids=str)
def test_what_is_no_matrix_or_too_thin_takes_the_scaled_mean(shape):
    deltas = random(3, *shape)
    assert_close(merge(TaskSingularVectors(1.5), deltas), 1.5 * deltas.mean(0))


def test_an_excluded_matrix_takes_the_mean():
    deltas = random(2, 6, 4)
    assert_close(merge(TaskSingularVectors(), deltas, "model.text_projection.weight"), deltas.mean(0))
    assert_close(merge(TaskSingularVectors(exclude=()), deltas, "text_projection"), add_orthogonalised(deltas))


def test_thin_matrices_are_named():
    base = {
        "thin": torch.zeros(2, 9),
        "wide": torch.zeros(3, 9),
        "bias": torch.zeros(2),
        "text_projection": torch.eye(2),
    }
    experts = {str(t): Weights.of(base) for t in range(3)}
    assert TaskSingularVectors().fallbacks(Problem(Weights.of(base), experts)) == ["thin"]


def test_exclude_is_a_list():
    assert TaskSingularVectors(exclude=["a"]) == TaskSingularVectors(exclude=("a",))
    with pytest.raises(OptionError, match=r"merge\.exclude=text_projection is not a list"):
        TaskSingularVectors(exclude="text_projection")
