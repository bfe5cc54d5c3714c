"""Top-magnitude sparse differences: which entries, their positions in few bytes, and how they go back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from byom.errors import fraction
from byom.functional.compiled import kernels
from byom.functional.election import Election
from byom.functional.rows import RowCut
from byom.functional.selection import Cut
from byom.functional.tensors import wide
from byom.variants.base import positions as encoding
from byom.variants.base.delta import Parts, Shared
from byom.variants.base.positions import decoded
from byom.variants.base.quantised import CompactVariant
from byom.variants.base.unpacker import Entries
from byom.weights import Weights
from byom.weights.cuts import Cuts, Scope, cuts, cuts_of_each, require_scope

PIECE = 1 << 18  # elements of a difference formed at a time: a whole one would be a copy of the tensor


@dataclass(frozen=True)
class SparseVariant(CompactVariant):
    """Keep some of the target's own values and their positions; `mask` says which.

    A subclass states its `title`, the model `on` which values are put back, and `mask`, such as the largest changes of
    every row::

        def mask(self, name, target, reference, plan):
            return top_mask(wide(target) - wide(reference), self.density, dim=-1)

    Values are the target's, not differences, and are assigned, not added: at density 1 the result is theta_t bit
    for bit, and at every kept position it is theta_t exactly, which ``reference + difference`` is not in floating
    point. A reference of a narrower dtype rounds them to it, once; ``Weights.to`` widens it.

    Args:
        density: Fraction of entries kept (m), in [0, 1].
        values: ``native``, or the bits in which differences are stored instead; see `QuantisedVariant`.
        positions: ``bytes`` or ``entropy``; see `CompactVariant`.

    Raises:
        OptionError: If a hyperparameter is out of range.
    """

    density: float = 0.1

    stores = "m d values and their positions"

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction("byom.density", self.density)

    @abstractmethod
    def mask(self, name: str, target: Tensor, reference: Tensor, plan: Any) -> Tensor:
        """Say which entries of one parameter are kept.

        Args:
            name: The parameter's name.
            target: ``[*shape]`` fine-tuned values.
            reference: ``[*shape]`` values of theta_merged or theta_0.
            plan: What `plan` returned: knowledge about the whole difference, None unless `plan` is overridden.

        Returns:
            Bool ``[*shape]``.
        """

    def pack(self, name: str, target: Tensor, shared: Shared, plan: Any) -> Parts:
        """Store the target's values at the kept positions, and the positions."""
        return gather(target, self.mask(name, target, shared.reference, plan))

    def unpack(self, parts: Parts, shared: Shared) -> Tensor:
        """Assign the stored values at their positions in a copy of the reference."""
        return assign(parts, shared.reference)

    def entries(self, parts: Parts, numel: int) -> Entries | None:
        """Return the stored values and their positions."""
        return entries(parts, numel)


@dataclass(frozen=True)
class TopMagnitude(SparseVariant):
    """Keep the target's own values where the difference to the reference is largest in magnitude.

    Args:
        density: Fraction of entries kept (m), in [0, 1]; exactly ``floor(density * n)`` of the n entries that are
            ranked together, ties going to the lowest position in sorted parameter order.
        scope: ``global`` ranks all parameters of the model together, ``tensor`` each tensor on its own, ``row`` each
            vector along the last axis of a tensor on its own.

    Raises:
        OptionError: If a hyperparameter is out of range.
    """

    scope: Scope = "global"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_scope("byom.scope", self.scope)

    def plan(self, target: Weights, reference: Weights, base: Weights | None = None) -> Cuts:
        """Find the cut of this density; every density of a sweep comes from one shared pass."""
        return cuts(target, reference, self.density, self.scope)

    @property
    def refuses(self) -> bool:
        """See `PackingVariant.refuses`: the cuts of a stream with NaN or infinity are not found."""
        return type(self).plan is TopMagnitude.plan

    def mask(self, name: str, target: Tensor, reference: Tensor, plan: Cuts) -> Tensor:
        """Say which entries lie above the cut."""
        cut, offset = plan[name]
        return survivors(cut, target, reference, offset)

    def pack(self, name: str, target: Tensor, shared: Shared, plan: Cuts) -> Parts:
        """Store the target's values at the kept positions, and the positions, without a mask where kernels do it."""
        election = Election.of(kernels(target.numel()), shared.reference, [target], [plan[name]], ())
        if election and type(self).mask is TopMagnitude.mask:
            return _stored(*election.survivors(), target.numel())
        return super().pack(name, target, shared, plan)

    def foresee(self, targets: Sequence[Weights], reference: Weights) -> None:
        """Find the cuts of as many tasks side by side as there are threads, for `plan` to find."""
        together = torch.get_num_threads()
        for start in range(0, len(targets), together):
            cuts_of_each(targets[start : start + together], reference, self.density, self.scope)


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
    return _stored(positions, values.reshape(-1)[positions], values.numel())


def _stored(positions: Tensor, values: Tensor, numel: int) -> Parts:
    if not len(positions):
        return {}
    kind, data = encoding.encode(positions, numel)
    return {kind: data, "values": values}


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
    positions, values = decoded(parts, reference.numel())
    patched = reference.clone().reshape(-1)
    patched[positions] = values.to(patched.dtype)
    return patched.reshape(reference.shape)


def entries(parts: Parts, numel: int) -> Entries | None:
    """Return what `assign` assigns; None if it has no values, or those of all entries, which need no positions.

    Args:
        parts: What a variant stored for one parameter.
        numel: Number of entries of the parameter.

    Raises:
        CheckpointError: If values and positions do not fit the parameter.
    """
    return None if "values" not in parts or "all" in parts else decoded(parts, numel)
