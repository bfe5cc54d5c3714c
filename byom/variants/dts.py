"""DTS: each matrix's largest singular vectors, every factor reduced to four values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from byom.errors import CheckpointError, OptionError, fraction, one_of
from byom.functional.linalg import truncated_svd
from byom.functional.selection import kept, top_mask
from byom.functional.tensors import wide
from byom.merge.base.matrices import is_matrix, is_stack
from byom.variants.base import PackingVariant, Parts, Shared, bits, integers, sparse

LEVELS = 4


@dataclass(frozen=True)
class DecompositionThresholdingScaling(PackingVariant):
    """Keep a matrix's largest singular vectors in two bits an entry: ``theta_0 + Q(U_k) diag(s_k) Q(Vt_k)``.

    ``U_k diag(s_k) Vt_k`` are the ``k = floor(share * min(m, n))`` largest singular values of ``tau_t``, but at least
    one, and their vectors. Q leaves each entry its sign: the larger half of the positive entries of a whole factor
    become the root of their mean square and the others the root of theirs, and so do the negative ones; what is 0 stays
    0. So the norm of a factor stays as it is. Tensors that are not matrices get Q itself, or are stored whole where
    that takes no more bytes. Experts of a mixture that lie in one tensor are one matrix each.

    Args:
        share: Fraction of a matrix's singular values that is kept, in (0, 1].
        reference: ``pretrained``, or ``merged``: what differs from the merged model is put back, as BYOM-FFT does.

    Raises:
        OptionError: If a hyperparameter is out of range.

    References:
        Stay Unique, Stay Efficient: Preserving Model Personality in Multi-Task Merging. https://arxiv.org/abs/2512.01461

    Differences:
        After the authors' code, whose share is 0.3 and whose differences are taken to the pre-trained model; on a
        merged one it is an option here. There the sign of a pair of singular vectors is LAPACK's, and the result
        depends on it since both signs have values of their own; here the largest entry of every left vector is
        positive. Where k is 0 a matrix keeps its pre-trained values there, and one with a side of 1 always does; here
        one singular value stays, and the latter get Q itself. Singular values that are rounding next to the largest
        are left out, and rows and columns that did not change stay so, where their SVD may return rounding that Q
        makes large. They count 3 bits an entry, 0 being a value; here it is two, and one more in factors that have
        a 0. The mean, not the root of the mean square, would be nearest to a group.
    """

    share: float = 0.3
    reference: Literal["pretrained", "merged"] = field(default="pretrained", kw_only=True)

    title = "DTS"
    stores = "two bits per entry of k (m + n), k singular values and 8 numbers per matrix; 2 bits per entry of others"

    @property
    def on(self) -> Literal["pretrained", "merged"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The model that differences are taken to, an option here."""
        return self.reference

    def __post_init__(self) -> None:
        if not fraction("byom.share", self.share):
            raise OptionError("byom.share=0 would keep nothing; use a fraction above 0 such as 0.3")
        one_of("byom.reference", self.reference, ("pretrained", "merged"))

    def pack(self, name: str, target: Tensor, shared: Shared, plan: Any) -> Parts:
        """Store the reduced factors of a matrix; other tensors reduced, or whole where that is no larger."""
        delta = wide(target) - wide(shared.reference)
        if not delta.numel() or not delta.any():
            return {}
        if is_matrix(name, target.shape) or is_stack(name, target.shape):
            return self._factored(delta.reshape(-1, *target.shape[-2:]))
        parts = reduced(delta.reshape(1, -1), "entries")
        plain = sparse.whole(target, shared.reference)
        return parts if _bytes(parts) < _bytes(plain) else plain

    def unpack(self, parts: Parts, shared: Shared) -> Tensor:
        """Add the product of the factors, or the reduced entries, or put all values back."""
        reference = shared.reference
        if "values" in parts:
            return sparse.assign(parts, reference)
        if "singular" not in parts:
            change = restored(parts, "entries", 1, reference.numel()).reshape(reference.shape)
            return (wide(reference) + change).to(reference.dtype)
        values, (rows, columns) = parts["singular"], reference.shape[-2:] if reference.ndim > 1 else (0, 0)
        experts, rank = values.shape
        if experts * rows * columns != reference.numel():
            raise CheckpointError(
                f"{experts} matrices do not fit a tensor of shape {tuple(reference.shape)}; pack or fetch it again"
            )
        left = restored(parts, "left", experts, rows * rank).reshape(experts, rows, rank) * values[:, None]
        right = restored(parts, "right", experts, rank * columns).reshape(experts, rank, columns)
        moved = torch.baddbmm(reference.to(left.dtype).reshape(experts, rows, columns), left, right)
        return moved.reshape(reference.shape).to(reference.dtype)

    def _factored(self, matrices: Tensor) -> Parts:
        rank = max(1, kept(self.share, min(matrices.shape[1:])))
        factors = [_singular(matrix, rank) for matrix in matrices]
        left, values, right = (torch.stack(each).to(matrices.dtype) for each in zip(*factors, strict=True))
        count = int((values > torch.finfo(values.dtype).eps * values[:, :1]).sum(1).max())
        left, values, right = left[..., :count], values[:, :count].contiguous(), right[:, :count]
        return reduced(left.flatten(1), "left") | {"singular": values} | reduced(right.flatten(1), "right")


