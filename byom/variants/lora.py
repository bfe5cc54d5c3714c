"""BYOM-LoRA: each task's adapter, cut to its largest singular values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal, Protocol

import torch
from torch import Tensor

from byom.errors import CheckpointError, one_of, whole
from byom.functional.linalg import product_svd, randomised_svd, truncated_svd
from byom.functional.seeding import keyed
from byom.functional.tensors import wide
from byom.merge.base.matrices import is_matrix, is_stack
from byom.storage import tensor_files as storage
from byom.variants.base import Parts, Shared, sparse
from byom.variants.base.quantised import QuantisedVariant
from byom.variants.base.variant import PacksFactors
from byom.weights import Weights
from byom.weights.lowrank import Adapted, Piece, add

KEPT = 32  # singular values found of a dense difference: every smaller rank of a sweep is a cut of them
Block = tuple[str, int]  # parameter and first row of a matrix in it
Factors = tuple[Tensor, Tensor, Tensor]  # U [m, k], s [k] descending, Vt [k, n]


@dataclass(frozen=True)
class ByomLora(QuantisedVariant, PacksFactors):
    """Keep the q largest singular values of each task's low-rank product: inference uses ``W_0 + U_q diag(s_q) Vt_q``.

    The product ``A_t B_tᵀ`` of an adapter (`byom.weights.lowrank.Adapted`) is factored by QR of its thin factors and
    never formed; where query, key and value lie in one fused matrix each has its own. Models that are not adapters on
    the reference get the same cut of ``theta_t - reference``, tensors with more than two axes seen as ``[shape[0],
    rest]``, and experts of a mixture that lie in one tensor ``[E, m, n]`` as one matrix each. A matrix costs
    ``q (m + n + 1)`` values: at ``q = r`` r more than the adapter itself, which ``byom=single_task`` stores. A sweep
    over q factors each task once, up to q = 32 where differences are dense.

    Args:
        rank: Singular values kept of each matrix (q), at least 1; all are kept of a matrix that has fewer.
        rank_allocation: ``uniform``, or ``global``: at most as many values, spent on the largest singular values of all
            matrices together. One that no longer fits is skipped, smaller ones of cheaper matrices may still fit.
        reference: ``pretrained``, or ``merged``: what differs from the merged model is put back, as BYOM-FFT does.
        solver: How dense differences are factored: ``exact``, to the rounding of fp32, or ``randomised``, which looks
            at the ``max(32, 4 q)`` largest singular values of a matrix and proves nothing.
        rest: ``whole`` stores tensors that are not matrices, or were trained whole alongside an adapter; ``drop``
            leaves them the reference's.
        seed: Seeds ``randomised``, together with the parameter's name.
        values: ``native``, or the bits of singular vectors and of other tensors; see `QuantisedVariant`.

    Raises:
        OptionError: If a hyperparameter is out of range.

    References:
        BYOM: Building Your Own Multi-Task Model For Free, section 3 (BYOM-LoRA). https://arxiv.org/abs/2310.01886

    Differences:
        The paper cuts every matrix at one q on the pre-trained model; ``global`` and ``merged`` are additions, and so
        are models that are not adapters. PEFT's ``lora_B`` is the paper's A, its ``lora_A`` the transpose of the
        paper's B, and its scale is folded in before the cut. Biases and modules trained whole, of which the paper says
        nothing, are kept and counted. PEFT's ``combination_type="svd"`` forms the dense product, stores the singular
        values in a factor, q values per matrix fewer, and leaves one adapter alone, whatever its ``svd_rank``: next to
        another of weight 0 its products are equal. No official code was found.
    """

    rank: int = 8
    rank_allocation: Literal["uniform", "global"] = "uniform"
    reference: Literal["pretrained", "merged"] = field(default="pretrained", kw_only=True)
    solver: Literal["exact", "randomised"] = "exact"
    rest: Literal["whole", "drop"] = "whole"
    seed: int = 0

    title = "BYOM-LoRA"
    low_rank = True
    stores = "q (m + n + 1) values per matrix, other trained tensors whole"

    @property
    def on(self) -> Literal["pretrained", "merged"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The model that differences are taken to, an option here."""
        return self.reference

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("byom.rank", self.rank, least=1)
        one_of("byom.rank_allocation", self.rank_allocation, ("uniform", "global"))
        one_of("byom.reference", self.reference, ("pretrained", "merged"))
        one_of("byom.solver", self.solver, ("exact", "randomised"))
        one_of("byom.rest", self.rest, ("whole", "drop"))

    def pack_factors(self, target: Adapted, reference: Weights) -> dict[str, Parts]:
        """Cut the products of one task's adapter, and store whole what was trained whole."""
        packed = self._cut(_Product(target))
        for name in target.replaced:
            packed[name] = self._rest(target[name].to(reference.dtype(name)), reference[name])
        return dict(sorted(packed.items()))

    def plan(self, target: Weights, reference: Weights, base: Weights | None = None) -> dict[str, Parts]:
        """Factor every matrix of a dense difference; what is held is what will be stored, and the known factors."""
        return self._cut(_Difference(target, reference, self))

    def pack(self, name: str, target: Tensor, shared: Shared, plan: dict[str, Parts]) -> Parts:
        """Store a matrix's factors, or all values of another tensor."""
        return plan.get(name, {}) if _matrices(name, target.shape) else self._rest(target, shared.reference)

    def unpack(self, parts: Parts, shared: Shared) -> Tensor:
        """Add the products to the reference, or put all values back."""
        if "values" in parts:
            return sparse.assign(parts, shared.reference)
        pieces = [_piece(parts, int(part.removeprefix("left@"))) for part in parts if part.startswith("left@")]
        for piece in pieces:
            _require_fit(piece, shared.reference)
        return add(shared.reference, pieces).to(shared.reference.dtype)

    def _rest(self, values: Tensor, reference: Tensor) -> Parts:
        return sparse.whole(values, reference) if self.rest == "whole" else {}

    def _cut(self, source: _Source) -> dict[str, Parts]:
        """Factor what the source has, and keep as much of each matrix as the allocation says."""
        plan: dict[str, Parts] = {}
        for (name, start), rank in sorted(self._ranks(source).items()):
            plan[name] = plan.get(name, {}) | _parts(source.top((name, start), rank), rank, start)
        return plan

    def _ranks(self, source: _Source) -> dict[Block, int]:
        if self.rank_allocation == "uniform":
            return dict.fromkeys(source.sides, self.rank)
        costs = {block: rows + columns + 1 for block, (rows, columns) in source.sides.items()}
        values = {block: source.values(block) for block in costs}
        budget = sum(min(self.rank, len(values[block])) * cost for block, cost in costs.items())
        return allocate(values, costs, budget)


