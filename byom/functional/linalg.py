"""Linear algebra of merging: pure functions on matrices, computed and returned in fp64 whatever they are given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from byom.functional.iterative import LARGE, TOLERANCE, leading, square

VANISHING = 1e-6  # singular values below this share of the largest are rounding of fp32 models, not directions
OVERSAMPLING = 16  # directions that a randomised range finder looks for beyond those asked for
POWERS = 3  # passes over A and its transpose, each adding 2 to the power of A
SAFE = 1e-4  # squaring a matrix in fp64 keeps fp32 accuracy down to this share of its largest singular value
FEW, FEWER = 4, 24  # filters find up to this share of all directions faster than LAPACK, on a device and on a CPU
BATCH = 1 << 27  # entries of the matrices that a device decomposes together, in fp64


def thin_svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factor a matrix: ``A = U diag(s) Vt``.

    Args:
        matrix: ``[m, n]``.

    Returns:
        ``U [m, r]``, ``s [r]`` descending, ``Vt [r, n]`` with ``r = min(m, n)``, in fp64.
    """
    if matrix.shape[0] >= matrix.shape[1]:
        left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
        return left, values, right
    left, values, right = thin_svd(matrix.T)  # LAPACK takes half the time for tall matrices
    return right.T, values, left.T


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keep the largest singular values and their vectors.

    They come from the eigenvectors of the smaller of ``AᵀA`` and ``AAᵀ`` in fp64, and from `thin_svd` where a wanted
    value is below `SAFE` of the largest, since squaring loses it. A rank that cuts through equal values takes
    the vectors that LAPACK lists first.

    Of a matrix whose sides are `LARGE` or more, few directions are found by `byom.functional.iterative.leading`, if its
    bound proves that ``U diag(s) Vt`` differs from the best by at most `TOLERANCE` of its norm. That costs some 10 to
    60 products of ``4 n^2 k`` beside the ``m n^2`` of the square, where the eigenvectors cost about ``9 n^3``.

    Args:
        matrix: ``[m, n]``.
        rank: How many to keep (k), at most ``min(m, n)``.

    Returns:
        ``U [m, k]``, ``s [k]`` descending, ``Vt [k, n]``, in fp64.
    """
    return _truncated([matrix], rank)[0]


def truncated_each(matrices: Iterable[Tensor], rank: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Keep the largest singular values of several matrices; see `truncated_svd`.

    A device takes as many of them together as fit `BATCH`. A CPU takes one after the other, which is as fast and needs
    the memory of one.

    Args:
        matrices: ``[m, n]`` each; read once, so a generator holds one at a time.
        rank: How many to keep of each (k), at most ``min(m, n)``.

    Returns:
        For each matrix ``U [m, k]``, ``s [k]`` descending, ``Vt [k, n]``, in fp64.
    """
    found, held = [], []
    for matrix in matrices:
        held.append(matrix)
        if matrix.device.type == "cpu" or (len(held) + 1) * matrix.numel() > BATCH:
            found += _truncated(held, rank)
            held = []
    return found + (_truncated(held, rank) if held else [])


