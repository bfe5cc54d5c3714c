"""Top-magnitude sparse differences: which entries, their positions in few bytes, and how they go back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from byom.errors import CheckpointError, OptionError, fraction
from byom.functional.rows import RowCut
from byom.functional.selection import Cut
from byom.functional.tensors import wide
from byom.variants.base import positions as encoding
from byom.variants.base.variant import PackingVariant, Parts, Shared
from byom.weights import Weights
from byom.weights.cuts import Cuts, cuts

PIECE = 1 << 18  # elements of a difference formed at a time: a whole one would be a copy of the tensor


@dataclass(frozen=True)
class TopMagnitude(PackingVariant):
    """Keep the target's own values where the difference to the reference is largest in magnitude.

    Values are the target's, not differences, and are assigned, not added: at density 1 the result is theta_t bit
    for bit, and at every kept position it is theta_t exactly, which ``reference + difference`` is not in floating
    point.

    Args:
        density: Fraction of entries kept (m), in [0, 1]; exactly ``floor(density * n)``, ties going to the lowest
            position in sorted parameter order.
        scope: ``global`` ranks all parameters of the model together, ``tensor`` each tensor on its own.

    Raises:
        OptionError: If a hyperparameter is out of range.
    """

    density: float = 0.1
    scope: Literal["global", "tensor"] = "global"

    stores = "m d values and their positions"

    def __post_init__(self) -> None:
        fraction("byom.density", self.density)
        if self.scope not in ("global", "tensor"):
            raise OptionError(f"byom.scope={self.scope} is not known; use global or tensor")

    def plan(self, target: Weights, reference: Weights, base: Weights | None = None) -> Cuts:
        """Find the cut of this density; every density of a sweep comes from one shared pass."""
        return cuts(target, reference, self.density, self.scope)

    def pack(self, name: str, target: Tensor, shared: Shared, plan: Cuts) -> Parts:
        """Store the target's values at the kept positions, and the positions."""
        cut, offset = plan[name]
        return gather(target, survivors(cut, target, shared.reference, offset))

    def unpack(self, parts: Parts, shared: Shared) -> Tensor:
        """Assign the stored values at their positions in a copy of the reference."""
        return assign(parts, shared.reference)


def survivors(cut: Cut | RowCut, target: Tensor, reference: Tensor, offset: int) -> Tensor:
    """Say which entries of ``target - reference`` a cut keeps, forming `PIECE` of the difference at a time.

    Args:
        cut: Where the stream of differences is cut.
        target: ``[*shape]``.
        reference: ``[*shape]``.
        offset: Flat index in the stream of the first entry.

    Returns:
        Bool ``[*shape]``.
    """
    mask = torch.empty(target.numel(), dtype=torch.bool, device=target.device)
    flat = target.reshape(-1), reference.reshape(-1)
    for start in range(0, len(mask), PIECE):
        left, right = (wide(each[start : start + PIECE]) for each in flat)
        mask[start : start + PIECE] = cut.mask(left - right, offset + start)
    return mask.reshape(target.shape)


def gather(values: Tensor, mask: Tensor) -> Parts:
    """Keep some values of a tensor.

    Args:
        values: ``[*shape]``.
        mask: Bool ``[*shape]``, what is kept.

    Returns:
        The kept values and their positions (`encoding`), nothing if none is kept.
    """
    positions = mask.reshape(-1).nonzero().reshape(-1)
    if not len(positions):
        return {}
    kind, data = encoding.encode(positions, values.numel())
    return {kind: data, "values": values.reshape(-1)[positions]}


def whole(values: Tensor, reference: Tensor) -> Parts:
    """Keep all values of a tensor, or nothing if the reference already has them.

    Args:
        values: ``[*shape]``.
        reference: ``[*shape]``.

    Returns:
        What `assign` puts back.
    """
    return {} if torch.equal(values, reference) else gather(values, torch.ones_like(values, dtype=torch.bool))


def assign(parts: Parts, reference: Tensor) -> Tensor:
    """Put kept values at their positions in a copy of the reference.

    Args:
        parts: What `gather` or `whole` returned.
        reference: ``[*shape]``; not modified.

    Returns:
        ``[*shape]``, in the reference's dtype.

    Raises:
        CheckpointError: If values and positions do not fit the reference.
    """
    values = parts["values"]
    if len(values) > reference.numel():
        raise CheckpointError(f"{len(values)} stored values do not fit a tensor of {reference.numel()}")
    kind = next(part for part in parts if part != "values")
    positions = encoding.decode(kind, parts[kind], reference.numel(), len(values))
    patched = reference.clone().reshape(-1)
    patched[positions] = values.to(patched.dtype)
    return patched.reshape(reference.shape)
