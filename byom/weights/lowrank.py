"""Differences that are known as products of thin factors, and weights that carry them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from byom.functional.tensors import wide
from byom.weights.weights import Spec, Weights


class Piece(NamedTuple):
    """A low-rank difference of some rows of one parameter, seen as a matrix ``[shape[0], rest]``.

    Args:
        start: First of the rows; above 0 for the later parts of a fused attention matrix.
        left: ``[m, r]`` in fp32 or fp64, every scale folded in.
        right: ``[r, n]``.
    """

    start: int
    left: Tensor
    right: Tensor


class Adapted(Weights):
    """A base model plus low-rank differences, read one parameter at a time: nothing full-sized is stored.

    Every merge method takes it as any other `Weights`; `pieces` gives the factors to what can use them. Adapted
    parameters are fp32 (fp64 where the base is) whatever the base's dtype: half precision would round most of a small
    difference away before anything could be merged.

    Args:
        base: The model that was adapted.
        factored: Parameter name (of tied ones, the canonical) to its differences; none for what was not adapted.
        replaced: Parameter name to trained values of the same shape (biases, ``modules_to_save``).
        origin: What error messages call these weights.
    """

    def __init__(
        self,
        base: Weights,
        factored: Mapping[str, Sequence[Piece]],
        replaced: Mapping[str, Tensor] | None = None,
        origin: str = "adapted",
    ) -> None:
        self.base, self.factored, self.replaced = base, dict(factored), dict(replaced or {})
        moved = {name for name in base if base.ties.get(name, name) in factored}
        specs = {n: Spec(base.shape(n), _widened(base.dtype(n)) if n in moved else base.dtype(n)) for n in base}
        super().__init__(specs, self._moved, ties=base.ties, origin=origin)

    def pieces(self, name: str) -> Sequence[Piece]:
        """Return the low-rank differences of a parameter, none if it has none."""
        return self.factored.get(self._ties.get(name, name), ())

    def on(self, reference: Weights) -> bool:
        """Say whether the differences were taken to these weights."""
        return self.base is reference or self.base.fingerprint() == reference.fingerprint()

    def _moved(self, name: str) -> Tensor:
        value = self.replaced.get(name)
        value = self.base[name] if value is None else value
        return add(value, self.factored[name]) if name in self.factored else value


def add(value: Tensor, pieces: Sequence[Piece]) -> Tensor:
    """Add low-rank differences to a parameter.

    Args:
        value: ``[*shape]``; not modified.
        pieces: What is added, to disjoint rows.

    Returns:
        ``[*shape]`` in fp32, or in fp64 where the parameter is.
    """
    moved = wide(value).clone(memory_format=torch.contiguous_format)
    rows = moved.reshape(len(moved), -1)
    for piece in pieces:
        rows[piece.start : piece.start + len(piece.left)].addmm_(piece.left.to(rows.dtype), piece.right.to(rows.dtype))
    return moved


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


def _widened(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
