"""Leading eigenvectors by filters: the bound holds, it catches what is missing, and the exact road takes over then."""

import math

import pytest
import torch
from torch.testing import assert_close

from byom.functional import iterative, linalg
from byom.functional.iterative import TOLERANCE, Ritz, bound, leading, square
from byom.functional.linalg import polar_and_values, thin_svd, truncated_each, truncated_svd
from byom.merge.iso_cts import isotropic_with_own
from byom.merge.tsv import add_orthogonalised

N, RANK = 96, 6


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(n, seed):
    return torch.linalg.qr(random(n, n, seed=seed))[0]


def matrix(values, rows=N, seed=0):
    """Return ``[rows, n]`` with the singular values given."""
    values = torch.as_tensor(values, dtype=torch.float64)
    return rotation(rows, seed)[:, : len(values)] * values @ rotation(len(values), seed + 1).T


PLACES = torch.arange(1, N + 1, dtype=torch.float64)
SPECTRA = {
    "slow": PLACES**-0.7,
    "fast": PLACES**-2,
    "geometric": 0.8**PLACES,
    "one_large": torch.cat([torch.tensor([20.0]), torch.linspace(1, 0.1, N - 1)]).double(),
    "clusters": torch.cat([torch.full((RANK,), 2.0), torch.full((N - RANK,), 1.0)]).double(),
    "exact_rank": torch.cat([torch.linspace(2, 1, RANK), torch.zeros(N - RANK)]).double(),
}
CUT_CLUSTER = torch.cat([torch.full((RANK + 2,), 2.0), torch.full((N - RANK - 2,), 1.0)]).double()
UNPROVABLE = {
    "equal_at_the_cut": matrix(CUT_CLUSTER),
    "lower_rank": matrix(torch.where(PLACES < RANK, 1.0, 0.0)),
    "zero": torch.zeros(N, N, dtype=torch.float64),
    "identity": torch.eye(N, dtype=torch.float64),
}


def lost(given, vectors):
    """Return the relative distance between two projections of the rows of a matrix."""
    best = thin_svd(given)[2][: vectors.shape[-1]].T
    distance = torch.linalg.matrix_norm(given @ (vectors @ vectors.T - best @ best.T))
    return float(distance / torch.linalg.matrix_norm(given @ best))


@pytest.fixture
def small(monkeypatch):
    """Let small matrices take the roads of large ones, on which as many as a sixth of all directions are few."""
    for module in (linalg, iterative):
        monkeypatch.setattr(module, "LARGE", 16)
    monkeypatch.setattr(linalg, "FEWER", 6)
    monkeypatch.setattr(iterative, "LEAF", 20)


@pytest.mark.parametrize(
    ("spectrum", "rank"),
    [*((spectrum, RANK) for spectrum in (*SPECTRA, "noise")), ("slow", 1), ("fast", 1), ("one_large", 1), ("noise", 1)],
)
def test_the_leading_vectors_are_proved_and_the_bound_holds(spectrum, rank):
    given = random(2 * N, N) if spectrum == "noise" else matrix(SPECTRA[spectrum])
    values, vectors, error = (each[0] for each in leading((given.T @ given)[None], rank))
    assert lost(given, vectors) <= float(error) + 1e-12 <= TOLERANCE + 1e-12
    assert_close(values.sqrt(), thin_svd(given)[1][:rank])
    assert_close(vectors.T @ vectors, torch.eye(rank, dtype=torch.float64))


@pytest.mark.parametrize("given", UNPROVABLE.values(), ids=UNPROVABLE)
def test_what_cannot_be_proved_has_no_bound(given):
    found = leading((given.T @ given)[None], RANK)
    assert math.isinf(found.error) and found.vectors.isfinite().all()


def ritz(gram, vectors):
    return iterative._ritz(gram, vectors)


@pytest.mark.parametrize("angle", [1e-12, 1e-11, 1e-10])
@pytest.mark.parametrize("spectrum", ["slow", "fast", "geometric"])
def test_the_bound_is_above_what_was_turned_away(spectrum, angle):
    given = matrix(SPECTRA[spectrum])
    size = RANK + iterative.BUFFER
    exact = thin_svd(given)[2].T
    turned = torch.linalg.qr(exact[:, :size] + angle * exact[:, size:] @ random(N - size, size))[0]
    gram = (given.T @ given)[None]
    found = ritz(gram, turned[None])
    error = float(bound(gram, found, RANK))
    assert lost(given, found.vectors[0, :, :RANK]) <= error < 1e4 * angle


@pytest.mark.parametrize("missing", [0, 3, RANK - 1])
def test_an_eigenvector_that_was_missed_is_noticed_although_no_residual_shows_it(missing):
    given = matrix(SPECTRA["slow"])
    exact = thin_svd(given)[2].T
    others = torch.cat([exact[:, :missing], exact[:, missing + 1 : RANK + iterative.BUFFER]], 1)
    gram = (given.T @ given)[None]
    found = ritz(gram, others[None])
    assert torch.linalg.matrix_norm(gram @ found.vectors - found.vectors * found.values[:, None]) < 1e-12
    assert math.isinf(bound(gram, found, RANK))
    assert bound(gram, ritz(gram, exact[None, :, : RANK + iterative.BUFFER]), RANK) < 1e-9


