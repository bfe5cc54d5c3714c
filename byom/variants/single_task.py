"""Each task keeps its own fine-tuned model: the reference row, and the cost that merging avoids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from byom.variants.base import PackingVariant, Parts, Shared


@dataclass(frozen=True)
class SingleTask(PackingVariant):
    """Store every fine-tuned model whole: T models instead of one."""

    title = "Single-task"
    stores = "the whole model"
    reference = "pretrained"
    shares_reference = False

    def pack(self, name: str, target: Tensor, shared: Shared, plan: Any) -> Parts:
        """Store all values."""
        return {"values": target}

    def unpack(self, parts: Parts, shared: Shared) -> Tensor:
        """Return theta_t."""
        return parts["values"].reshape(shared.reference.shape)
