"""T-Switch: a task vector reduced to signs and one magnitude per tensor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from byom.errors import OptionError, fraction
from byom.functional.selection import kept, top_mask
from byom.functional.tensors import wide
from byom.variants.base import PackingVariant, Parts, Shared, bits, sparse


@dataclass(frozen=True)
class BinaryTaskSwitch(PackingVariant):
    """Keep the signs of each tensor's largest changes, and one magnitude that restores their norm.

    Of the positive and of the negative entries of ``tau_t`` the ``floor(n_side * (1 - drop))`` largest survive, all
    of a side where that is 0; with ``b`` their signs, inference uses ``theta_0 + |tau_kept|_2 / |b|_2 * b``.
    Tensors without axes are stored as they are.

    Args:
        drop: Fraction of each side that is dropped (alpha), in [0, 1); ties survive by lowest position.

    Raises:
        OptionError: If `drop` is out of range.

    References:
        Less is More: Efficient Model Merging with Binary Task Switch, section 4. https://arxiv.org/abs/2412.00054

    Differences:
        The paper has one scale per task; the authors' code, and this, one per tensor. Their code keeps all ties at the
        threshold, and ``int(10 * (1 - 0.9))`` of their counts is 0; here counts are exact. Their packing needs sizes
        that are multiples of 4 and keeps no scale; ours is described in `byom.variants.base.bits`. They use 0.6 for
        fully fine-tuned models and 0.4 for LoRA of rank 64.
    """

    drop: float = 0.6

    title = "T-Switch"
    stores = "one bit per parameter or less, one bit per kept sign, one scale per tensor"
    on = "pretrained"

    def __post_init__(self) -> None:
        if fraction("byom.drop", self.drop) == 1:
            raise OptionError("byom.drop=1 would keep nothing; use a fraction below 1 such as 0.6")

    def pack(self, name: str, target: Tensor, shared: Shared, plan: Any) -> Parts:
        """Store signs and their scale; all values of a tensor without axes."""
        if not target.ndim:
            return sparse.whole(target, shared.reference)
        signs, scale = binarise(wide(target) - wide(shared.reference), self.drop)
        return {**bits.pack_signs(signs), "scale": scale} if scale > 0 else {}

    def unpack(self, parts: Parts, shared: Shared) -> Tensor:
        """Add the scaled signs to theta_0."""
        reference = shared.reference
        if "values" in parts:
            return sparse.assign(parts, reference)
        signs = bits.unpack_signs(parts, reference.numel()).reshape(reference.shape)
        return (wide(reference) + parts["scale"] * signs).to(reference.dtype)


def binarise(delta: Tensor, drop: float) -> tuple[Tensor, Tensor]:
    """Reduce a tensor to signs and one magnitude.

    Args:
        delta: ``[*shape]`` in fp32 or fp64.
        drop: Fraction of the positive, and of the negative, entries that become 0.

    Returns:
        Int8 ``[*shape]`` with values -1, 0 and 1 (b), and the magnitude, in the dtype of `delta`, that gives them the
        norm of the entries they stand for; 0 if all became 0.
    """
    flat = delta.reshape(-1)
    survives = _largest(flat, flat > 0, 1 - drop) | _largest(flat, flat < 0, 1 - drop)
    norm = flat[survives].double().norm() / max(1, int(survives.sum())) ** 0.5
    return (flat.sign() * survives).to(torch.int8).reshape(delta.shape), norm.to(delta.dtype)


def _largest(flat: Tensor, side: Tensor, density: float) -> Tensor:
    """Say which entries of one side survive: exactly as many as the density says, or all where that is 0."""
    values = flat[side]
    return side.masked_scatter(side, top_mask(values, density if kept(density, len(values)) else 1.0))
