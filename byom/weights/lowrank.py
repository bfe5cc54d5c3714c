"""Differences that are known as products of thin factors, weights that carry them, and several of them as one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor

from byom.errors import CheckpointError, OptionError, listed, whole
from byom.functional.linalg import product_svd
from byom.functional.tensors import wide, widened
from byom.weights.spec import Spec
from byom.weights.weights import Weights

Site = tuple[int, int]  # first row, number of rows


class Piece(NamedTuple):
    """A low-rank difference of some rows of one parameter, seen as a matrix ``[shape[0], rest]``.

    Of experts of a mixture that lie in one tensor ``[E, m, n]``, each has its own: the matrix is ``[E m, n]``.

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
        specs = {n: Spec(base.shape(n), widened(base.dtype(n)) if n in moved else base.dtype(n)) for n in base}
        super().__init__(specs, self._moved, ties=base.ties, origin=origin, place=base.place)

    def pieces(self, name: str) -> Sequence[Piece]:
        """Return the low-rank differences of a parameter, none if it has none."""
        return self.factored.get(self._ties.get(name, name), ())

    def on(self, reference: Weights) -> bool:
        """Say whether the differences were taken to these weights."""
        return self.base is reference or self.base.fingerprint() == reference.fingerprint()

    def _moved(self, name: str) -> Tensor:
        value = self.replaced.get(name)
        value = self.base[name] if value is None else value.to(self.base.place(name))
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
    for piece in pieces:
        rows = moved.view(-1, piece.right.shape[1])
        rows[piece.start : piece.start + len(piece.left)].addmm_(piece.left.to(rows), piece.right.to(rows))
    return moved


def cat(experts: Mapping[str, Adapted], weights: Mapping[str, float]) -> Adapted:
    """Add adapters exactly: ``sum_t w_t s_t B_t A_t`` as one product, of rank ``r_1 + ... + r_T``.

    ``B = [w_1 s_1 B_1 ... w_T s_T B_T]`` and ``A`` the ``A_t`` one above the other. Nothing full-sized is formed.

    Args:
        experts: Task name to adapter, all of one base; ranks and adapted layers may differ.
        weights: Task name to its finite weight, of any sign (w_t).

    Returns:
        The base with the weighted sum; what was trained whole (biases, modules) as all experts have it.

    Raises:
        OptionError: If the weights are not those of the experts.
        CheckpointError: If `experts` is empty, bases differ, tensors that were trained whole differ, or one expert
            adapts rows together that another adapts apart.

    References:
        PEFT, ``add_weighted_adapter``, ``combination_type="cat"``.
        https://huggingface.co/docs/peft/developer_guides/model_merging

    Differences:
        PEFT's ``cat`` is the same sum, but for rsLoRA: 0.21.2 then multiplies every combination by the root of its
        rank. Its other types are left out, because the result depends on how a product was
        factored: ``linear`` adds the factors themselves, hence ``B_i A_j`` of different tasks, and ``ties``,
        ``dare_*`` and ``magnitude_prune`` prune B and A apart. Merge methods on the products do what they mean.
        PEFT keeps the tensors that one adapter alone trained whole; here they conflict with the base's.
    """
    base = _base(experts)
    if set(weights) != set(experts) or not all(isfinite(weight) for weight in weights.values()):
        raise OptionError(f"weights={dict(weights)} must give one finite number for each of {listed(experts)}")
    names = sorted({name for expert in experts.values() for name in expert.factored})
    by_name = {name: [(weights[t], piece) for t, e in experts.items() for piece in e.pieces(name)] for name in names}
    factored = {name: _joined(name, pieces) for name, pieces in by_name.items()}
    return Adapted(base, factored, _agreed(experts), " + ".join(expert.origin for expert in experts.values()))


def truncated(adapted: Adapted, rank: int) -> Adapted:
    """Keep the largest singular values of every low-rank difference: the nearest one of that rank.

    From the QR decompositions of the factors; the dense product is never formed.

    Args:
        adapted: An adapter, such as `cat` returns.
        rank: How many values are kept per layer (r), at least 1.

    Returns:
        The same base with differences of at most this rank; what was trained whole stays.

    Raises:
        OptionError: If the rank is not a whole number from 1 on.

    Differences:
        PEFT's ``svd`` (0.21.2) is this after `cat`, from the dense sum. Earlier versions multiply by ``s_t`` twice,
        which matters where ``s_t = alpha / r`` is not 1. Its ``svd_clamp`` has no counterpart.
    """
    whole("rank", rank, 1)
    factored = {name: [_cut(piece, rank) for piece in pieces] for name, pieces in adapted.factored.items()}
    return Adapted(adapted.base, factored, adapted.replaced, f"{adapted.origin} at rank {rank}")


def _base(experts: Mapping[str, Adapted]) -> Weights:
    if not experts:
        raise CheckpointError("there is no adapter to combine; give at least one task")
    first = next(iter(experts.values()))
    if other := [expert.origin for expert in experts.values() if not expert.on(first.base)]:
        raise CheckpointError(
            f"{other[0]} and {first.origin} adapt different base models; combine adapters of one base"
        )
    return first.base


def _joined(name: str, pieces: Sequence[tuple[float, Piece]]) -> list[Piece]:
    """Join the pieces of the same rows."""
    sites: dict[Site, list[tuple[float, Piece]]] = {}
    for weight, piece in pieces:
        sites.setdefault((piece.start, len(piece.left)), []).append((weight, piece))
    ends = [(start, start + height) for start, height in sorted(sites)]
    if any(end > start for (_, end), (start, _) in pairwise(ends)):
        raise CheckpointError(
            f"some adapters change rows of '{name}' together that others change apart (a fused attention matrix); "
            "merge them as weights instead, for example byom run merge=task_arithmetic"
        )
    return [_one(start, sites[start, height]) for start, height in sorted(sites)]


def _one(start: int, pieces: Sequence[tuple[float, Piece]]) -> Piece:
    left = torch.cat([weight * piece.left for weight, piece in pieces], 1)
    return Piece(start, left, torch.cat([piece.right for _, piece in pieces]))


def _agreed(experts: Mapping[str, Adapted]) -> dict[str, Tensor]:
    """Return what was trained whole, which must be the same in every expert, adapted or not."""
    every = list(experts.values())
    values = {name: value for expert in every for name, value in expert.replaced.items()}
    differing = [n for n, v in values.items() if any(not torch.equal(e.replaced.get(n, e.base[n]), v) for e in every)]
    if differing:
        raise CheckpointError(
            f"the adapters hold different values of {listed(sorted(differing))}, which were trained whole and have no "
            "sum as an adapter; merge the experts as weights (byom run merge=task_arithmetic), or train without them"
        )
    return values


def _cut(piece: Piece, rank: int) -> Piece:
    left, values, right = product_svd(piece.left.double(), piece.right.double())
    dtype = torch.promote_types(piece.left.dtype, piece.right.dtype)
    scaled = left[:, :rank] * values[:rank]
    return Piece(piece.start, scaled.to(dtype).contiguous(), right[:rank].to(dtype).contiguous())