def allocate(values: Mapping[Block, Tensor], costs: Mapping[Block, int], budget: int) -> dict[Block, int]:
    """Spend a budget on the largest singular values of all matrices, largest first, passing over what does not fit.

    Args:
        values: Each matrix's singular values ``[k]``, descending; equal ones go to the lowest block.
        costs: What one singular value of a matrix and its vectors cost.
        budget: What may be spent.

    Returns:
        How many each matrix keeps: always its largest.
    """
    ranks = dict.fromkeys(values, 0)
    ranked = sorted((-value, *block, i) for block, row in values.items() for i, value in enumerate(row.tolist()))
    for _, name, start, _ in ranked:
        cost = costs[name, start]
        if cost <= budget:  # once one of a matrix does not fit none of its smaller ones will: the budget only falls
            ranks[name, start] += 1
            budget -= cost
    return ranks


class _Source(Protocol):
    """Matrices of one task's difference that can be factored."""

    sides: dict[Block, tuple[int, int]]
    """Rows and columns."""

    def values(self, block: Block) -> Tensor:
        """Return a matrix's singular values, descending, without those that are rounding."""
        ...

    def top(self, block: Block, rank: int) -> Factors:
        """Return a matrix's largest singular values, at least `rank` if it has as many, and their vectors."""
        ...


class _Product:
    """The products of an adapter."""

    def __init__(self, target: Adapted) -> None:
        names = [name for name in sorted(target.factored) if name not in target.replaced]
        self._pieces = {(name, piece.start): piece for name in names for piece in target.pieces(name)}
        self._dtypes = {name: target.dtype(name) for name in names}
        self.sides = {at: (len(p.left), p.right.shape[1]) for at, p in self._pieces.items()}
        rows = [[*at, *map(storage.crc32, p[1:]), str(target.dtype(at[0]))] for at, p in self._pieces.items()]
        self._factors = _known(storage.digest(rows))

    def values(self, block: Block) -> Tensor:
        return self.top(block, 0)[1]

    def top(self, block: Block, rank: int) -> Factors:
        if block not in self._factors:
            piece = self._pieces[block]
            factored = product_svd(piece.left.double(), piece.right.double())
            self._factors[block] = _above_rounding(factored, self._dtypes[block[0]])
        return self._factors[block]


