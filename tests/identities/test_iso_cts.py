"""Iso-CTS: its share of directions, flat spectra, Iso-C as a limit, and the definition by plain LAPACK."""

import pytest
import torch
from torch.testing import assert_close

from byom.errors import OptionError
from byom.merge.base import Problem
from byom.merge.iso_c import IsotropicMergingCommon, isotropic
from byom.merge.iso_cts import IsotropicMergingCommonTaskSpecific, isotropic_with_own, own_directions
from byom.weights import Weights

SHAPES = [(12, 8), (8, 12), (16, 16)]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(n, seed):
    return torch.linalg.qr(random(n, n, seed=seed))[0]


def problem(deltas, name="w"):
    experts = {str(t): Weights.of({name: delta}) for t, delta in enumerate(deltas)}
    return Problem(Weights.of({name: torch.zeros_like(deltas[0])}), experts)


def merge(method, deltas, name="w"):
    """Return the merged change of one tensor, from task vectors ``[T, ...]`` on a pre-trained model of zeros."""
    return method(problem(deltas, name))[name]


def by_definition(deltas, share):
    rank, tasks = min(deltas[0].shape), len(deltas)
    shared = rank - share * tasks
    u, s, vt = torch.linalg.svd(deltas.sum(0), full_matrices=False)
    left, values, right = [], [], []
    for delta in deltas:
        a, b, c = torch.linalg.svd(delta - u[:, :shared] @ u[:, :shared].T @ delta, full_matrices=False)
        left.append(a[:, :share])
        values.append(b[:share])
        right.append(c[:share])
    a, _, b = torch.linalg.svd(torch.cat([*left, u[:, :shared]], 1), full_matrices=False)
    c, _, d = torch.linalg.svd(torch.cat([*right, vt[:shared]]), full_matrices=False)
    return torch.cat([*values, s[:shared]]).mean() * a @ b @ c @ d


@pytest.mark.parametrize(
    ("rank", "tasks", "common", "share"),
    [
        (768, 8, 0.8, 19),  # 614 common, round(154 / 8 = 19.25)
        (768, 20, 0.8, 8),  # round(7.7)
        (10, 4, 0.0, 2),  # 2.5 to even
        (14, 4, 0.0, 3),  # 3.5 to the even 4, which 14 directions cannot hold
        (5, 3, 0.0, 1),  # round(5 / 3) = 2 would need 6 directions
        (5, 8, 0.8, 0),
        (100, 1, 0.29, 71),  # 29 common, although 0.29 * 100 = 28.999999999999996
        (16, 3, 1.0, 0),
    ],
)
def test_each_tasks_share_of_directions_golden(rank, tasks, common, share):
    assert own_directions(rank, tasks, common) == share


@pytest.mark.parametrize("rank", ["numerical", "full"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("tasks", "share"), [(1, 3), (2, 1), (2, 4), (4, 2), (3, 0)])
def test_the_definition(shape, tasks, share, rank):
    deltas = random(tasks, *shape)
    found = isotropic_with_own(deltas, share, rank)
    assert_close(found, by_definition(deltas, share), rtol=1e-6, atol=1e-6)
    values = torch.linalg.svdvals(found)
    assert_close(values, values[:1].expand(min(shape)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rank", ["numerical", "full"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_with_everything_common_it_is_iso_c(shape, rank):
    deltas = random(3, *shape)
    ours = merge(IsotropicMergingCommonTaskSpecific(1.0, 1.0, rank), deltas)
    assert_close(ours, merge(IsotropicMergingCommon(1.0, rank), deltas))


def test_the_common_share_is_used():
    deltas = random(2, 16, 16)
    found = merge(IsotropicMergingCommonTaskSpecific(1.0, 0.5), deltas)
    assert_close(found, by_definition(deltas, 4), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", ["numerical", "full"])
def test_golden_of_one_task(rank):
    """The first direction is common, the second the task's own, and the mean of 3 and 1 is 2."""
    deltas = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])
    method = IsotropicMergingCommonTaskSpecific(1.0, 0.5, rank)
    assert_close(merge(method, deltas), 2 * torch.eye(2))


def test_identical_tasks_share_their_own_directions_once():
    delta = rotation(8, 1) * torch.arange(8.0, 0, -1).double() @ rotation(8, 2)
    left, _, right = torch.linalg.svd(delta)
    found = isotropic_with_own(torch.stack([delta, delta]), 2)
    level = (2 * (8 + 7 + 6 + 5) + 2 * (4 + 3)) / 8
    assert_close(found, level * left[:, :6] @ right[:6], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rank", ["numerical", "full"])
def test_no_change_at_all_stays_none(rank):
    assert not isotropic_with_own(torch.zeros(3, 12, 8), 2, rank).any()


def test_an_idle_task_adds_no_direction():
    delta = random(12, 8)
    found = isotropic_with_own(torch.stack([delta, torch.zeros_like(delta)]), 2)
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    assert_close(found, values[:6].mean() * left[:, :6] @ right[:6], rtol=1e-6, atol=1e-6)


def test_a_sum_that_cancels_leaves_each_tasks_own():
    left, right = rotation(12, 1), rotation(8, 2)
    delta = left[:, :2] @ random(2, 2) @ right[:2]
    found = isotropic_with_own(torch.stack([delta, -delta]), 2)
    assert found.isfinite().all()
    assert_close(left[:, :2] @ left[:, :2].T @ found, found)


@pytest.mark.parametrize("shape", [(), (3,), (1, 4), (2, 3, 4)], ids=str)
def test_what_is_no_matrix_takes_the_scaled_mean(shape):
    deltas = random(3, *shape)
    assert_close(merge(IsotropicMergingCommonTaskSpecific(1.5), deltas), 1.5 * deltas.mean(0))


def test_an_excluded_matrix_takes_the_scaled_mean():
    deltas = random(2, 6, 4)
    method = IsotropicMergingCommonTaskSpecific(1.0)
    assert_close(merge(method, deltas, "text_projection.weight"), deltas.mean(0))


def test_thin_matrices_are_named_and_get_iso_c():
    method, deltas = IsotropicMergingCommonTaskSpecific(1.0), random(3, 9, 5)
    assert method.fallbacks(problem(deltas)) == ["w"]
    assert_close(merge(method, deltas), isotropic(deltas.sum(0)))
    assert method.fallbacks(problem(random(3, 16, 16))) == []


@pytest.mark.parametrize("given", [{"rank": "half"}, {"common": 1.5}, {"exclude": "text"}], ids=str)
def test_an_unknown_value_is_refused(given):
    with pytest.raises(OptionError, match=f"merge.{next(iter(given))}="):
        IsotropicMergingCommonTaskSpecific(**given)
