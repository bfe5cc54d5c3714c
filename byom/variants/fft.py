"""BYOM-FFT: merge, then put each task's largest remaining differences back."""

from __future__ import annotations

from dataclasses import dataclass

from byom.variants.base.rescaled import RescaledTopMagnitude


@dataclass(frozen=True)
class ByomFft(RescaledTopMagnitude):
    """Put back the top m % of ``theta_t - theta_merged`` by magnitude: inference uses ``theta_merged + v_t(m)``.

    Args:
        density: Fraction of entries kept (m), in [0, 1].
        scope: ``global``, ``tensor`` or ``row``.
        rescale: ``none``, ``norm``, ``free`` or ``dare``; see `RescaledTopMagnitude`.
        values: ``native``, or the bits of the differences that are put back; see `QuantisedVariant`.
        positions: ``bytes`` or ``entropy``; see `CompactVariant`.

    References:
        BYOM: Building Your Own Multi-Task Model For Free, section 3 (BYOM-FFT). https://arxiv.org/abs/2310.01886

    Differences:
        The paper does not say whether the top m % is taken over the whole model or per layer; the default is the
        whole model. No official code was found.
    """

    title = "BYOM-FFT"
    on = "merged"
