"""TALL-masks: what of the merged model each task switches on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from byom.errors import at_least
from byom.functional.deltas import tall_mask
from byom.functional.tensors import wide
from byom.variants.base import PackingVariant, Parts, Shared, bits


@dataclass(frozen=True)
class TallMasks(PackingVariant):
    """Give each task the merged value where its own change outweighs the others', and theta_0 elsewhere.

    ``m_t = [|tau_t| > mask_scale * |tau_MTL - tau_t|]`` with ``tau_MTL = theta_merged - theta_0``; inference uses
    ``theta_0 + m_t * tau_MTL``, which is theta_merged where the mask is set: no arithmetic, hence no rounding.

    Args:
        mask_scale: How much a change must outweigh the rest (lambda_t), at least 0; a larger one masks more, and 0
            keeps the merged value wherever the task changed anything.

    Raises:
        OptionError: If `mask_scale` is negative or not finite.

    References:
        Localizing Task Information for Improved Model Merging and Compression, section 4.
        https://arxiv.org/abs/2405.07813

    Differences:
        The paper masks the plain sum of the task vectors (``merge=task_arithmetic merge.scale=1``) or TIES; here it
        is whatever was merged, and only that sum restores one task alone, or tasks that change different
        parameters. The authors choose lambda_t for every task from 0.2, 0.3, ..., 0.6 on validation data, and
        fusion-bench fixes 0.6; here all tasks have the same. Their code compares against ``theta_0 + tau_MTL -
        theta_t``, whose rounding can mask a small change of a task that is alone; here tau_t is subtracted.
    """

    mask_scale: float = 0.4

    title = "TALL-masks"
    stores = "one bit per parameter; the pre-trained model is shared alongside the merged one"
    on = "merged"
    shares_base = True

    def __post_init__(self) -> None:
        at_least("byom.mask_scale", self.mask_scale, 0, example="0.4; the authors search 0.2 to 0.6")

    def pack(self, name: str, target: Tensor, shared: Shared, plan: Any) -> Parts:
        """Store the mask, unless the merged values serve the task as they are."""
        assert shared.base is not None  # delta has seen to it
        base = wide(shared.base)
        mask = tall_mask(wide(target) - base, wide(shared.reference) - base, self.mask_scale)
        return {} if (mask | (shared.reference == shared.base)).all() else {"mask": bits.pack(mask)}

    def unpack(self, parts: Parts, shared: Shared) -> Tensor:
        """Return the merged value where the mask is set and theta_0 elsewhere."""
        assert shared.base is not None  # Delta.apply has seen to it
        mask = bits.unpack(parts["mask"], shared.base.numel()).reshape(shared.base.shape)
        return torch.where(mask, shared.reference, shared.base)
