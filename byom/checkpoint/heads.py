"""Each task's own head in a live model that is switched between tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from byom.checkpoint.slots import KEEP, Place, Slot
from byom.errors import CheckpointError
from byom.functional.tensors import narrowed, require_values
from byom.weights import Weights
from byom.weights.match import unwrapped


class Kept(NamedTuple):
    """What a head's tensor was before a task's own took its place."""

    place: Place
    data: Tensor  # the model's own storage where the shape differs, else a copy of the values


class Heads:
    """The heads that a bundle has for its tasks, and the model's own tensors of those names.

    A head of the shape of the model's is written in place; one of another shape, of a task with other classes, takes
    the place of the parameter's data, and the model's own data comes back afterwards.

    Args:
        heads: Task name to the tensors of its head, under the names of the task's own model.
        model: The live model.
        places: Its tensors.
        slots: Those that the reference has.
        added: What the names start with in the model that the reference's do not.
    """

    def __init__(
        self,
        heads: Mapping[str, Weights],
        model: nn.Module,
        places: Mapping[str, Place],
        slots: Sequence[Slot],
        added: str,
    ) -> None:
        self._heads = heads
        self._compiled = any(type(module).__name__ == "OptimizedModule" for module in model.modules())
        self._places = {unwrapped(name): place for name, place in places.items()}
        self._shared = {id(slot.tensor): slot.name for slot in slots}
        self._added = added
        self._kept: list[Kept] = []

    def require(self, task: str) -> None:
        """Refuse a task whose head has no place in the model.

        Raises:
            CheckpointError: Naming the tensor.
        """
        if task not in self._heads:
            return
        head = self._heads[task]
        for name in head:
            place = self._place(name)
            if place is None:
                raise CheckpointError(
                    f"the task '{task}' has a head of its own, and the model has no '{name}' for it; attach a model "
                    "with such a head, or attach(model, heads=False) to leave heads out"
                )
            tensor = getattr(place.owner, place.attribute)
            require_values({name: tensor}, "the model")
            if id(tensor) in self._shared:
                raise CheckpointError(
                    f"'{name}' of the head of task '{task}' is '{self._shared[id(tensor)]}' of the shared model; untie "
                    "them in the model, or attach(model, heads=False) to leave heads out"
                )
            if tensor.dtype.is_floating_point != head.dtype(name).is_floating_point:
                raise CheckpointError(
                    f"'{name}' of the head of task '{task}' is {head.dtype(name)}, and {tensor.dtype} in the model; "
                    "load the model without quantisation"
                )
            if self._compiled and tuple(tensor.shape) != head.shape(name):
                raise CheckpointError(
                    f"'{name}' of the head of task '{task}' is {head.shape(name)}, and {tuple(tensor.shape)} in the "
                    "model, which torch.compile compiled for that shape; attach the model before it is compiled"
                )
            self._value(head, name, tensor)

    def switch(self, task: str | None) -> None:
        """Put the model's own head back, and a task's in its place if it has one; under no_grad."""
        while self._kept:
            kept = self._kept[-1]
            _put(getattr(kept.place.owner, kept.place.attribute), kept.data)
            self._kept.pop()
        if task is None or task not in self._heads:
            return
        head = self._heads[task]
        for name in head.canonical():
            places = [self._place(each) for each in head if head.ties.get(each, each) == name]
            for place in {id(place.tensor): place for place in places if place is not None}.values():
                tensor = getattr(place.owner, place.attribute)
                value = self._value(head, name, tensor)
                self._kept.append(Kept(place, tensor.clone() if value.shape == tensor.shape else tensor.data))
                _put(tensor, value.clone())

    def _place(self, name: str) -> Place | None:
        plain = unwrapped(name)
        return self._places.get(plain) or self._places.get(self._added + plain)

    @staticmethod
    def _value(head: Weights, name: str, tensor: Tensor) -> Tensor:
        return narrowed(head[name], tensor.dtype, f"{head.origin}: tensor '{name}'", KEEP)


def _put(tensor: Tensor, value: Tensor) -> None:
    """Write a value, or let it take the place of one of another shape."""
    if tensor.shape == value.shape:
        tensor.copy_(value)
    else:
        tensor.data = value.to(tensor.device)
