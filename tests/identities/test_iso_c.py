"""Iso-C: flat spectra, fixed points, golden vectors, and what a sum of lower rank gives."""

import pytest
import torch
from torch.testing import assert_close

from byom.errors import OptionError
from byom.merge.base import Problem
from byom.merge.iso_c import IsotropicMergingCommon, isotropic
from byom.weights import Weights

SHAPES = [(6, 4), (4, 6), (9, 9)]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def merge(method, deltas, name="w"):
    """Return the merged change of one tensor, from task vectors ``[T, ...]`` on a pre-trained model of zeros."""
    experts = {str(t): Weights.of({name: delta}) for t, delta in enumerate(deltas)}
    return method(Problem(Weights.of({name: torch.zeros_like(deltas[0])}), experts))[name]


@pytest.mark.parametrize("rank", ["numerical", "full"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_singular_values_are_the_mean_of_the_sums(shape, rank):
    deltas = random(3, *shape)
    before = torch.linalg.svdvals(deltas.sum(0))
    after = torch.linalg.svdvals(merge(IsotropicMergingCommon(1.0, rank), deltas))
    assert_close(after, before.mean().expand(min(shape)))


def test_the_nuclear_norm_stays_at_lower_rank_too():
    low = random(9, 2) @ random(2, 7)
    values = torch.linalg.svdvals(isotropic(low))
    assert_close(values.sum(), torch.linalg.svdvals(low).sum())
    assert_close(values[:2], values[:1].expand(2))
    assert (values[2:] < 1e-12).all()


@pytest.mark.parametrize("rank", ["numerical", "full"])
def test_a_scaled_orthogonal_sum_is_kept(rank):
    change = 2 * torch.linalg.qr(random(5, 5))[0]
    assert_close(merge(IsotropicMergingCommon(1.0, rank), change[None]), change)
    assert_close(merge(IsotropicMergingCommon(1.0, rank), torch.stack([0.25 * change, 0.75 * change])), change)


@pytest.mark.parametrize("rank", ["numerical", "full"])
def test_golden_of_crossed_diagonals(rank):
    deltas = torch.tensor([[[3.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 3.0]]])
    assert_close(merge(IsotropicMergingCommon(1.0, rank), deltas), 4 * torch.eye(2))


def test_golden_of_a_sum_of_rank_one():
    deltas = torch.tensor([[[2.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    assert_close(merge(IsotropicMergingCommon(1.0), deltas), deltas[0])
    assert_close(merge(IsotropicMergingCommon(1.0, "full"), deltas).abs(), torch.eye(2))


def test_one_task_is_changed():
    deltas = torch.tensor([[[3.0, 0.0], [0.0, 1.0]]])
    assert_close(merge(IsotropicMergingCommon(1.0), deltas), 2 * torch.eye(2))


@pytest.mark.parametrize("rank", ["numerical", "full"])
def test_task_vectors_that_cancel_change_nothing(rank):
    delta = random(6, 4)
    assert not merge(IsotropicMergingCommon(1.0, rank), torch.stack([delta, -delta])).any()


def test_rows_that_no_task_changed_stay():
    deltas = random(2, 9, 5)
    deltas[:, 3:] = 0
    assert not merge(IsotropicMergingCommon(1.0), deltas)[3:].any()
    assert merge(IsotropicMergingCommon(1.0, "full"), deltas)[3:].any()


def test_the_scale_multiplies():
    deltas = random(2, 6, 4)
    assert_close(merge(IsotropicMergingCommon(-0.5), deltas), -0.5 * merge(IsotropicMergingCommon(1.0), deltas))


@pytest.mark.parametrize("shape", [(), (3,), (1, 4), (2, 3, 4)], ids=str)
def test_what_is_no_matrix_takes_the_scaled_mean(shape):
    deltas = random(3, *shape)
    assert_close(merge(IsotropicMergingCommon(1.5), deltas), 1.5 * deltas.mean(0))


def test_an_excluded_matrix_takes_the_scaled_mean():
    deltas = random(2, 6, 4)
    assert_close(merge(IsotropicMergingCommon(1.0), deltas, "text_projection.weight"), deltas.mean(0))
    assert_close(merge(IsotropicMergingCommon(1.0, exclude=()), deltas, "text_projection"), isotropic(deltas.sum(0)))


@pytest.mark.parametrize("given", [{"rank": "half"}, {"exclude": "text"}], ids=str)
def test_an_unknown_value_is_refused(given):
    with pytest.raises(OptionError, match=f"merge.{next(iter(given))}="):
        IsotropicMergingCommon(**given)
