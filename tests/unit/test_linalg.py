"""Singular vectors, polar factors and solves: against LAPACK, the minimisation they promise, and degenerate input."""

import pytest
import torch
from torch.testing import assert_close

from byom.errors import OptionError
from byom.functional.linalg import polar, ridge_solve, thin_svd, truncated_svd, weighted_solve
from byom.merge.base.matrices import is_matrix, patterns

SHAPES = [(6, 4), (4, 6), (5, 5), (2, 9), (60, 40), (40, 60), (1, 3)]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def decaying(m, n, last, seed=0):
    """A matrix whose singular values fall geometrically from 1 to `last`."""
    rank = min(m, n)
    left, right = torch.linalg.qr(random(m, rank, seed=seed))[0], torch.linalg.qr(random(n, rank, seed=seed + 1))[0]
    return left * torch.logspace(0, float(torch.tensor(last).log10()), rank, dtype=torch.float64) @ right.T


def psd(n, rank, seed=0):
    rows = random(rank, n, seed=seed)
    return rows.T @ rows / rank


def cost(solution, grams, matrices):
    return sum(((solution - w) @ g * (solution - w)).sum() for g, w in zip(grams, matrices, strict=True))


# what is a matrix


def test_a_matrix_has_two_axes_longer_than_one_and_a_name_that_is_not_excluded():
    assert is_matrix("blocks.0.weight", (3, 2))
    assert not any(is_matrix("w", shape) for shape in [(), (3,), (1, 3), (3, 1), (0, 3), (3, 2, 2)])
    assert not is_matrix("model.text_projection.weight", (3, 2), ("*text_projection*",))
    assert is_matrix("model.text_projection.weight", (3, 2), ("text_projection",))


def test_patterns_are_a_list_of_strings():
    assert patterns("merge.exclude", ["a", "b*"]) == ("a", "b*")
    for bad in ("text_projection", [1]):
        with pytest.raises(OptionError, match=r"merge\.exclude=.* is not a list of patterns; write merge\.exclude="):
            patterns("merge.exclude", bad)


# singular vectors


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_the_thin_factors_multiply_to_the_matrix(shape, dtype):
    matrix = random(*shape).to(dtype)
    left, values, right = thin_svd(matrix)
    assert (left.shape, values.shape, right.shape) == ((shape[0], min(shape)), (min(shape),), (min(shape), shape[1]))
    assert_close(left * values @ right, matrix.double())
    assert (values.diff() <= 0).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_truncation_keeps_the_largest_singular_values(shape):
    matrix = random(*shape)
    left, values, right = thin_svd(matrix)
    for rank in range(min(shape) + 1):
        u, s, vt = truncated_svd(matrix, rank)
        assert_close(s, values[:rank])
        assert_close(u * s @ vt, left[:, :rank] * values[:rank] @ right[:rank])
        assert_close(u.T @ u, torch.eye(rank).double())
        assert_close(vt @ vt.T, torch.eye(rank).double())


@pytest.mark.parametrize("last", [1e-2, 2e-4, 1e-5, 1e-9])
@pytest.mark.parametrize("shape", [(60, 40), (40, 60)], ids=str)
def test_truncation_is_accurate_to_fp32_however_fast_the_values_fall(last, shape):
    matrix = decaying(*shape, last)
    u, s, vt = truncated_svd(matrix, 40)
    fp32 = torch.finfo(torch.float32).eps
    assert_close(s, thin_svd(matrix)[1], rtol=fp32, atol=0)
    assert (u.T @ u - torch.eye(40)).abs().max() < fp32
    assert (vt @ vt.T - torch.eye(40)).abs().max() < fp32
    assert_close(u * s @ vt, matrix)


def test_truncation_of_a_matrix_of_lower_rank():
    matrix = random(9, 2) @ random(2, 7)
    u, s, vt = truncated_svd(matrix, 5)
    assert_close(u * s @ vt, matrix)
    assert_close(u.T @ u, torch.eye(5).double())
    assert (s[2:] < 1e-12).all()


def test_truncation_of_zero():
    u, s, vt = truncated_svd(torch.zeros(4, 3), 2)
    assert not s.any()
    assert u.isfinite().all() and vt.isfinite().all()


# the polar factor


@pytest.mark.parametrize("last", [1.0, 1e-2, 1e-5])
@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (30, 30)], ids=str)
def test_the_polar_factor_is_orthonormal_and_the_nearest(shape, last):
    matrix = decaying(*shape, last)
    left, _, right = thin_svd(matrix)
    factor = polar(matrix)
    assert_close(factor, left @ right, rtol=1e-6, atol=1e-7)
    product = factor.T @ factor if shape[0] >= shape[1] else factor @ factor.T
    assert_close(product, torch.eye(min(shape)).double())
    for seed in range(5):
        other = torch.linalg.qr(random(max(shape), min(shape), seed=seed))[0]
        other = other if shape[0] >= shape[1] else other.T
        assert (matrix - factor).norm() <= (matrix - other).norm()


