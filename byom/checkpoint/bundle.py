"""The multi-task artefact: one shared model, and a small packed difference for every task."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from byom.checkpoint.attached import Attached
from byom.errors import CheckpointError
from byom.merge.base import Problem
from byom.storage import tensor_files as storage
from byom.storage.atomic import replacing
from byom.storage.names import require_file_names
from byom.variants.base import Variant
from byom.variants.base.delta import Delta, Served
from byom.weights import Weights
from byom.weights.align import aligned


@dataclass(frozen=True)
class Bundle(Served):
    """Shared models and one packed difference per task, as a folder.

    Args:
        reference: The merged model (BYOM-FFT) or the pre-trained one (post-pruning).
        deltas: Task name to packed difference.
        base: The second shared model, where a variant has one: theta_0 alongside a merged one (TALL-masks), or a
            unified task vector alongside theta_0 (EMR).
    """

    @classmethod
    def pack(
        cls, variant: Variant, finetuned: Mapping[str, Weights], reference: Weights, base: Weights | None = None
    ) -> Bundle:
        """Pack every task against one reference.

        Args:
            variant: How a difference is packed.
            finetuned: Task name to theta_t.
            reference: What the differences are taken to.
            base: theta_0; None takes the reference, which is theta_0 for variants that ignore merging.

        Returns:
            The bundle.
        """
        computed, _ = aligned(reference, {})
        served = variant.serve(Problem(base or reference, finetuned), computed.materialise())
        shared = None if served.base is None else served.base.materialise()
        return cls(served.reference, served.deltas, shared)

    @property
    def nbytes(self) -> int:
        """Bytes of the shared models and all packed differences."""
        shared = sum(storage.size(w.shape(n), w.dtype(n)) for w in self.models.values() for n in w.canonical())
        return shared + sum(delta.nbytes for delta in self.deltas.values())

    @property
    def models(self) -> dict[str, Weights]:
        """The folder's whole models by name."""
        return {"reference": self.reference} | ({} if self.base is None else {"base": self.base})

    def attach(
        self, model: nn.Module, *, load: bool = False, heads: bool = True, cache_bytes: int | None = None
    ) -> Attached:
        """Take hold of a live model, to switch it between the tasks in place.

        ::

            handle = bundle.attach(model)
            handle.switch("a")
            with handle.switch("b"):
                ...
            handle.detach()

        Args:
            model: A module with the reference's values, on any device. Its names may have the parts that
                DataParallel, DistributedDataParallel and torch.compile put in, or start as those of an inner or outer
                model do; parameters that the reference does not have are left alone. In another floating-point dtype
                it gets the bits of ``bundle.weights(task).to(dtype)``.
            load: Write the reference into the model first, instead of refusing one with other values.
            heads: Give the model each task's own head where the bundle has one.
            cache_bytes: How many bytes of decoded positions are kept, of the tasks used last; None keeps all that
                were used. The task that is on keeps its own in any case.

        Returns:
            The handle; the model is the reference.

        Raises:
            CheckpointError: If names, shapes or kinds differ, the model does not have the reference's values, shares
                memory with the bundle, or is one whose parameters cannot be written (FSDP, meta, quantised).
            OptionError: If `cache_bytes` is no whole number from 0 on.
        """
        own = getattr(self, "heads", {}) if heads else {}
        return Attached(self, model, own, load=load, cache_bytes=cache_bytes)

    def save(self, folder: str | Path) -> Path:
        """Write ``reference/``, ``base/`` if there is one, ``<task>.safetensors`` and ``bundle.json``, all or nothing.

        Args:
            folder: Created, or replaced as a whole if it holds an earlier bundle.

        Returns:
            The folder.

        Raises:
            CheckpointError: If it cannot be written or holds other files.
            OptionError: If a task's name cannot name a file.
        """
        require_file_names(self.deltas, "task")
        with replacing(Path(folder), storage.written("bundle.json")) as partial:
            for name, weights in self.models.items():
                weights.save(partial / name)
            for task in self.deltas:  # not items(), which holds one difference while the next is packed
                self.deltas[task].save(partial / f"{task}.safetensors")
            prints = {name: weights.fingerprint() for name, weights in self.models.items()}
            notes = {"format": 1, **prints, "tasks": list(self.deltas)}
            (partial / "bundle.json").write_text(json.dumps(notes, indent=1), encoding="utf-8")
        return Path(folder)

    @classmethod
    def open(cls, folder: str | Path) -> Bundle:
        """Open what `save` wrote; the reference is read on demand.

        Args:
            folder: The folder.

        Returns:
            The bundle.

        Raises:
            CheckpointError: If it is not a bundle, or its reference is not the one its differences were taken to.
        """
        file = Path(folder) / "bundle.json"
        if not file.is_file():
            raise CheckpointError(f"{folder} is not a bundle: it has no bundle.json")
        try:
            notes = json.loads(file.read_text(encoding="utf-8"))
            tasks, prints = list(notes["tasks"]), {n: notes[n] for n in ("reference", "base") if n in notes}
            prints["reference"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{file} is damaged ({error!r}); make or fetch the bundle again") from error
        models = {name: _opened(Path(folder) / name, expected) for name, expected in prints.items()}
        deltas = {task: Delta.open(Path(folder) / f"{task}.safetensors") for task in tasks}
        return cls(models["reference"], deltas, models.get("base"))


def _opened(folder: Path, fingerprint: str) -> Weights:
    weights = Weights.open(folder)
    if weights.fingerprint() != fingerprint:
        raise CheckpointError(f"{folder} is not the model its task files were packed against; save it again")
    return weights
