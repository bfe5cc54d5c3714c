"""No variant: every task uses the reference itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from byom.variants.base import PackingVariant, Parts, Shared


@dataclass(frozen=True)
class Nothing(PackingVariant):
    """Put nothing back: the merged model alone serves every task.

    Inference uses ``theta_merged`` with each task's own frozen head.
    """

    title = "merged model alone"
    stores = "nothing"
    on = "merged"

    def pack(self, name: str, target: Tensor, shared: Shared, plan: Any) -> Parts:
        """Store nothing."""
        return {}

    def unpack(self, parts: Parts, shared: Shared) -> Tensor:
        """Return the reference."""
        return shared.reference
