"""Prune, merge, prune: BYOM-FFT on a model that was merged from pruned task vectors."""

from __future__ import annotations

from dataclasses import dataclass

from byom.errors import fraction
from byom.variants.base.pruned import Pruned
from byom.variants.base.sparse import TopMagnitude


@dataclass(frozen=True)
class PruneMergePrune(TopMagnitude):
    """Merge pruned task vectors, then put back the top m % of what each whole task misses, as BYOM-FFT does.

    Merging uses ``theta_0 + u_t(before_density)`` in place of ``theta_t``; inference uses ``theta_merged + v_t(m)``,
    where ``v_t(m)`` holds the top m % of ``theta_t - theta_merged`` for the whole ``theta_t``.

    Args:
        density: Fraction of ``theta_t - theta_merged`` put back (m), in [0, 1].
        scope: ``global``, ``tensor`` or ``row``, for both prunings.
        before_density: Fraction of ``theta_t - theta_0`` kept before merging, in [0, 1]; 1 is BYOM-FFT.
        values: ``native``, or the bits of the differences that are put back; see `QuantisedVariant`.
        positions: ``bytes`` or ``entropy``; see `CompactVariant`.

    Raises:
        OptionError: If a hyperparameter is out of range.

    References:
        BYOM: Building Your Own Multi-Task Model For Free, section 3 (the orders of pruning and merging).
        https://arxiv.org/abs/2310.01886
    """

    before_density: float = 0.1

    title = "Pre-Pruning and BYOM-FFT"
    on = "merged"

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction("byom.before_density", self.before_density)

    @property
    def before(self) -> Pruned:
        """Prune every task vector."""
        return Pruned(self.before_density, self.scope)
