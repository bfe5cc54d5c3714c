"""Squares of matrices, and their leading eigenvectors by products alone, with a bound that is computed."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

LARGE = 512  # shorter sides from which on fewer operations are worth another order of them; others keep their bits
LEAF = 192  # columns of a block of a square
TOLERANCE = torch.finfo(torch.float32).eps  # of a cut matrix, in shares of its norm: what fp32 factors round to anyway
BUFFER = 16  # directions looked for beyond those asked for, at least; else as many as are asked for
ROUGH, ROUNDS = 2, 6  # filters in fp32, and at most in fp64
DEGREE, AIM = 32, 0.75  # of a polynomial, at most; share of a dtype's digits that one filter is to gain


def square(tall: Tensor) -> Tensor:
    """Return ``AᵀA``, computing one half of it block by block where A is large: ``m n^2`` operations, not twice that.

    Args:
        tall: ``[m, n]``.

    Returns:
        ``[n, n]``.
    """
    columns = tall.shape[1]
    if columns < LARGE or tall.device.type != "cpu":  # a device has the whole sooner than the parts
        return tall.mT @ tall
    result = tall.new_empty(columns, columns)
    for start in range(0, columns, LEAF):
        block = slice(start, start + LEAF)
        rows = torch.mm(tall[:, block].T, tall[:, start:])
        result[block, start:] = rows
        result[start:, block] = rows.T
    return result


class Leading(NamedTuple):
    """Approximate leading eigenvectors of symmetric positive semi-definite matrices, and how far off they are.

    Args:
        values: ``[T, k]`` descending.
        vectors: ``[T, n, k]`` orthonormal columns.
        error: ``[T]``, an upper bound of ``||A P - A P'|| / ||A P||`` in the Frobenius norm for every A with
            ``AᵀA = G``, P being the projection on the k leading eigenvectors and P' that on `vectors`; infinity where
            nothing is proved.
    """

    values: Tensor
    vectors: Tensor
    error: Tensor


class Ritz(NamedTuple):
    """Ritz values ``[T, l]``, descending, their vectors ``[T, n, l]``, and the products of G and these."""

    values: Tensor
    vectors: Tensor
    image: Tensor


def leading(grams: Tensor, rank: int) -> Leading:
    """Find leading eigenvectors by Chebyshev filters, from fp32 on to fp64, until the bound is below `TOLERANCE`.

    A filter of degree d is d products ``G Q`` with ``Q [n, k + max(k, BUFFER)]``. It damps the eigenvalues below the
    smallest that the last round found, and enlarges those above by a factor that grows exponentially in d. All
    matrices of a batch take the same steps, so it costs a few calls of a device however many there are.

    Args:
        grams: ``[T, n, n]`` symmetric positive semi-definite in fp64 (G).
        rank: How many eigenvectors (k), with ``k + max(k, BUFFER) < n``.

    Returns:
        The last that was found, for better or worse: a caller must look at `error`. There is no bound where the k-th
        value and the next one are too close.

    References:
        Self-Consistent-Field Calculations Using Chebyshev-Filtered Subspace Iteration, algorithm 3.1, for the filter.
        https://doi.org/10.1016/j.jcp.2006.03.017
        Finding Structure with Randomness, algorithm 4.4, for the start. https://arxiv.org/abs/0909.4061
    """
    size = rank + max(rank, BUFFER)
    sizes = grams.diagonal(dim1=-2, dim2=-1).sum(-1).clamp(min=torch.finfo(grams.dtype).tiny)
    scaled = grams / sizes[:, None, None]
    narrow = scaled.float()
    ritz = _start(narrow, size)
    for _ in range(ROUGH):
        ritz = _filtered(narrow, ritz, rank)
    ritz = _ritz(scaled, torch.linalg.qr(ritz.vectors.double())[0])
    error = torch.full_like(sizes, math.inf)
    for _ in range(ROUNDS):
        ritz = _filtered(scaled, ritz, rank)
        error = bound(scaled, ritz, rank)
        if (error <= TOLERANCE).all():
            break
    return Leading(ritz.values[:, :rank] * sizes[:, None], ritz.vectors[..., :rank], error)


def bound(grams: Tensor, ritz: Ritz, rank: int) -> Tensor:
    """Bound what the leading Ritz vectors miss; see `Leading.error`.

    With V the first k vectors, ``R = G V - V diag(values)`` and M what G is on the complement of V, the invariant
    subspace near V is at angles whose tangents have a norm of at most ``2 e``, ``e`` being the norm of the columns
    ``(values[j] I - M)^{-1} r_j``, if ``mu I - M`` is positive definite for some mu below the k-th value and
    ``e ||R|| / (values[k-1] - mu) < 1/4``. Its Cholesky factor proves the former, and with it that none of the leading
    eigenvectors is missing; and it bounds the columns, by ``||(mu I - M)^{-1} r_j||`` and by
    ``||r_j|| / (values[j] - mu)``. mu is half way between the k-th value and the next one.

    Args:
        grams: ``[T, n, n]`` in fp64.
        ritz: More than k Ritz vectors.
        rank: k.

    Returns:
        ``[T]``, infinity where nothing is proved, which is not tried where the residuals are too large for it.

    References:
        Error and Perturbation Bounds for Subspaces Associated with Certain Eigenvalue Problems, theorem 4.1.
        https://doi.org/10.1137/1015095
    """
    values, kept, image = ritz.values[:, :rank], ritz.vectors[..., :rank], ritz.image[..., :rank]
    last, half = values[:, -1], (values[:, -1] - ritz.values[:, rank]) / 2
    share = 2 * math.sqrt(2) * (values[:, 0].clamp(min=0) / values.clamp(min=0).sum(-1)).sqrt()
    rest = image - kept * values[:, None]
    rest = rest - kept @ (kept.mT @ rest)
    likely = torch.linalg.matrix_norm(rest / (values - ritz.values[:, -1:])[:, None])
    if not (share * likely <= TOLERANCE).any():
        return torch.full_like(last, math.inf)
    complement = grams - kept @ image.mT - rest @ kept.mT
    shifted = torch.diag_embed((last - half)[:, None].expand(len(grams), grams.shape[-1])) - complement
    factor, failed = torch.linalg.cholesky_ex(shifted)
    columns = torch.linalg.vector_norm(torch.cholesky_solve(rest, factor), dim=-2)
    least = torch.linalg.vector_norm(rest, dim=-2) / (values - (last - half)[:, None])
    missed = torch.linalg.vector_norm(torch.minimum(columns, least), dim=-1)
    proved = (failed == 0) & (half > 0) & (missed * torch.linalg.matrix_norm(rest) < half / 4)
    return torch.where(proved, share * missed, math.inf)


def _start(grams: Tensor, size: int) -> Ritz:
    """Return rough Ritz vectors of the leading directions, by two powers of a random matrix, the same at each call."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(grams.shape[-1], size, generator=generator).to(grams)
    basis = torch.linalg.qr(grams @ drawn)[0]
    return _ritz(grams, torch.linalg.qr(grams @ basis)[0])


