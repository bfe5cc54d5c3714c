"""Prune, then merge: one shared model of pruned task vectors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from byom.variants.base import PackingVariant, Parts, Shared
from byom.variants.base.pruned import Pruned
from byom.weights.cuts import Scope


@dataclass(frozen=True)
class PruneThenMerge(PackingVariant):
    """Merge models of which only the top m % of ``theta_t - theta_0`` is left, and put nothing back.

    Merging uses ``theta_0 + u_t(m)`` in place of ``theta_t``, where ``u_t(m)`` holds the top m % of
    ``theta_t - theta_0``.

    Args:
        density: Fraction of entries kept before merging (m), in [0, 1].
        scope: ``global``, ``tensor`` or ``row``.

    Raises:
        OptionError: If a hyperparameter is out of range.

    References:
        BYOM: Building Your Own Multi-Task Model For Free, section 3 (pruning before merging).
        https://arxiv.org/abs/2310.01886

    Differences:
        Trimming in TIES is this pruning: TIES at a density of at least m gives the same with or without it. Methods
        that use statistics of the fine-tuned models see those of the models before pruning.
    """

    density: float = 0.1
    scope: Scope = "global"

    title = "Pre-Pruning"
    stores = "nothing"
    on = "merged"

    def __post_init__(self) -> None:
        Pruned(self.density, self.scope)

    @property
    def before(self) -> Pruned:
        """Prune every task vector."""
        return Pruned(self.density, self.scope)

    def pack(self, name: str, target: Tensor, shared: Shared, plan: Any) -> Parts:
        """Store nothing."""
        return {}

    def unpack(self, parts: Parts, shared: Shared) -> Tensor:
        """Return the reference."""
        return shared.reference
