"""The tensors of a live model that have the names of a bundle's reference."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from byom.errors import CheckpointError, WeightsMismatch, listed
from byom.functional.tensors import narrowed, require_values
from byom.weights import Weights
from byom.weights.match import is_buffer, partitioned, unwrapped
from byom.weights.ties import groups

LOAD = "attach(model, load=True), which writes the reference into the model"
KEEP = "keep the model in a dtype that holds them, such as torch.bfloat16 or torch.float32"


@dataclass(frozen=True)
class Slot:
    """One tensor of a live model, looked up each time: moving a model replaces its buffers.

    Args:
        names: Its names in the reference, several where the model ties them.
        owner: The module that holds it.
        attribute: Its name there.
    """

    names: tuple[str, ...]
    owner: nn.Module
    attribute: str

    @property
    def tensor(self) -> Tensor:
        """The parameter or buffer itself."""
        return getattr(self.owner, self.attribute)

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    def value(self, weights: Weights, name: str | None = None) -> Tensor:
        """Return a tensor of some weights in this one's dtype, with the bits of ``weights.to(dtype)``."""
        name, dtype = name or self.name, self.tensor.dtype
        raw = weights.raw(name)
        dtype = dtype if raw.is_floating_point() else raw.dtype
        return narrowed(raw, dtype, f"{weights.origin}: tensor '{name}'", KEEP)

    def fill(self, value: Tensor) -> None:
        """Overwrite all of the tensor."""
        self.tensor.copy_(value.reshape(self.tensor.shape))

    def holds(self, weights: Weights) -> bool:
        """Say whether the tensor has the values that some weights have for it."""
        return _equal(self.tensor, self.value(weights))


@dataclass(frozen=True)
class Place:
    """A parameter or buffer of a model, by the module that holds it."""

    owner: nn.Module
    attribute: str
    tensor: Tensor


def places_of(model: nn.Module) -> dict[str, Place]:
    """Return every parameter and buffer by name, all names of tied ones included.

    Raises:
        CheckpointError: If the model is one whose parameters are not its own whole tensors.
    """
    for module in model.modules():
        kinds = {kind.__name__ for kind in type(module).__mro__}
        if kinds & {"FullyShardedDataParallel", "FSDPModule"}:
            raise CheckpointError(
                "the model is wrapped by FSDP, so that a process holds only parts of its parameters; attach a model "
                "that is not, or is wrapped by DistributedDataParallel"
            )
    found: dict[str, Place] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        own = {**module._parameters, **module._buffers}
        start = f"{prefix}." if prefix else ""
        found |= {start + name: Place(module, name, tensor) for name, tensor in own.items() if tensor is not None}
    return found


def slots_of(places: Mapping[str, Place], reference: Weights) -> tuple[list[Slot], str]:
    """Find the reference's tensors in a model, by their names or by one change of how names start.

    Names may have the parts that wrappers put in (DataParallel, DistributedDataParallel, torch.compile). Buffers that
    are computed may be missing, or be others.

    Args:
        places: The model's tensors.
        reference: The weights that the model is to have.

    Returns:
        The model's tensors, each once, and what their names start with where the reference's do not.

    Raises:
        WeightsMismatch: If names or shapes do not fit.
        CheckpointError: If a tensor is on the meta device, quantised, sharded or made in inference mode, or the names
            fit in several ways.
    """
    names, added = _named(places, reference)
    used = {name: places[theirs] for name, theirs in names.items()}
    require_values({names[name]: place.tensor for name, place in used.items()}, "the model")
    _require_shapes(used, reference, names)
    used = {name: place for name, place in used.items() if _alike(name, place.tensor, reference)}
    if frozen := [names[name] for name, place in used.items() if place.tensor.is_inference()]:
        raise CheckpointError(
            f"the model's {listed(frozen)} were made in torch.inference_mode, and cannot be changed in place; make the "
            "model outside of it, or in torch.no_grad"
        )
    groups: dict[object, list[str]] = {}
    for name in sorted(used):
        groups.setdefault(_identity(used[name].tensor), []).append(name)
    every = groups.values()
    return [Slot(tuple(group), used[group[0]].owner, used[group[0]].attribute) for group in every], added


def require_reference(slots: Iterable[Slot], reference: Weights) -> None:
    """Refuse a model that does not have the reference's values.

    Raises:
        CheckpointError: Naming the first tensor that differs.
    """
    for slot in slots:
        for name in slot.names:
            if not _equal(slot.tensor, slot.value(reference, name)):
                raise CheckpointError(
                    f"the model's '{name}' does not have the values of the bundle's reference, {reference.origin}, so "
                    f"that a task's would be put into another model. Use {LOAD}"
                )


