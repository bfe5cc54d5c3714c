"""Stored results of a variant: one packed difference per task, and the models that all tasks share."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from byom.errors import CheckpointError, OptionError, suggest
from byom.functional.heads import Changed, Readout
from byom.functional.tensors import WIDER_BASE, finite
from byom.storage import tensor_files as storage
from byom.storage.streamed import write_streamed
from byom.variants.base import joined
from byom.variants.base.unpacker import Parts, Shared, Unpacker
from byom.weights import Weights

READOUT = "@readout"  # the entry of a packed difference that belongs to the task's head
OWN = "own"  # the part that is a task's own value whatever the variant, of running statistics
WHOLE = "@whole"  # the entry that belongs to all parameters: `unpack` finds its parts next to each parameter's own
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Delta:
    """One task's packed difference.

    Args:
        variant: The variant that packed it.
        parts: Parameter name to stored tensors, which are kept on the CPU; parameters that are not listed are the
            reference's.
        shapes: Parameter name to the shape it was packed from.
        common: Parameter name to what names its tensors among those that several tasks' differences hold alike, which
            are stored once; see `byom.variants.base.common`.
    """

    variant: Unpacker
    parts: Mapping[str, Parts]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    common: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", {name: _moved(parts, _CPU) for name, parts in self.parts.items()})

    def apply(self, reference: Weights, base: Weights | None = None) -> Weights:
        """Return the task's weights, lazily.

        Args:
            reference: The weights the difference was taken to.
            base: The second shared model, for variants that store two.

        Returns:
            The reference with this task's values put back.

        Raises:
            CheckpointError: If the difference does not fit the reference.
            OptionError: If a second shared model is needed and not given.
        """
        names = self.parts.keys() - {READOUT, WHOLE}
        self._require_known(reference)
        if odd := [n for n, shape in sorted(self.shapes.items()) if tuple(shape) != reference.shape(n)]:
            raise CheckpointError(
                f"the packed difference was taken to another model: '{odd[0]}' was {tuple(self.shapes[odd[0]])}, and "
                f"is {reference.shape(odd[0])} in {reference.origin}; apply it to the model it was packed against"
            )
        require_base(self.variant, base)
        if lacking := sorted(self.common.keys() - self.parts.keys()):
            raise CheckpointError(
                f"the packed difference lacks '{lacking[0]}', which its bundle stores once for several tasks; open the "
                "bundle's folder with Bundle.open"
            )
        aliases = names & reference.ties.keys()
        if aliases:  # a task whose names are not one tensor, though the reference's are
            reference = reference.tied({a: n for a, n in reference.ties.items() if a not in aliases})

        def read(name: str) -> Tensor:
            value = reference[name]
            if name not in names:
                return value
            parts = self.restored(name, lambda: value, value.device)
            if OWN in parts:
                return parts[OWN]
            shared = Shared(value, base[name] if base else None)
            return _within(self.variant.unpack(parts, shared), name, reference)

        return reference.derived(read, f"{reference.origin} + {self.variant.title}")

    def restored(self, name: str, read: Callable[[], Tensor], place: torch.device = _CPU) -> Parts:
        """Return what `Unpacker.unpack` and `entries` are given of one parameter, values in floating point.

        Args:
            name: One of `parts`.
            read: Returns the parameter in the reference; called where what is stored of it takes fewer bits.
            place: Where the parts are to be.

        Returns:
            What was packed, up to rounding; the stored parts themselves where they are not shrunk.

        Raises:
            CheckpointError: If they are corrupt.
        """
        parts = _moved({**self.parts.get(WHOLE, {}), **self.parts[name]}, place)
        return parts if OWN in parts else self.variant.expand(parts, read)

    def expanded(self, reference: Weights) -> Delta:
        """Return the difference with the parts that were packed, none of them in fewer bits; see `restored`."""
        self._require_known(reference)
        own = {n: parts if n in (READOUT, WHOLE) else self._expanded(n, reference) for n, parts in self.parts.items()}
        return Delta(self.variant, own, self.shapes)

    def _expanded(self, name: str, reference: Weights) -> Parts:
        parts = self.parts[name]
        return parts if OWN in parts else self.variant.expand(parts, lambda: reference[name])

    def _require_known(self, reference: Weights) -> None:
        if unknown := sorted(self.parts.keys() - {READOUT, WHOLE} - set(reference)):
            raise CheckpointError(f"the packed difference holds {unknown[:3]}, which {reference.origin} does not have")

    def readout(self, head: Readout) -> Readout:
        """Return the task's head, changed if the variant stores something for heads."""
        if READOUT not in self.parts:
            return head
        return Changed(head, self.variant.readout(self.parts[READOUT], head))

    @property
    def stored_parameters(self) -> int:
        """Floating-point values stored; positions, masks and integers of a few bits are bytes (the BYOM convention)."""
        return sum(t.numel() for parts in self.parts.values() for t in parts.values() if t.is_floating_point())

    @property
    def nbytes(self) -> int:
        """Bytes stored: values, positions and masks; names and shapes too where all is in one piece."""
        names = len(joined.index(self.parts, self.shapes)) if self.variant.joined else 0
        return names + sum(tensor.nbytes for parts in self.parts.values() for tensor in parts.values())

    def save(self, path: str | Path) -> Path:
        """Write the difference as one safetensors file with checksums, atomically.

        Args:
            path: The file.

        Returns:
            The path.
        """
        tensors = self._flat()
        self._write(Path(path), tensors, tensors.__getitem__)
        return Path(path)

    def spend(self, path: str | Path) -> Path:
        """Write what `save` writes, letting go of each tensor once it is written; nothing is left here afterwards.

        Args:
            path: The file.

        Returns:
            The path.
        """
        tensors = self._flat()
        object.__setattr__(self, "parts", {})
        self._write(Path(path), tensors, tensors.pop)
        return Path(path)

    def _flat(self) -> dict[str, Tensor]:
        if self.variant.joined:
            return {f"{joined.JOINED}//{part}": t for part, t in joined.join(self.parts, self.shapes).items()}
        return {f"{name}//{part}": tensor for name, parts in self.parts.items() for part, tensor in parts.items()}

    def _write(self, path: Path, tensors: Mapping[str, Tensor], read: Callable[[str], Tensor]) -> None:
        specs = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        shapes = {} if self.variant.joined else {name: list(shape) for name, shape in self.shapes.items()}
        notes = {"format": 1, "variant": _named(self.variant), "shapes": shapes}
        notes |= {"common": dict(self.common)} if self.common else {}
        write_streamed(path, specs, read, notes)

    @classmethod
    def open(cls, path: str | Path) -> Delta:
        """Read what `save` wrote.

        Args:
            path: The file.

        Returns:
            The packed difference.

        Raises:
            CheckpointError: If the file is damaged or is not a packed difference.
        """
        notes = storage.read_notes(Path(path))
        if "variant" not in notes:
            raise CheckpointError(f"{path} is not a packed task difference; use Weights.open for a checkpoint")
        file = storage.TensorFiles(Path(path))
        parts: dict[str, Parts] = {}
        for key in file.specs:
            name, part = key.rsplit("//", 1)
            parts.setdefault(name, {})[part] = file.read(key)
        shapes = {name: tuple(shape) for name, shape in notes.get("shapes", {}).items()}
        if joined.JOINED in parts:
            parts, shapes = joined.split(parts[joined.JOINED], path)
        return cls(_built(notes["variant"]), parts, shapes, notes.get("common", {}))


