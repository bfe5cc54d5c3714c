"""No variant: every task uses the reference itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from byom.variants.base import Parts, Variant


@dataclass(frozen=True)
class Nothing(Variant):
    """Put nothing back: the merged model alone serves every task."""

    title = "merged model alone"
    reference = "merged"

    def pack(self, name: str, target: Tensor, reference: Tensor, plan: Any) -> Parts:
        """Store nothing."""
        return {}

    def unpack(self, parts: Parts, reference: Tensor) -> Tensor:
        """Return the reference."""
        return reference
