"""Post-pruning: prune each task vector, without merging."""

from __future__ import annotations

from dataclasses import dataclass

from byom.variants.base.rescaled import RescaledTopMagnitude


@dataclass(frozen=True)
class PostPruning(RescaledTopMagnitude):
    """Put back the top m % of ``theta_t - theta_0`` on the pre-trained model; no merged model is involved.

    Inference uses ``theta_0 + u_t(m)``, where ``u_t(m)`` holds the top m % of ``theta_t - theta_0``.

    Args:
        density: Fraction of entries kept (m), in [0, 1].
        scope: ``global``, ``tensor`` or ``row``.
        rescale: ``none``, ``norm``, ``free`` or ``dare``; see `RescaledTopMagnitude`.
        values: ``native``, or the bits of the differences that are put back; see `QuantisedVariant`.
        positions: ``bytes`` or ``entropy``; see `CompactVariant`.

    References:
        BYOM: Building Your Own Multi-Task Model For Free, section 3 (the Post-Pruning baseline).
        https://arxiv.org/abs/2310.01886
    """

    title = "Post-Pruning"
    on = "pretrained"