def _filtered(grams: Tensor, ritz: Ritz, rank: int) -> Ritz:
    """Apply the Chebyshev polynomial that is small where eigenvalues are below the last Ritz value."""
    damped = ritz.values[:, -1:, None].clamp(min=torch.finfo(grams.dtype).eps)  # of a trace of 1
    before, now = ritz.vectors, 2 / damped * ritz.image - ritz.vectors  # polynomials of 2 G / damped - 1
    for _ in range(_degree(2 * ritz.values / damped[..., 0] - 1, rank, grams.dtype) - 1):
        before, now = now, 4 / damped * (grams @ now) - 2 * now - before
    return _ritz(grams, torch.linalg.qr(now)[0])


def _degree(places: Tensor, rank: int, dtype: torch.dtype) -> int:
    """Return a degree that enlarges the k-th direction to the precision of a dtype, unless the largest would drown it.

    Args:
        places: ``[T, l]``, where the eigenvalues are once the damped interval is ``[-1, 1]``.
        rank: k.
        dtype: Of the products: a direction that is smaller than its rounding next to another one is lost.
    """
    rates = places.double().clamp(min=1).acosh()  # the polynomial of degree d at x is cosh(d acosh x)
    first, last = rates[:, 0], rates[:, rank - 1]
    digits = -math.log(torch.finfo(dtype).eps)
    wanted = AIM * digits / float(last.min().clamp(min=1e-3))
    allowed = digits / float((first - last).max().clamp(min=1e-3))
    return max(2, min(DEGREE, math.ceil(wanted), int(allowed)))


def _ritz(grams: Tensor, basis: Tensor) -> Ritz:
    """Turn an orthonormal basis ``[T, n, l]`` to Ritz vectors, by descending value."""
    image = grams @ basis
    core = basis.mT @ image
    values, turn = torch.linalg.eigh((core + core.mT) / 2)
    turn = turn.flip(-1)
    return Ritz(values.flip(-1), basis @ turn, image @ turn)