def require_apart(slots: Iterable[Slot], tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse a model that shares memory with the bundle, which switching would then change.

    Args:
        slots: The model's tensors.
        tensors: What the bundle's tensors are called, and the tensors.

    Raises:
        CheckpointError: Naming the tensor.
    """
    taken = {_memory(slot.tensor) for slot in slots if slot.tensor.numel()}
    for what, tensor in tensors:
        if tensor.numel() and _memory(tensor) in taken:
            raise CheckpointError(
                f"{what} lies in the memory of the model, so that switching would change the bundle itself; save the "
                "bundle and open it, or attach copy.deepcopy(model)"
            )


def fill(slots: Iterable[Slot], reference: Weights) -> None:
    """Write the reference into a model, where it has other values.

    Raises:
        CheckpointError: If the model ties what differs in the reference, or its dtype cannot hold a value.
    """
    slots = list(slots)
    for slot in slots:
        first = slot.value(reference)
        if other := [name for name in slot.names[1:] if not _equal(first, slot.value(reference, name))]:
            raise CheckpointError(
                f"'{slot.name}' and '{other[0]}' are one tensor in the model and two in the bundle's reference, "
                f"{reference.origin}, with different values; untie them in the model (transformers: "
                "config.tie_word_embeddings=False)"
            )
    for slot in slots:
        value = slot.value(reference)
        if not _equal(slot.tensor, value):
            slot.fill(value)


def _named(places: Mapping[str, Place], reference: Weights) -> tuple[dict[str, str], str]:
    """Return reference's names to the model's, and what the model's start with in addition."""
    learned = [name for name in reference.canonical() if not is_buffer(name, reference.shape(name))]
    tied = groups(reference.ties)
    every = [tied.get(name, [name]) for name in learned]
    plain = {name: name for name in places}
    if not all(any(name in plain for name in one) for one in every):
        plain = _unwrapped(places, reference)
    ways: dict[tuple[int, ...], tuple[str, str]] = {}
    for dropped, added in _shifts(plain, every):
        moved = [[added + n.removeprefix(dropped) for n in one if n.startswith(dropped)] for one in every]
        found = [next((id(places[plain[n]].tensor) for n in one if n in plain), None) for one in moved]
        if None not in found:
            ways.setdefault(tuple(each for each in found if each is not None), (dropped, added))
    if not ways:
        raise _lacking(plain, every, reference)
    exact = next((way for way in ways.values() if way[0] == way[1]), None)
    if len(ways) > 1 and not exact:
        starts = listed(sorted(repr(added) for _, added in ways.values()))
        raise CheckpointError(
            f"the names of {reference.origin} fit tensors of the model in {len(ways)} ways, under {starts}; attach the "
            "inner module that is meant"
        )
    dropped, added = exact or next(iter(ways.values()))
    found = {n: added + n.removeprefix(dropped) for n in reference if n.startswith(dropped)}
    return {name: plain[theirs] for name, theirs in found.items() if theirs in plain}, added


def _unwrapped(places: Mapping[str, Place], reference: Weights) -> dict[str, str]:
    plain: dict[str, str] = {}
    for name, place in places.items():
        other = plain.setdefault(unwrapped(name), name)
        if places[other].tensor is not place.tensor and unwrapped(name) in reference:
            raise CheckpointError(
                f"the model has '{other}' and '{name}', one name with and without a wrapper; attach the inner module"
            )
    return plain


def _shifts(plain: Mapping[str, str], every: Sequence[Sequence[str]]) -> Iterator[tuple[str, str]]:
    """Yield the changes of start, what is dropped and what is added, under which the first tensor has a place."""
    for name in every[0] if every else ():
        parts = name.split(".")
        for cut in range(len(parts)):
            tail = ".".join(parts[cut:])
            yield from (
                (name.removesuffix(tail), other.removesuffix(tail))
                for other in plain
                if f".{other}".endswith(f".{tail}")
            )


def _lacking(plain: Mapping[str, str], every: Sequence[Sequence[str]], reference: Weights) -> WeightsMismatch:
    starts = {added for dropped, added in _shifts(plain, every) if not dropped} | {""}
    missing = min(
        ([one[0] for one in every if not any(at + n in plain for n in one)] for at in sorted(starts)), key=len
    )
    return WeightsMismatch(
        f"the model lacks {listed(missing)} of {reference.origin}, and has {listed(sorted(plain))}; attach a model of "
        "the reference's architecture as it is, before adapters or quantisation change its modules"
    )


def _require_shapes(used: Mapping[str, Place], reference: Weights, names: Mapping[str, str]) -> None:
    for name, place in used.items():
        theirs, ours = tuple(place.tensor.shape), reference.shape(name)
        same_kind = place.tensor.dtype.is_floating_point == reference.dtype(name).is_floating_point
        if theirs == ours or is_buffer(name, ours) or not same_kind:
            continue
        if theirs == (0,):
            raise WeightsMismatch(f"the model: {partitioned(names[name])}")
        raise WeightsMismatch(
            f"'{names[name]}' is {theirs} in the model and {ours} in {reference.origin}; give the model the "
            "reference's configuration, or pack a bundle for a model of this size"
        )


def _alike(name: str, tensor: Tensor, reference: Weights) -> bool:
    """Say whether a tensor is of the reference's kind; a computed buffer may be another, anything else may not."""
    ours = reference.dtype(name)
    fits = tensor.dtype.is_floating_point if ours.is_floating_point else tensor.dtype == ours
    if fits and tuple(tensor.shape) == reference.shape(name):
        return True
    if is_buffer(name, reference.shape(name)):
        return False
    raise CheckpointError(
        f"'{name}' is {tensor.dtype} in the model and {ours} in {reference.origin}, as when one of them is quantised; "
        "load the model without quantisation"
    )


def _identity(tensor: Tensor) -> object:
    if not tensor.numel():
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype


def _memory(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _equal(one: Tensor, other: Tensor) -> bool:
    """Say whether two tensors have the same values, NaN being the same as NaN."""
    other = other.to(one.device).reshape(one.shape)
    if torch.equal(one, other):
        return True
    return one.is_floating_point() and bool(((one == other) | (one.isnan() & other.isnan())).all())