class _Difference:
    """The matrices of a dense difference, read and factored one at a time."""

    def __init__(self, target: Weights, reference: Weights, variant: ByomLora) -> None:
        self._target, self._reference, self._variant = target, reference, variant
        of = {name: _matrices(name, target.shape(name)) for name in target.mergeable()}
        self.sides = {(name, start): sides for name, blocks in of.items() for start, sides in blocks.items()}
        self._last: tuple[str, Tensor] = "", torch.empty(0)
        kind = ("exact", 0) if variant.solver == "exact" else ("randomised", variant.seed)
        place = {str(target.place(name)) for name in of}  # factors of a device are not those of another, bit for bit
        self._factors = _known(storage.digest([target.fingerprint(), reference.fingerprint(), *kind, *sorted(place)]))

    def values(self, block: Block) -> Tensor:
        """Return a matrix's singular values: the vectors of all of them would take twice the model's size."""
        if self._variant.solver == "randomised":
            return self.top(block, max(KEPT, 4 * self._variant.rank))[1]
        delta = self._delta(block)
        values = torch.linalg.svdvals(delta.double())
        return values[: _rank(values, delta.dtype)]

    def top(self, block: Block, rank: int) -> Factors:
        if rank > KEPT:
            return self._factored(block, rank)
        if block not in self._factors:
            self._factors[block] = self._factored(block, KEPT)
        return self._factors[block]

    def _factored(self, block: Block, rank: int) -> Factors:
        delta = self._delta(block)
        rank = min(rank, *delta.shape) if delta.any() else 0
        if self._variant.solver == "randomised":
            factors = randomised_svd(delta, rank, keyed(self._variant.seed, *block[: 1 + bool(block[1])]))
        else:
            factors = truncated_svd(delta, rank)
        return _above_rounding(factors, delta.dtype)

    def _delta(self, block: Block) -> Tensor:
        name, start = block
        rows, columns = self.sides[block]
        if self._last[0] != name:  # a tensor of many experts is read once
            target, reference = (w.read_finite(name) for w in (self._target, self._reference))
            self._last = name, wide(target) - wide(reference)
        return self._last[1].reshape(-1, columns)[start : start + rows]


@lru_cache(maxsize=16)  # keyed by content; in fp32 an entry is a task's adapter, or KEPT (m + n + 1) values per matrix
def _known(key: str) -> dict[Block, Factors]:
    return {}


def _above_rounding(factors: Factors, dtype: torch.dtype) -> Factors:
    """Cast factors, leaving out what the dtype cannot tell from 0 next to the largest singular value."""
    left, values, right = factors
    rank = _rank(values, dtype)
    return left[:, :rank].to(dtype), values[:rank].to(dtype), right[:rank].to(dtype)


def _rank(values: Tensor, dtype: torch.dtype) -> int:
    return int((values > torch.finfo(dtype).eps * values[:1]).sum())


def _parts(factors: Factors, rank: int, start: int) -> Parts:
    left, values, right = factors
    if not min(rank, len(values)):
        return {}
    cut = {"left": left[:, :rank], "singular": values[:rank], "right": right[:rank]}
    return {f"{part}@{start}": tensor.clone(memory_format=torch.contiguous_format) for part, tensor in cut.items()}


def _piece(parts: Parts, start: int) -> Piece:
    return Piece(start, parts[f"left@{start}"] * parts[f"singular@{start}"], parts[f"right@{start}"])


def _require_fit(piece: Piece, reference: Tensor) -> None:
    columns = piece.right.shape[1]
    known = columns == reference[:1].numel() or (reference.ndim == 3 and columns == reference.shape[2])
    if not known or piece.start + len(piece.left) > reference.numel() // columns:
        raise CheckpointError(
            f"factors {tuple(piece.left.shape)} and {tuple(piece.right.shape)} at row {piece.start} do not fit "
            f"a tensor of shape {tuple(reference.shape)}; pack or fetch it again"
        )


def _matrices(name: str, shape: tuple[int, ...]) -> dict[int, tuple[int, int]]:
    """Return the first row of every matrix in a parameter and its sides; nothing if there is none."""
    if is_stack(name, shape):
        experts, rows, columns = shape
        return {expert * rows: (rows, columns) for expert in range(experts)}
    sides = shape[0] if shape else 1, torch.Size(shape[1:]).numel()
    return {0: sides} if len(shape) >= 2 and is_matrix(name, sides) else {}