def test_a_gap_that_is_not_there_is_no_proof():
    values, vectors = torch.tensor([[2.0, 1, 1, 0]]).double(), torch.eye(4).double()[None]
    grams = torch.diag_embed(values)
    assert math.isinf(bound(grams, Ritz(values, vectors, grams @ vectors), 2))
    assert bound(grams, Ritz(values, vectors, grams @ vectors), 1) < 1e-12


def test_several_together_give_what_each_gives_alone():
    several = torch.stack([matrix(SPECTRA["slow"]), matrix(SPECTRA["one_large"], seed=2), random(N, N)])
    grams = several.mT @ several
    together = leading(grams, RANK)
    for index, given in enumerate(several):
        alone = leading(grams[index : index + 1], RANK)
        assert_close(together.values[index], alone.values[0])
        assert lost(given, together.vectors[index]) <= float(together.error[index]) + 1e-12 <= TOLERANCE + 1e-12


def test_one_that_cannot_be_proved_leaves_the_others_proved():
    several = torch.stack([UNPROVABLE["zero"], matrix(SPECTRA["slow"]), UNPROVABLE["equal_at_the_cut"]])
    assert (leading(several.mT @ several, RANK).error <= TOLERANCE).tolist() == [False, True, False]


@pytest.mark.parametrize("factor", [2.0**-60, 2.0**40])
def test_a_power_of_two_changes_no_bit_of_the_vectors(factor):
    gram = square(random(2 * N, N))[None]
    one, other = leading(gram, RANK), leading(factor * gram, RANK)
    assert torch.equal(one.vectors, other.vectors)
    assert torch.equal(factor * one.values, other.values)


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (40, 40), (1, 45)], ids=str)
def test_a_square_by_blocks_is_the_square(shape, small):
    given = random(*shape)
    assert_close(square(given), given.T @ given)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("rows", [N, 2 * N])
def test_few_directions_are_those_of_lapack(spectrum, rows, small, monkeypatch):
    given = matrix(SPECTRA[spectrum], rows)
    left, values, right = thin_svd(given)
    best = left[:, :RANK] * values[:RANK] @ right[:RANK]
    monkeypatch.setattr(linalg, "_descending", None)  # the exact road is not taken
    right, values_of_transposed, left = (each.T if each.ndim == 2 else each for each in truncated_svd(given.T, RANK))
    for u, s, vt in (truncated_svd(given, RANK), (left, values_of_transposed, right)):
        assert_close(s, values[:RANK])
        assert torch.linalg.matrix_norm(u * s @ vt - best) <= TOLERANCE * torch.linalg.matrix_norm(best)
        assert_close(u.T @ u, torch.eye(RANK, dtype=torch.float64))


@pytest.mark.parametrize("given", UNPROVABLE.values(), ids=UNPROVABLE)
def test_without_a_proof_the_exact_road_is_taken_to_the_bit(given, small, monkeypatch):
    found = truncated_svd(given, RANK)
    monkeypatch.setattr(linalg, "LARGE", 2 * N)
    assert all(map(torch.equal, found, truncated_svd(given, RANK)))


def test_one_value_that_drowns_the_others_does_not_spoil_them(small):
    given = matrix(torch.cat([torch.tensor([1e3]), torch.linspace(1, 0.1, N - 1)]))
    left, values, right = thin_svd(given)
    u, s, vt = truncated_svd(given, RANK)
    assert_close(s, values[:RANK])
    assert_close(u[:, 1:] * s[1:] @ vt[1:], left[:, 1:RANK] * values[1:RANK] @ right[1:RANK], rtol=0, atol=1e-5)


def test_wanted_values_that_squaring_loses_come_from_lapack(small):
    given = matrix(torch.where(PLACES <= RANK, 1e-6 ** ((PLACES - 1) / (RANK - 1)), 1e-9))
    assert_close(truncated_svd(given, RANK)[1], thin_svd(given)[1][:RANK], rtol=1e-7, atol=0)


def test_a_batch_is_cut_as_each_matrix_is(small):
    several = [matrix(SPECTRA["slow"]), UNPROVABLE["equal_at_the_cut"], random(N, N)]
    for found, alone in zip(linalg._truncated(several, RANK), truncated_each(iter(several), RANK), strict=True):
        assert_close(found[0] * found[1] @ found[2], alone[0] * alone[1] @ alone[2], rtol=0, atol=1e-6)
    assert truncated_each([], RANK) == []


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (24, 24)], ids=str)
def test_a_large_polar_factor_and_its_values(shape, small):
    given = random(*shape)
    left, values, right = thin_svd(given)
    factor, kept = polar_and_values(given)
    assert_close(factor, left @ right)
    assert_close(kept, values)


@pytest.mark.parametrize("shape", [(60, 48), (48, 60), (48, 48)], ids=str)
@pytest.mark.parametrize(
    "merge", [add_orthogonalised, lambda deltas: isotropic_with_own(deltas, 2)], ids=["tsv", "cts"]
)
def test_methods_give_on_the_large_road_what_they_give_on_the_small_one(merge, shape, monkeypatch, request):
    deltas = random(8, *shape).float()
    expected = merge(deltas)
    request.getfixturevalue("small")
    found = merge(deltas)
    assert_close(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    assert not torch.equal(found, expected)
