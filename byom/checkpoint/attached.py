"""A live model that is switched between the tasks of a bundle, in place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from types import TracebackType

import torch
from torch import Tensor, nn

from byom.checkpoint.changes import Patch, Sparse, prepare, write
from byom.checkpoint.heads import Heads
from byom.checkpoint.slots import (
    LOAD,
    Slot,
    fill,
    places_of,
    require_apart,
    require_reference,
    slots_of,
)
from byom.errors import CheckpointError, OptionError, suggest, whole
from byom.variants.base.delta import Served
from byom.weights import Weights

Kind = tuple[torch.dtype, tuple[int, ...]]  # a tensor's dtype and strides
State = tuple[Kind, torch.device, int, int]  # its kind and place, and how often it was written


class Attached:
    """A model whose weights are those of one task at a time; `Bundle.attach` makes it.

    What a switch costs depends on what differs between the two tasks. A sparse variant's entries are written at their
    positions, which are decoded when a task is first used and kept: 4 bytes an entry (8 in a tensor of more than
    2^31), next to the values that the bundle holds. Values that they overwrite are kept while the task is on. All
    other variants have no in-place form: tensors that the task changes are computed one at a time and written whole,
    and what they overwrite is read again from the bundle's reference. `road` says which it is.

    A handle is not safe for threads: a model must not compute while it is switched, nor be switched twice at once.
    Copies of the weights (frozen graphs, exported models, replicas on other devices) do not follow; modules that
    `torch.compile` compiled do.

    Args:
        served: The shared models and packed differences.
        model: The live model.
        heads: Task name to the tensors of the task's own head.
        load: Whether the reference is written into the model first.
        cache_bytes: How many bytes of decoded positions are kept at most, beside those of the task that is on.

    Raises:
        CheckpointError: If the model cannot be switched; see `Bundle.attach`.
        OptionError: If `cache_bytes` is no whole number from 0 on.
    """

    def __init__(
        self,
        served: Served,
        model: nn.Module,
        heads: Mapping[str, Weights] | None = None,
        *,
        load: bool = False,
        cache_bytes: int | None = None,
    ) -> None:
        if cache_bytes is not None:
            whole("cache_bytes", cache_bytes, least=0)
        places = places_of(model)
        self._served, self._budget = served, cache_bytes
        self._slots, added = slots_of(places, served.reference)
        self._heads = Heads(heads or {}, model, places, self._slots, added)
        require_apart(self._slots, _tensors(served))
        with torch.no_grad():
            if load:
                fill(self._slots, served.reference)
            require_reference(self._slots, served.reference)
        self._task: str | None = None
        self._saved: dict[Slot, tuple[Sparse, Tensor]] = {}
        self._patches: OrderedDict[str, Patch] = OrderedDict()
        self._ended = ""
        self._states = self._look()

    @property
    def task(self) -> str | None:
        """The task whose weights the model has; None for the reference.

        Raises:
            OptionError: If the handle was detached.
            CheckpointError: If a switch was cut short, and the model is neither.
        """
        self._require_usable()
        return self._task

    @property
    def cached_bytes(self) -> int:
        """Bytes of the positions, and of values of fewer bits, that are kept decoded."""
        return sum(patch.nbytes for patch in self._patches.values())

    @property
    def saved_bytes(self) -> int:
        """Bytes of the values that the task's entries have overwritten."""
        return sum(values.nbytes for _, values in self._saved.values())

    def road(self, task: str) -> str:
        """Say in one line how a task is switched on: entries in place, or whole tensors; this decodes the task.

        Raises:
            OptionError: If the bundle does not hold the task.
            CheckpointError: If the task does not fit the model.
        """
        self._require_usable()
        patch = self._prepared(task)
        self._trim()
        return patch.road

    def switch(self, task: str | None) -> Switched:
        """Give the model a task's weights, and its head if the bundle has one.

        Args:
            task: The task; None for the reference.

        Returns:
            A context manager, which switches back to the task before when it is left; it may be ignored.

        Raises:
            OptionError: If the bundle does not hold the task, or the handle was detached.
            CheckpointError: If the task does not fit the model, or the model was changed since the last switch. Then
                nothing changes. An error while weights are written leaves the reference, and `task` None.
        """
        self._require_usable()
        before = self._task
        if task != before:
            self._switch(None if task is None else self._prepared(task), task)
            self._trim()
        else:
            self._require_unchanged()
        return Switched(self, before)

    def detach(self) -> None:
        """Put the reference back, and the model's own head, and end the handle.

        Raises:
            OptionError: If the handle was detached before.
            CheckpointError: If the model was changed since the last switch.
        """
        self.switch(None)
        self._ended = "the handle was detached; attach the bundle again"
        self._patches.clear()

    def __repr__(self) -> str:
        if self._ended:
            return f"Attached({self._ended})"
        return f"Attached(task={self._task!r}, {len(self._served.deltas)} tasks, {len(self._slots)} tensors)"

    def _prepared(self, task: str) -> Patch:
        if task not in self._patches:
            if task not in self._served.deltas:
                raise OptionError(f"the bundle has no task '{task}'; {suggest(task, self._served.deltas)}")
            self._heads.require(task)
            self._patches[task] = prepare(self._served, task, self._slots)
        self._patches.move_to_end(task)
        return self._patches[task]

    def _switch(self, new: Patch | None, task: str | None) -> None:
        self._require_unchanged()
        old = self._patches.get(self._task) if self._task is not None else None
        touched = [slot for slot in self._slots if _touches(old, slot) or _touches(new, slot)]
        self._ended = f"a switch to {task!r} was cut short, and the model is in no defined state; use {LOAD}"
        try:
            with torch.no_grad():
                for slot in touched:
                    self._move(slot, old, new)
                self._heads.switch(task)
        except BaseException:
            self._recover(touched)
            raise
        self._settle(task)

    def _move(self, slot: Slot, old: Patch | None, new: Patch | None) -> None:
        saved = self._saved.pop(slot, None)
        if new and slot in new.whole:
            slot.fill(slot.value(new.weights, new.whole[slot]))
            return
        if old and slot in old.whole:
            slot.fill(slot.value(self._served.reference))
        sparse = new and new.sparse.get(slot)
        if sparse or saved:
            overwritten = write(slot, saved, sparse)
            if sparse and overwritten is not None:
                self._saved[slot] = sparse, overwritten

    def _recover(self, touched: list[Slot]) -> None:
        with torch.no_grad():
            for slot in touched:
                slot.fill(slot.value(self._served.reference))
            self._heads.switch(None)
        self._saved.clear()
        self._settle(None)

    def _settle(self, task: str | None) -> None:
        self._states = self._look()
        self._task, self._ended = task, ""

    def _trim(self) -> None:
        """Forget the positions of tasks that were not used for longest, beyond what may be kept."""
        for task in list(self._patches):
            if self._budget is None or self.cached_bytes <= self._budget:
                return
            if task != self._task:
                del self._patches[task]

    def _look(self) -> list[State]:
        return [((t.dtype, t.stride()), t.device, t.data_ptr(), t._version) for t in (s.tensor for s in self._slots)]

    def _require_usable(self) -> None:
        if self._ended:
            kind = OptionError if "detached" in self._ended else CheckpointError
            raise kind(self._ended)

    def _require_unchanged(self) -> None:
        """Refuse a model of which a tensor was written since the last switch, and has other values now."""
        now = self._look()
        for slot, before, state in zip(self._slots, self._states, now, strict=True):
            if before != state and (before[0] != state[0] or not slot.holds(self._expected(slot))):
                raise CheckpointError(
                    f"the model's '{slot.name}' was changed since the last switch, as training, casting to another "
                    f"dtype or memory format, or another handle does; use bundle.{LOAD}"
                )
        self._states = now

    def _expected(self, slot: Slot) -> Weights:
        if self._task is None:
            return self._served.reference
        return self._patches[self._task].weights


class Switched:
    """A context in which a model has a task's weights; when it is left, the task before comes back."""

    def __init__(self, handle: Attached, before: str | None) -> None:
        self._handle, self._before = handle, before

    def __enter__(self) -> Attached:
        return self._handle

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.switch(self._before)


def _touches(patch: Patch | None, slot: Slot) -> bool:
    return patch is not None and (slot in patch.whole or slot in patch.sparse)


def _tensors(served: Served) -> Iterator[tuple[str, Tensor]]:
    for weights in [served.reference, *([] if served.base is None else [served.base])]:
        yield from ((f"{weights.origin}: tensor '{name}'", weights.raw(name)) for name in weights.canonical())
    for task in served.deltas:
        for name, parts in served.deltas[task].parts.items():
            yield from ((f"what task '{task}' stores of '{name}'", tensor) for tensor in parts.values())
