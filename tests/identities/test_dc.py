"""DC-Merge: its steps one by one, cases that need none of them, and what has too many tasks for its sides."""

import pytest
import torch
from torch.testing import assert_close

from byom.errors import OptionError
from byom.merge.dc import DirectionalConsistency
from tests.problems import one_tensor, random


def merged(method, deltas):
    return method(one_tensor(deltas))["w"] - 0.5


def literal(deltas, density):
    tasks, side = len(deltas), min(deltas.shape[1:])
    rank, cut = side // tasks, []
    for delta in deltas:
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        cut.append((u[:, :rank], s[:rank], v[:rank]))
    bases = []
    for parts in (torch.cat([c[0] for c in cut], 1), torch.cat([c[2] for c in cut])):
        p, _, q = torch.linalg.svd(parts, full_matrices=False)
        bases.append(p @ q)
    coordinates = []
    for u, s, v in cut:
        of_task = bases[0].T @ (u * s @ v) @ bases[1].T
        least = of_task.abs().flatten().topk(max(1, int(density * side * side))).values.min()
        coordinates.append(of_task * (of_task.abs() >= least))
    stack = torch.stack(coordinates)
    agree = (stack.sign() == stack.sum(0).sign()) & (stack != 0)
    mean = (stack * agree).sum(0) / agree.sum(0).clamp(min=1)
    blocks = torch.kron(torch.eye(tasks), torch.ones(rank, rank)).double()
    return bases[0] @ (mean * blocks) @ bases[1]


@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize(("tasks", "shape"), [(2, (8, 6)), (3, (6, 9)), (3, (9, 9))], ids=str)
def test_the_steps(tasks, shape, density):
    deltas = random(tasks, *shape)
    assert_close(merged(DirectionalConsistency(density), deltas), literal(deltas, density))


def test_golden():
    """Orthogonal tasks of one direction each do not meet: their largest coordinate is the task itself."""
    deltas = torch.zeros(2, 2, 2).double()
    deltas[0, 0, 0], deltas[1, 1, 1] = 3.0, -2.0
    assert_close(merged(DirectionalConsistency(), deltas), deltas.sum(0))
    assert_close(merged(DirectionalConsistency(scale=0.5), deltas), deltas.sum(0) / 2)


def test_one_task_is_its_own_where_everything_is_kept():
    delta = random(1, 6, 4)
    assert_close(merged(DirectionalConsistency(density=1.0), delta), delta[0])


def test_zero_task_vectors_take_no_part():
    assert not merged(DirectionalConsistency(), torch.zeros(3, 6, 5).double()).any()
    deltas = torch.zeros(2, 4, 4).double()
    deltas[0, 0, 0] = 3.0
    assert_close(merged(DirectionalConsistency(1.0), deltas), deltas[0])


def test_what_is_no_matrix_or_too_thin_is_averaged():
    vectors, thin = random(3, 5), random(4, 3, 9)
    assert_close(merged(DirectionalConsistency(), vectors), vectors.mean(0))
    assert_close(merged(DirectionalConsistency(), thin), thin.mean(0))
    assert DirectionalConsistency().simpler(one_tensor(thin)) == ["w"]
    assert DirectionalConsistency().simpler(one_tensor(random(3, 3, 9))) == []


def test_a_density_out_of_range_is_refused():
    with pytest.raises(OptionError, match="merge.density=1.2 is not a fraction"):
        DirectionalConsistency(density=1.2)
