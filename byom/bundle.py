"""The multi-task artefact: one shared model, and a small packed difference for every task."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from byom import storage
from byom.errors import CheckpointError, OptionError, suggest
from byom.variants.base import Delta, Variant
from byom.weights import Weights


@dataclass(frozen=True)
class Bundle:
    """A shared reference model and one packed difference a task.

    Args:
        reference: The merged model (BYOM-FFT) or the pre-trained one (post-pruning).
        deltas: Task name to packed difference.
    """

    reference: Weights
    deltas: Mapping[str, Delta]

    @classmethod
    def pack(cls, variant: Variant, finetuned: Mapping[str, Weights], reference: Weights) -> Bundle:
        """Pack every task against one reference.

        Args:
            variant: How a difference is packed.
            finetuned: Task name to theta_t.
            reference: What the differences are taken to.

        Returns:
            The bundle.
        """
        reference = reference.materialise()
        return cls(reference, {task: variant.delta(weights, reference) for task, weights in finetuned.items()})

    def weights(self, task: str) -> Weights:
        """Return one task's weights, lazily.

        Raises:
            OptionError: If there is no such task.
        """
        if task not in self.deltas:
            raise OptionError(f"the bundle has no task '{task}'; {suggest(task, self.deltas)}")
        return self.deltas[task].apply(self.reference)

    @property
    def nbytes(self) -> int:
        """Bytes of the shared model and all packed differences."""
        shared = sum(storage.size(self.reference.shape(n), self.reference.dtype(n)) for n in self.reference.canonical())
        return shared + sum(delta.nbytes for delta in self.deltas.values())

    def save(self, folder: str | Path) -> Path:
        """Write ``reference/``, ``<task>.safetensors`` and ``bundle.json``, all or nothing.

        Args:
            folder: Created, or replaced as a whole if it holds an earlier bundle.

        Returns:
            The folder.

        Raises:
            CheckpointError: If it cannot be written or holds other files.
            OptionError: If a task's name cannot name a file.
        """
        if nested := [task for task in self.deltas if Path(task).name != task]:
            raise OptionError(f"the task '{nested[0]}' cannot name a file of the bundle; rename it without '/'")
        with storage.replacing(Path(folder)) as partial:
            self.reference.save(partial / "reference")
            for task, delta in self.deltas.items():
                delta.save(partial / f"{task}.safetensors")
            notes = {"format": 1, "reference": self.reference.fingerprint(), "tasks": list(self.deltas)}
            (partial / "bundle.json").write_text(json.dumps(notes, indent=1))
        return Path(folder)

    @classmethod
    def open(cls, folder: str | Path) -> Bundle:
        """Open what `save` wrote; the reference is read on demand.

        Args:
            folder: The folder.

        Returns:
            The bundle.

        Raises:
            CheckpointError: If it is no bundle, or its reference is not the one its differences were taken to.
        """
        file = Path(folder) / "bundle.json"
        if not file.is_file():
            raise CheckpointError(f"{folder} is not a bundle: it has no bundle.json")
        try:
            notes = json.loads(file.read_text())
            fingerprint, tasks = notes["reference"], list(notes["tasks"])
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file} is damaged ({error!r}); make or fetch the bundle again") from error
        reference = Weights.open(Path(folder) / "reference")
        if reference.fingerprint() != fingerprint:
            raise CheckpointError(
                f"{folder}/reference is not the model its task files were packed against; save it again"
            )
        return cls(reference, {task: Delta.open(Path(folder) / f"{task}.safetensors") for task in tasks})
