"""Each task keeps its own fine-tuned model: the reference row, and the cost that merging avoids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from byom.merge.base import Problem
from byom.variants.base import PackingVariant, Parts, Shared
from byom.variants.base.variant import PacksFactors, adapts
from byom.weights import Weights
from byom.weights.lowrank import Adapted, Piece, add


@dataclass(frozen=True)
class SingleTask(PackingVariant):
    """Store every fine-tuned model whole, T models instead of one, or its adapter where every task has one.

    Inference uses ``theta_t`` itself: the accuracy that every merged model is compared with.

    Adapters are stored as `SingleTaskAdapters` says, alongside the one model that all of them were trained on.
    """

    title = "Single-task"
    low_rank = True
    stores = "the whole model, or its adapter"
    on = "pretrained"
    shares_reference = False

    def suited(self, problem: Problem, reference: Weights) -> SingleTask:
        """Store every task's adapter, or every model if one of them has none; see `PackingVariant.suited`."""
        thin = all(adapts(expert, reference) for expert in problem.finetuned.values())
        return SingleTaskAdapters() if thin else self

    def pack(self, name: str, target: Tensor, shared: Shared, plan: Any) -> Parts:
        """Store all values."""
        return {"values": target}

    def unpack(self, parts: Parts, shared: Shared) -> Tensor:
        """Return theta_t."""
        return parts["values"].reshape(shared.reference.shape)


@dataclass(frozen=True)
class SingleTaskAdapters(SingleTask, PacksFactors):
    """Store each task's low-rank factors, ``r (m + n)`` values per matrix, and whole what was trained alongside them.

    What is put back has the bits of the adapted weights, in the dtype of the model that was adapted.
    """

    stores = "its adapter"
    shares_reference = True

    def pack_factors(self, target: Adapted, reference: Weights) -> dict[str, Parts]:
        """Store one task's factors, and whole what was trained whole."""
        return {name: _stored(target, name) for name in sorted({*target.factored, *target.replaced})}

    def unpack(self, parts: Parts, shared: Shared) -> Tensor:
        """Add the products to theta_0, or to what took its place."""
        value = parts["values"].reshape(shared.reference.shape) if "values" in parts else shared.reference
        starts = [int(part.removeprefix("left@")) for part in parts if part.startswith("left@")]
        return add(value, [Piece(at, parts[f"left@{at}"], parts[f"right@{at}"]) for at in starts]) if starts else value


def _stored(target: Adapted, name: str) -> Parts:
    parts = {"values": target.replaced[name]} if name in target.replaced else {}
    for piece in target.pieces(name):
        parts |= {f"left@{piece.start}": piece.left, f"right@{piece.start}": piece.right}
    return parts