@dataclass(frozen=True)
class Served:
    """Shared models and one packed difference per task, which serve all tasks.

    Args:
        reference: The model that differences were taken to.
        deltas: Task name to packed difference.
        base: The second shared model, where there is one: theta_0 alongside a merged reference, or the unified
            task vector of EMR-Merging alongside theta_0.
    """

    reference: Weights
    deltas: Mapping[str, Delta]
    base: Weights | None = None

    def weights(self, task: str) -> Weights:
        """Return one task's weights, lazily.

        Raises:
            OptionError: If the bundle does not hold the task.
        """
        if task not in self.deltas:
            raise OptionError(f"the bundle has no task '{task}'; {suggest(task, self.deltas)}")
        return self.deltas[task].apply(self.reference, self.base)

    @property
    def shared(self) -> list[Weights]:
        """The models stored once for all tasks."""
        stored = [self.reference] if all(delta.variant.shares_reference for delta in self.deltas.values()) else []
        return stored if self.base is None else [*stored, self.base]


def _moved(parts: Parts, place: torch.device) -> Parts:
    return {part: tensor.to(place) for part, tensor in parts.items()}


def _within(values: Tensor, name: str, reference: Weights) -> Tensor:
    """Return a task's values, refusing those that the reference's dtype cannot hold."""
    if values.dtype.itemsize < 4 and values.dtype != torch.bfloat16 and values.numel() and not finite(values):
        raise CheckpointError(
            f"a task's '{name}' has values beyond what {reference.dtype(name)} holds, which {reference.origin} has; "
            f"{WIDER_BASE}, and pack again"
        )
    return values


def own(values: Tensor, shared: Shared) -> Parts:
    """Return parts that put a task's own values back, nothing if the reference has them."""
    return {} if torch.equal(values, shared.reference) else {OWN: values}


def require_base(variant: Unpacker, base: Weights | None) -> None:
    """Refuse to go on without the second shared model where a variant needs one alongside the reference."""
    if variant.shares_base and base is None:
        raise OptionError(f"{variant.title} puts weights together from two shared models; give base= (Served.base)")


def _named(variant: Unpacker) -> dict[str, Any]:
    module = type(variant).__module__.rsplit(".", 1)[-1]
    return {"module": module, "class": type(variant).__name__, "fields": dataclasses.asdict(variant)}


def _built(named: Mapping[str, Any]) -> Unpacker:
    try:
        module = importlib.import_module(f"byom.variants.{named['module']}")
        return getattr(module, named["class"])(**named["fields"])
    except (ImportError, AttributeError, TypeError) as error:
        raise CheckpointError(f"the packed difference was written by a variant this version lacks: {named}") from error
