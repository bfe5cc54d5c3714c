"""What one task changes in a live model: entries at positions, or whole tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from byom.checkpoint.slots import KEEP, Slot
from byom.errors import CheckpointError, listed
from byom.functional.tensors import narrowed
from byom.variants.base.delta import OWN, READOUT, WHOLE, Delta, Served
from byom.weights import Weights

PIECE = 1 << 18  # entries of a tensor visited at a time on a CPU: written, read and written again while in its cache


@dataclass(frozen=True)
class Sparse:
    """The entries of one tensor that a task assigns.

    Args:
        positions: ``[k]`` flat and ascending, int32 where they fit: half the bytes, and 1.1 times the time, of int64.
        values: ``[k]``, in the dtype in which they are stored.
        rounded: The reference's dtype, to which the values are rounded first.
        decoded: Whether the values are not the bundle's own, which holds them in fewer bits.
    """

    positions: Tensor
    values: Tensor
    rounded: torch.dtype
    decoded: bool = False

    def cast(self, like: Tensor) -> Tensor:
        """Return the values as a tensor's dtype and device have them."""
        return self.values.to(self.rounded).to(like.dtype).to(like.device)


@dataclass(frozen=True)
class Patch:
    """One task's changes of a live model.

    Args:
        sparse: The tensors of which single entries change.
        whole: The tensors that are written whole, each by the name under which the task has it.
        weights: The task's weights, lazy.
        title: The variant's.
        corrects: Whether the task also corrects what its head is given, which no weight holds.
    """

    sparse: Mapping[Slot, Sparse]
    whole: Mapping[Slot, str]
    weights: Weights
    title: str
    corrects: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of decoded positions, and of values that are not the bundle's own."""
        return sum(e.positions.nbytes + e.values.nbytes * e.decoded for e in self.sparse.values())

    @property
    def road(self) -> str:
        """How the changes are made, in one line."""
        entries = sum(len(each.positions) for each in self.sparse.values())
        ways = [f"{entries:,} entries of {len(self.sparse)} tensors in place"] if self.sparse else []
        ways += [f"{len(self.whole)} tensors whole"] if self.whole else []
        rest = "; its correction of features is no weight: apply Delta.readout to the head" if self.corrects else ""
        return f"{self.title}: {' and '.join(ways) or 'no weights change'}{rest}"


def prepare(served: Served, task: str, slots: Sequence[Slot]) -> Patch:
    """Decode what a task changes, once.

    Args:
        served: The shared models and packed differences.
        task: The task's name.
        slots: The model's tensors.

    Returns:
        The changes.

    Raises:
        OptionError: If there is no such task.
        CheckpointError: If the model has no place for a value, ties what the task has apart, or its dtype is too
            narrow.
    """
    weights = served.weights(task)
    delta, ties = served.deltas[task], weights.ties
    names = delta.parts.keys() - {READOUT, WHOLE}
    if lost := sorted(names - {ties.get(name, name) for slot in slots for name in slot.names}):
        raise CheckpointError(
            f"the task '{task}' changes {listed(lost)}, which the model computes in its own way or does not have; "
            "attach a model of the reference's architecture"
        )
    sparse: dict[Slot, Sparse] = {}
    whole: dict[Slot, str] = {}
    for slot in slots:
        values = sorted({ties.get(name, name) for name in slot.names})
        if not names.intersection(values):
            continue
        if len(values) > 1:
            _require_one(slot, values, weights, task)
        found = _sparse(delta, values[0], slot, weights, served.reference) if len(values) == 1 else None
        if found is None:
            whole[slot] = values[0]
        else:
            sparse[slot] = found
    return Patch(sparse, whole, weights, delta.variant.title, READOUT in delta.parts)


def _sparse(delta: Delta, name: str, slot: Slot, weights: Weights, reference: Weights) -> Sparse | None:
    stored, tensor = delta.parts[name], slot.tensor
    if OWN in stored or not tensor.is_contiguous() or tensor.itemsize == 1:  # torch scatters nothing of 8 bits
        return None
    parts = delta.restored(name, lambda: reference[name])
    entries = delta.variant.entries(parts, tensor.numel())
    if entries is None:
        return None
    small = tensor.numel() <= torch.iinfo(torch.int32).max
    positions = entries.positions.to(torch.int32) if small else entries.positions
    what = f"{weights.origin}: tensor '{name}'"
    rounded = narrowed(entries.values, weights.dtype(name), what)
    narrowed(rounded, tensor.dtype, what, KEEP)
    return Sparse(positions.to(tensor.device), entries.values, weights.dtype(name), "values" not in stored)


def _require_one(slot: Slot, names: Sequence[str], weights: Weights, task: str) -> None:
    first = slot.value(weights, names[0])
    for name in names[1:]:
        if not torch.equal(first, slot.value(weights, name)):
            raise CheckpointError(
                f"'{names[0]}' and '{name}' are one tensor in the model, and the task '{task}' has different values "
                "of them; untie them in the model (transformers: config.tie_word_embeddings=False) and attach it again"
            )


def write(slot: Slot, old: tuple[Sparse, Tensor] | None, new: Sparse | None) -> Tensor | None:
    """Put the overwritten entries of one tensor back, and overwrite others.

    Args:
        slot: The model's tensor.
        old: Entries that were overwritten, and the values that were there; None if none was.
        new: Entries to overwrite; None for none.

    Returns:
        What `new` overwrote ``[k]``.
    """
    flat = slot.tensor.view(-1)
    step = PIECE if flat.device.type == "cpu" else max(1, len(flat))
    ends = [*range(0, len(flat), step), len(flat)]
    before, values = old and old[1].to(flat.device), new and new.cast(flat)
    saved = None if values is None else torch.empty_like(values)
    for one, other in zip(_cut(old and old[0], ends), _cut(new, ends), strict=True):
        if old is not None and before is not None:
            flat.scatter_(0, _places(old[0], one, flat), before[one])
        if new is not None and values is not None and saved is not None:
            places = _places(new, other, flat)
            torch.index_select(flat, 0, places, out=saved[other])
            flat.scatter_(0, places, values[other])
    return saved


def _places(sparse: Sparse, piece: slice, flat: Tensor) -> Tensor:
    return sparse.positions[piece].to(flat.device, torch.int64)


def _cut(sparse: Sparse | None, ends: Sequence[int]) -> list[slice]:
    """Return which of a tensor's changed entries lie in each of its pieces."""
    if sparse is None:
        return [slice(0, 0)] * (len(ends) - 1)
    positions = sparse.positions
    at = torch.searchsorted(positions, torch.tensor(ends, dtype=positions.dtype, device=positions.device)).tolist()
    return [slice(low, high) for low, high in pairwise(at)]
