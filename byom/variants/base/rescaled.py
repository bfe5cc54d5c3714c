"""Making up for what a sparse difference leaves out: one factor per tensor on what is put back."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from byom.errors import one_of
from byom.functional.tensors import wide
from byom.storage.signature import ADDED
from byom.variants.base.delta import Parts, Shared
from byom.variants.base.positions import decoded
from byom.variants.base.sparse import TopMagnitude

Rescale = Literal["none", "norm", "free", "dare"]


@dataclass(frozen=True)
class RescaledTopMagnitude(TopMagnitude):
    """Put back the largest differences, enlarged to make up for those that are left out.

    Of a tensor with differences u, of which v is kept, ``reference + factor * v`` is stored at the kept positions; a
    tensor of which all entries are kept, or none, is not rescaled.

    Args:
        density: Fraction of entries kept (m), in [0, 1].
        scope: ``global``, ``tensor`` or ``row``.
        rescale: ``none``, 1: the target's own values. ``norm``, ``||u||_2 / ||v||_2``, which T-Switch takes. ``free``,
            ``-log10(density) mean|v| / mean|u|``, as FREE-Merging's code has it. ``dare``, ``1 / density``, which keeps
            the expectation of differences that were drawn at random and is far too much for the largest ones.

    Raises:
        OptionError: If a hyperparameter is out of range.
    """

    rescale: Rescale = field(default="none", metadata=ADDED)

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("byom.rescale", self.rescale, get_args(Rescale))

    def pack(self, name: str, target: Tensor, shared: Shared, plan: Any) -> Parts:
        """Store the kept entries' values and positions; the values are rescaled where that is asked for."""
        parts = super().pack(name, target, shared, plan)
        if self.rescale == "none" or not parts or len(parts["values"]) == target.numel():
            return parts
        positions, values = decoded(parts, target.numel())
        at = wide(shared.reference.reshape(-1)[positions])
        kept = wide(values) - at
        differences = (wide(target) - wide(shared.reference)).reshape(-1)
        return parts | {"values": (at + self._factor(differences, kept) * kept).to(values.dtype)}

    def _factor(self, differences: Tensor, kept: Tensor) -> float:
        """Return the factor from all differences of a tensor and the kept ones, of which there is one at least."""
        if self.rescale == "dare":
            return 1 / self.density
        if self.rescale == "norm":
            whole, part = (float(torch.linalg.vector_norm(each, dtype=torch.float64)) for each in (differences, kept))
            return whole / part if part else 1.0
        mean = float(differences.abs().mean(dtype=torch.float64))
        return -math.log10(self.density) * float(kept.abs().mean(dtype=torch.float64)) / mean if mean else 1.0