def _truncated(matrices: Sequence[Tensor], rank: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Cut matrices of one shape: together where few directions are wanted, and one by one where that proves nothing."""
    rows, columns = matrices[0].shape
    if rows < columns:
        return [(right.T, values, left.T) for left, values, right in _truncated([each.T for each in matrices], rank)]
    every = [each.double() for each in matrices]
    if columns < LARGE or not 0 < rank <= columns // (FEWER if every[0].device.type == "cpu" else FEW):
        return [_cut(tall, *_right_singular(tall), rank) for tall in every]
    grams = torch.stack([square(tall) for tall in every])
    found = leading(grams, rank)
    pairs = [*zip(found.values.clamp(min=0).sqrt(), found.vectors, strict=True)]
    proved = (found.error <= TOLERANCE).tolist()
    return [_cut(tall, *(pairs[i] if proved[i] else _descending(grams[i])), rank) for i, tall in enumerate(every)]


def _cut(tall: Tensor, values: Tensor, vectors: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    values, vectors = values[:rank], vectors[:, :rank]
    if (values <= SAFE * values[:1]).any():
        left, values, right = thin_svd(tall)
        return left[:, :rank], values[:rank], right[:rank]
    return (tall @ vectors) / values, values, vectors.T


def randomised_svd(matrix: Tensor, rank: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Approximate the largest singular values and their vectors from the range of ``(A Aᵀ)^3 A G``, G being normal.

    Exact up to rounding for matrices whose rank is at most ``rank + OVERSAMPLING``. It costs ``O(m n k)`` where
    `truncated_svd`, which small matrices get here too, costs ``O(m n min(m, n))``.

    Args:
        matrix: ``[m, n]``.
        rank: How many to keep (k), at most ``min(m, n)``.
        seed: Seeds G.

    Returns:
        ``U [m, k]``, ``s [k]`` descending, ``Vt [k, n]``, in fp64.

    References:
        Finding Structure with Randomness: Probabilistic Algorithms for Constructing Approximate Matrix
        Decompositions, algorithms 4.4 and 5.1. https://arxiv.org/abs/0909.4061
    """
    if rank + OVERSAMPLING >= min(matrix.shape):
        return truncated_svd(matrix, rank)
    wide = matrix.double()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(wide.shape[1], rank + OVERSAMPLING, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr(wide @ drawn.to(wide.device))[0]
    for _ in range(POWERS):  # orthonormal in between, or the smaller directions would be lost to rounding
        basis = torch.linalg.qr(wide @ torch.linalg.qr(wide.T @ basis)[0])[0]
    left, values, right = thin_svd(basis.T @ wide)
    return (basis @ left)[:, :rank], values[:rank], right[:rank]


def product_svd(left: Tensor, right: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Factor a product without forming it: ``L R = U diag(s) Vt``.

    ``L = Q_L R_L`` and ``Rᵀ = Q_R R_R``; the SVD of the r x r core ``R_L R_Rᵀ`` is turned by the orthonormal Qs. It
    costs ``O((m + n) r^2 + r^3)`` where the SVD of the dense product costs ``O(m n min(m, n))``.

    Args:
        left: ``[m, r]``.
        right: ``[r, n]``.

    Returns:
        ``U [m, k]``, ``s [k]`` descending, ``Vt [k, n]`` with ``k = min(m, n, r)``, in the factors' dtype.

    References:
        BYOM: Building Your Own Multi-Task Model For Free, section 3 (BYOM-LoRA). https://arxiv.org/abs/2310.01886
    """
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    u, values, vt = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    return q_left @ u, values, vt @ q_right.T


def polar(matrix: Tensor, rtol: float = VANISHING) -> Tensor:
    """Return the nearest matrix with orthonormal columns (rows, if wide): ``P Qᵀ`` of ``A = P diag(s) Qᵀ``.

    Directions whose singular value is at most `rtol` of the largest are left out: the factor is not unique
    there, and the result is 0 on them instead of what LAPACK happens to return.

    Args:
        matrix: ``[m, n]``.
        rtol: Threshold relative to the largest singular value, below 1; a negative one leaves nothing out.

    Returns:
        ``[m, n]`` in fp64, the solution of the orthogonal Procrustes problem on the kept directions.
    """
    return polar_and_values(matrix, rtol)[0]


def polar_and_values(matrix: Tensor, rtol: float = VANISHING) -> tuple[Tensor, Tensor]:
    """Return the polar factor and the singular values that it keeps; see `polar`.

    For ``m >= n`` the factor is ``A (AᵀA)^(-1/2)`` on the kept directions: a square, its eigenvectors and two products,
    about ``3 m n^2 + 11 n^3`` operations. Where a kept value is below `SAFE` of the largest it comes from `thin_svd`.

    Args:
        matrix: ``[m, n]``.
        rtol: Threshold relative to the largest singular value, below 1; a negative one leaves nothing out.

    Returns:
        ``[m, n]`` and ``[r]`` descending, in fp64.
    """
    if matrix.shape[0] < matrix.shape[1]:
        factor, values = polar_and_values(matrix.T, rtol)
        return factor.T, values
    tall = matrix.double()
    values, vectors = _right_singular(tall)
    leading = values > rtol * values[:1]
    if rtol < VANISHING or (values[leading] <= SAFE * values[:1]).any():
        left, values, right = thin_svd(tall)
        leading = values > rtol * values[:1]
        return left[:, leading] @ right[leading], values[leading]
    values, vectors = values[leading], vectors[:, leading]
    if tall.shape[1] < LARGE:
        return (tall @ vectors) / values @ vectors.T, values
    return tall @ (vectors / values @ vectors.T), values


def ridge_solve(gram: Tensor, right: Tensor, ridge: float) -> Tensor:
    """Solve ``X (G + ridge * mean(diag G) * I) = R`` for X.

    By Cholesky in fp64; where that fails (rounding made G indefinite, or ``ridge=0`` and G is singular) by
    eigenvectors, X being 0 in the directions that G does not have.

    Args:
        gram: ``[n, n]`` symmetric, positive semi-definite (G).
        right: ``[m, n]``, its rows in the range of G (R).
        ridge: Regularisation relative to the mean diagonal, at least 0.

    Returns:
        ``[m, n]`` in fp64.
    """
    gram, right = gram.double(), right.double()
    shift = ridge * gram.diagonal().mean()
    factor, failed = torch.linalg.cholesky_ex(gram + shift * torch.eye(len(gram), dtype=gram.dtype, device=gram.device))
    if shift > 0 and not failed:
        return torch.cholesky_solve(right.T, factor).T
    values, vectors = torch.linalg.eigh(gram)
    exists = values > len(values) * torch.finfo(values.dtype).eps * values[-1:].abs()
    basis = vectors[:, exists]
    return right @ basis / (values[exists] + shift) @ basis.T


def without_rounding(gram: Tensor, right: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Leave out the directions of ``X G = R`` that rounding put there: those that G, as it was stored, does not have.

    Directions are judged after both sides of G are scaled to a unit diagonal, so that features of very different sizes
    count alike. Rounding every entry of G by a share ``eps / 2`` moves the eigenvalues of the scaled G by at most that
    share of its Frobenius norm; what lies below twice of it is no direction.

    Args:
        gram: ``[n, n]`` symmetric, positive semi-definite but for rounding, fp64 (G).
        right: ``[m, n]``, fp64 (R).
        eps: Precision in which G was stored, such as that of fp32.

    Returns:
        G and R themselves if G has all directions; else both cut to the range of what is left.
    """
    size = gram.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(size > 0, 1 / size, 0)
    scaled = inverse[:, None] * gram * inverse
    least = eps * float(torch.linalg.matrix_norm(scaled))
    absent = (size == 0).double() * (1 + least)  # features that no input has are exact zeros, not rounding
    shifted = scaled + (absent - least).diag()
    if not torch.linalg.cholesky_ex(shifted)[1]:
        return gram, right
    values, vectors = torch.linalg.eigh(scaled)
    kept = vectors[:, values > least]
    kept = kept * (size > 0)[:, None]
    gram = size[:, None] * (kept * values[values > least] @ kept.T) * size
    return (gram + gram.T) / 2, (right * inverse) @ kept @ kept.T * size


def weighted_solve(grams: Iterable[Tensor], matrices: Tensor, ridge: float, eps: float = 0.0) -> Tensor:
    """Average matrices by matrix weights: the W that minimises ``sum_t tr((W - W_t) G_t (W - W_t)ᵀ)``.

    ``W (sum_t G_t) = sum_t W_t G_t``, solved for the distance from the plain mean: what no G_t weighs, and
    what the ridge pulls, goes to the mean of the W_t. Where an input direction matters to one task alone the
    result is that task's, up to a share ``ridge``.

    Args:
        grams: One ``[n, n]`` symmetric positive semi-definite weight per task (G_t), singular ones included; read
            once and summed, so a generator holds one at a time.
        matrices: ``[T, m, n]`` (W_t).
        ridge: Regularisation relative to the mean diagonal of the summed weights, at least 0.
        eps: Precision in which the weights were stored, if that is less than fp64's: what is smaller is no direction,
            see `without_rounding`, and gets the mean.

    Returns:
        ``[m, n]`` in fp64.
    """
    mean = matrices.mean(0, dtype=torch.float64)
    gram = mean.new_zeros(matrices.shape[-1], matrices.shape[-1])
    right = torch.zeros_like(mean)
    for weight, matrix in zip(grams, matrices, strict=True):
        gram += weight.to(gram)  # from the encoder's device, which may be another
        right += (matrix.double() - mean) @ weight.to(gram)
    if eps:
        gram, right = without_rounding(gram, right, eps)
    return mean + ridge_solve(gram, right, ridge)


def _right_singular(tall: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values, descending, and right singular vectors as columns, of an fp64 matrix by its square."""
    return _descending(square(tall))


def _descending(gram: Tensor) -> tuple[Tensor, Tensor]:
    squares, vectors = torch.linalg.eigh(gram)
    return squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1)
