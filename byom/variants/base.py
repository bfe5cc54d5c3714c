"""What a BYOM variant is: a way to pack one task's difference to a reference, and to put it back."""

from __future__ import annotations

import dataclasses
import importlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import Tensor

from byom import storage
from byom.errors import CheckpointError
from byom.weights import Weights, require_match

Parts = dict[str, Tensor]  # what is stored for one parameter: part name -> dense tensor


@dataclass(frozen=True)
class Variant(ABC):
    """A frozen dataclass of hyperparameters that packs ``theta_t`` against a reference it does not choose."""

    reference: ClassVar[Literal["merged", "pretrained"]]
    """Which model the pipeline passes as the reference."""
    shares_reference: ClassVar[bool] = True
    """Whether the reference has to be stored beside the packed differences."""
    title: ClassVar[str]
    """Name in tables."""

    def plan(self, target: Weights, reference: Weights) -> Any:
        """Find what has to be known about the whole difference before one parameter can be packed."""
        return None

    @abstractmethod
    def pack(self, name: str, target: Tensor, reference: Tensor, plan: Any) -> Parts:
        """Pack one parameter.

        Args:
            name: The parameter's name.
            target: ``[*shape]`` fine-tuned values.
            reference: ``[*shape]`` reference values.
            plan: What `plan` returned.

        Returns:
            Dense tensors to store, empty if nothing is put back. The part ``values`` holds what counts as
            parameters; every other part counts as bytes only.
        """

    @abstractmethod
    def unpack(self, parts: Parts, reference: Tensor) -> Tensor:
        """Put a packed difference back.

        Args:
            parts: What `pack` returned.
            reference: ``[*shape]`` reference values; not modified.

        Returns:
            ``[*shape]`` values for the task, in the reference's dtype.
        """

    def delta(self, target: Weights, reference: Weights) -> Delta:
        """Pack one task's difference.

        Args:
            target: theta_t.
            reference: theta_merged or theta_0.

        Returns:
            The packed difference.

        Raises:
            CheckpointError: If names or shapes differ or a value is not finite.
        """
        require_match(target, reference)
        plan = self.plan(target, reference)
        packed = {
            name: self.pack(name, target.read_finite(name), reference.read_finite(name), plan)
            for name in target.mergeable()
        }
        return Delta(self, {name: parts for name, parts in packed.items() if parts})


@dataclass(frozen=True)
class Delta:
    """One task's packed difference.

    Args:
        variant: The variant that packed it.
        parts: Parameter name to stored tensors; parameters that are not listed are the reference's.
    """

    variant: Variant
    parts: Mapping[str, Parts]

    def apply(self, reference: Weights) -> Weights:
        """Return the task's weights, lazily.

        Args:
            reference: The weights the difference was taken to.

        Returns:
            The reference with this task's values put back.

        Raises:
            CheckpointError: If the difference names a parameter that the reference lacks.
        """
        unknown = sorted(set(self.parts) - set(reference))
        if unknown:
            raise CheckpointError(f"the packed difference holds {unknown[:3]}, which {reference.origin} has not")

        def read(name: str) -> Tensor:
            value = reference[name]
            return self.variant.unpack(self.parts[name], value) if name in self.parts else value

        return reference.derived(read, f"{reference.origin} + {self.variant.title}")

    @property
    def stored_parameters(self) -> int:
        """Values stored, positions and masks not counted (the BYOM convention)."""
        return sum(parts["values"].numel() for parts in self.parts.values() if "values" in parts)

    @property
    def nbytes(self) -> int:
        """Bytes stored: values, positions and masks."""
        return sum(tensor.nbytes for parts in self.parts.values() for tensor in parts.values())

    def save(self, path: str | Path) -> Path:
        """Write the difference as one safetensors file with checksums, atomically.

        Args:
            path: The file.

        Returns:
            The path.
        """
        flat = {f"{name}//{part}": tensor for name, parts in self.parts.items() for part, tensor in parts.items()}
        storage.write_file(Path(path), flat, {"format": 1, "variant": _named(self.variant)})
        return Path(path)

    @classmethod
    def open(cls, path: str | Path) -> Delta:
        """Read what `save` wrote.

        Args:
            path: The file.

        Returns:
            The packed difference.

        Raises:
            CheckpointError: If the file is damaged or is no packed difference.
        """
        notes = storage.read_notes(Path(path))
        if "variant" not in notes:
            raise CheckpointError(f"{path} is not a packed task difference; use Weights.open for a checkpoint")
        file = storage.TensorFiles(Path(path))
        parts: dict[str, Parts] = {}
        for key in file.specs:
            name, part = key.rsplit("//", 1)
            parts.setdefault(name, {})[part] = file.read(key)
        return cls(_built(notes["variant"]), parts)


def _named(variant: Variant) -> dict[str, Any]:
    module = type(variant).__module__.rsplit(".", 1)[-1]
    return {"module": module, "class": type(variant).__name__, "fields": dataclasses.asdict(variant)}


def _built(named: Mapping[str, Any]) -> Variant:
    try:
        module = importlib.import_module(f"byom.variants.{named['module']}")
        return getattr(module, named["class"])(**named["fields"])
    except (ImportError, AttributeError, TypeError) as error:
        raise CheckpointError(f"the packed difference was written by a variant this version lacks: {named}") from error