def test_the_polar_factor_leaves_out_directions_that_are_not_there():
    half = torch.linalg.qr(random(8, 2))[0]
    twice = torch.cat([half, half], 1)
    assert_close(polar(twice), twice / 2**0.5)
    assert_close(polar(twice.T), twice.T / 2**0.5)
    assert not polar(torch.zeros(3, 2)).any()


@pytest.mark.parametrize("scale", [1e-12, 1e-3, 1e12])
def test_the_polar_factor_does_not_depend_on_the_scale(scale):
    matrix = random(6, 4)
    assert_close(polar(scale * matrix), polar(matrix))


def test_the_threshold_of_the_polar_factor_is_relative_to_the_largest_value():
    matrix = torch.diag(torch.tensor([1.0, 1e-5, 1e-9]))
    assert_close(polar(1e6 * matrix), torch.diag(torch.tensor([1.0, 1, 0])).double())
    assert_close(polar(matrix, 1e-4), torch.diag(torch.tensor([1.0, 0, 0])).double())
    assert_close(polar(matrix, 0), torch.eye(3).double())
    assert_close(polar(torch.diag(torch.tensor([2.0, 0])), -1).abs(), torch.eye(2).double())


# solves


@pytest.mark.parametrize("ridge", [0, 1e-6])
@pytest.mark.parametrize("rank", [3, 9])
def test_the_solution_solves(rank, ridge):
    gram = psd(5, rank)
    right = random(4, 5) @ gram
    solved = ridge_solve(gram, right, ridge)
    assert_close(solved @ (gram + ridge * gram.diagonal().mean() * torch.eye(5)), right)


def test_a_gram_that_rounding_made_indefinite_is_solved():
    gram = torch.diag(torch.tensor([1.0, 0.5, -1e-8]))
    solved = ridge_solve(gram, torch.tensor([[1.0, 1.0, 0.0]]), 1e-9)
    assert_close(solved, torch.tensor([[1.0, 2.0, 0.0]]).double())


def test_a_gram_of_zeros_is_solved_by_zero():
    assert not ridge_solve(torch.zeros(2, 2), torch.zeros(3, 2), 1e-6).any()


@pytest.mark.parametrize("gram", [torch.eye(4).double(), psd(4, 50), psd(4, 4)])
def test_equal_weights_give_the_mean(gram):
    matrices = random(3, 5, 4)
    assert_close(weighted_solve(gram.expand(3, 4, 4), matrices, 1e-9), matrices.mean(0), rtol=1e-6, atol=1e-7)


def test_no_weight_at_all_gives_the_mean():
    matrices = random(3, 5, 4)
    assert_close(weighted_solve(torch.zeros(3, 4, 4), matrices, 1e-6), matrices.mean(0))


@pytest.mark.parametrize("ridge", [0, 1e-9])
def test_inputs_that_one_task_has_take_that_tasks_columns(ridge):
    matrices = random(2, 3, 5)
    grams = torch.diag_embed(torch.tensor([[1.0, 2, 0, 0, 0], [0, 0, 3, 1, 0]], dtype=torch.float64))
    expected = torch.cat([matrices[0, :, :2], matrices[1, :, 2:4], matrices[:, :, 4:].mean(0)], 1)
    assert_close(weighted_solve(grams, matrices, ridge), expected, rtol=0, atol=10 * ridge or 1e-12)


@pytest.mark.parametrize("rank", [2, 9])
def test_the_weighted_average_is_the_minimiser(rank):
    matrices, grams = random(3, 5, 4), torch.stack([psd(4, rank, seed) for seed in range(3)])
    found = weighted_solve(grams, matrices, 0)
    least = cost(found, grams, matrices)
    for seed in range(20):
        assert least <= cost(found + 1e-3 * random(5, 4, seed=seed), grams, matrices)


def test_diagonal_weights_average_column_by_column():
    matrices, diagonals = random(3, 5, 4), random(3, 4).abs()
    expected = (matrices * diagonals[:, None]).sum(0) / diagonals.sum(0)
    assert_close(weighted_solve(torch.diag_embed(diagonals), matrices, 0), expected)


def test_a_single_task_is_returned_to_the_bit():
    matrix = random(1, 5, 4)
    assert torch.equal(weighted_solve(psd(4, 2)[None], matrix, 1e-6), matrix[0])


def test_weighted_average_golden():
    matrices = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    full = torch.tensor([[[2.0, 1.0], [1.0, 2.0]], [[1.0, 0.0], [0.0, 1.0]]])
    damped = torch.tensor([[[2.0, 0.5], [0.5, 2.0]], [[1.0, 0.0], [0.0, 1.0]]])
    assert_close(weighted_solve(full, matrices, 0), torch.tensor([[0.5, 0.5]]).double())
    assert_close(weighted_solve(damped, matrices, 0), torch.tensor([[0.6, 0.4]]).double())


def test_a_generator_of_weights_is_read_once():
    matrices, grams = random(3, 5, 4), torch.stack([psd(4, 9, seed) for seed in range(3)])
    assert torch.equal(weighted_solve(iter(grams), matrices, 0), weighted_solve(grams, matrices, 0))