def reduced(values: Tensor, name: str) -> Parts:
    """Reduce each row to four values: two of either sign.

    Args:
        values: ``[E, n]`` in fp32 or fp64, finite.
        name: What the parts are called.

    Returns:
        `name`, 2 bits for every entry: its sign, and whether it belongs to the larger half of its side. Their values
        ``[E, 4]``, `name`-levels: negative small and large, positive small and large. `name`-zeros, a bit for every
        entry, where one is 0.
    """
    codes, levels = torch.zeros(values.shape, dtype=torch.uint8), values.new_zeros(len(values), LEVELS)
    for row, code, level in zip(values, codes, levels, strict=True):
        for at, side in ((0, row < 0), (2, row > 0)):
            entries = row[side]
            large = top_mask(entries, 0.5)
            for half, sign in ((entries[~large], at), (entries[large], at + 1)):
                if len(half):
                    level[sign] = half.double().square().mean().sqrt() * (1 if at else -1)
            code[side.cpu()] = (at + large.to(torch.uint8)).cpu()
    zeros = values == 0
    parts = {name: integers.pack(codes, 2), f"{name}-levels": levels}
    return parts | ({f"{name}-zeros": bits.pack(zeros)} if zeros.any() else {})


def restored(parts: Parts, name: str, rows: int, length: int) -> Tensor:
    """Return the rows that `reduced` stands for.

    Args:
        parts: What it returned; other parts are ignored.
        name: What its parts are called.
        rows: How many (E).
        length: Entries of each (n).

    Returns:
        ``[E, n]`` in the dtype of the levels.

    Raises:
        CheckpointError: If the bytes are not those of as many entries.
    """
    levels = parts[f"{name}-levels"]
    if levels.shape != (rows, LEVELS):
        raise CheckpointError(
            f"levels of shape {tuple(levels.shape)} are not those of {rows} matrices; pack or fetch it again"
        )
    codes = integers.unpack(parts[name], 2, rows * length).reshape(rows, length)
    values = levels.gather(1, codes.long())
    if f"{name}-zeros" in parts:
        values[bits.unpack(parts[f"{name}-zeros"], rows * length).reshape(rows, length)] = 0
    return values


def _singular(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return singular vectors, the largest entry of every left one positive, 0 where a row or column is 0."""
    left, values, right = truncated_svd(matrix, rank)
    largest = left.gather(0, left.abs().argmax(0, keepdim=True))[0]
    signs = torch.where(largest < 0, -1.0, 1.0).to(left.dtype)
    return left * signs * matrix.any(1)[:, None], values, right * signs[:, None] * matrix.any(0)


def _bytes(parts: Parts) -> int:
    return sum(tensor.nbytes for tensor in parts.values())
