"""The multi-task artefact: one shared model, and a small packed difference for every task."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from byom.checkpoint.attached import Attached
from byom.errors import CheckpointError
from byom.merge.base import Problem
from byom.storage import manifest
from byom.storage import tensor_files as storage
from byom.storage.atomic import replacing
from byom.storage.names import require_file_names
from byom.variants.base import Variant
from byom.variants.base.common import apart, together
from byom.variants.base.delta import Delta, Served
from byom.variants.base.variant import Packing
from byom.weights import Spec, Weights
from byom.weights.align import aligned

BUNDLE, HEADS, HEAD = "bundle.json", "heads", "head.safetensors"


@dataclass(frozen=True)
class Bundle(Served):
    """Shared models and one packed difference per task, as a folder.

    Args:
        reference: The merged model (BYOM-FFT) or the pre-trained one (post-pruning).
        deltas: Task name to packed difference.
        base: The second shared model, where a variant has one: theta_0 alongside a merged one (TALL-masks), or a
            unified task vector alongside theta_0 (EMR).
        heads: Task name to what only its own model has, such as a classifier, under that model's names.
        starts: Task name to how its model's names start where the reference's start otherwise: what is dropped of the
            reference's, and what takes its place.
    """

    heads: Mapping[str, Weights] = field(default_factory=dict)
    starts: Mapping[str, tuple[str, str]] = field(default_factory=dict)

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
        """Bytes of the shared models and all packed differences; what several of these hold alike counts once."""
        shared = sum(storage.size(w.shape(n), w.dtype(n)) for w in self.models.values() for n in w.canonical())
        return shared + sum(delta.nbytes for delta in apart(self.deltas).values())

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
        own = self.heads if heads else {}
        return Attached(self, model, own, load=load, cache_bytes=cache_bytes)

    def whole(self, task: str) -> Weights:
        """Return one task's weights and its own head, lazily, under the names of the model that it was packed from.

        Raises:
            OptionError: If the bundle does not hold the task.
        """
        shared, head = self.weights(task), self.heads.get(task)
        dropped, added = self.starts.get(task, ("", ""))
        names = {n: added + n.removeprefix(dropped) if n.startswith(dropped) else n for n in shared}
        return shared if head is None and names.keys() == set(names.values()) else joined(shared, names, head)

    def save(self, folder: str | Path, complete: Callable[[Path], Mapping[str, Any]] | None = None) -> Path:
        """Write ``reference/``, ``base/`` if there is one, ``<task>.safetensors`` and ``bundle.json``, all or nothing.

        Heads go to ``heads/<task>/head.safetensors``.

        Args:
            folder: Created, or replaced as a whole if it holds an earlier bundle that nobody changed.
            complete: Writes further files into the folder that it is given, and returns notes for ``bundle.json``.

        Returns:
            The folder.

        Raises:
            CheckpointError: If it cannot be written or holds other files.
            OptionError: If a task's name cannot name a file.
        """
        require_file_names(self.deltas, "task")
        with replacing(Path(folder), own_files(Path(folder))) as partial:
            placed = {name: _placed(weights, partial / name) for name, weights in self.models.items()}
            deltas = self.deltas
            if isinstance(deltas, Packing):  # tasks are packed against what lies there, not merged anew for each
                deltas = replace(deltas, reference=placed["reference"], base=placed.get("base"))
            _write_each(deltas if isinstance(deltas, Packing) else apart(deltas), partial)
            for task, head in self.heads.items():
                place = partial / HEADS / task / HEAD
                storage.write_file(place, head.state(), {"format": 1})
            prints = {name: weights.fingerprint() for name, weights in placed.items()}
            notes = {"format": 1, **prints, "tasks": list(self.deltas)}
            if self.heads:
                notes |= {"heads": list(self.heads)}
            if self.starts:
                notes |= {"starts": {task: list(pair) for task, pair in self.starts.items()}}
            more = complete(partial) if complete else {}
            manifest.noted(partial, BUNDLE, {**notes, **more})
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
            require_file_names(tasks, "task")
            heads = {task: Weights.open(Path(folder) / HEADS / task / HEAD) for task in notes.get("heads", [])}
            starts = {task: (str(pair[0]), str(pair[1])) for task, pair in notes.get("starts", {}).items()}
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise CheckpointError(f"{file} is damaged ({error!r}); make or fetch the bundle again") from error
        if missing := [task for task in tasks if not (Path(folder) / f"{task}.safetensors").is_file()]:
            raise CheckpointError(f"{folder} lacks {missing[0]}.safetensors; make or fetch the bundle again")
        models = {name: _opened(Path(folder) / name, expected) for name, expected in prints.items()}
        deltas = {task: Delta.open(Path(folder) / f"{task}.safetensors") for task in tasks}
        return cls(models["reference"], together(deltas), models.get("base"), heads, starts)


def own_files(folder: Path) -> Callable[[Path], bool]:
    """Return what tells the files of an earlier bundle from all others."""
    listed, tensors = manifest.own(folder, BUNDLE), storage.written(BUNDLE)
    plain = not (folder / HEADS).exists()  # of the time before manifests, bundles had nothing but tensors
    return lambda file: listed(file) or (plain and tensors(file))


def joined(shared: Weights, names: Mapping[str, str], head: Weights | None) -> Weights:
    """Return shared weights under other names, together with a head.

    Args:
        shared: The weights.
        names: Their names to those of the result.
        head: Further tensors; None adds none.
    """
    places = {own: name for name, own in names.items()}
    specs = {own: Spec(shared.shape(name), shared.dtype(name)) for own, name in places.items()}
    specs |= {} if head is None else {name: Spec(head.shape(name), head.dtype(name)) for name in head}
    ties = {names[alias]: names[name] for alias, name in shared.ties.items()}
    ties |= {} if head is None else head.ties

    def read(name: str) -> Tensor:
        return head[name] if head is not None and name in head else shared[places[name]]

    return Weights(specs, read, ties=ties, origin=shared.origin)


def _placed(weights: Weights, folder: Path) -> Weights:
    """Write a model, and return it as it is read from there."""
    constants = [name for name in weights if weights.dtype(name).is_floating_point and not weights.merges(name)]
    return Weights.open(weights.save(folder)).carrying(constants)


def _write_each(deltas: Mapping[str, Delta], folder: Path) -> None:
    """Write every difference in a thread, while the next one is packed in this one.

    What was packed for the file alone is freed as it is written, faster than the next one grows: together they take
    the memory of one.
    """
    passing = isinstance(deltas, Packing)
    with ThreadPoolExecutor(max_workers=1) as writer:
        before: Future[Path] | None = None
        for task in deltas:  # not items(), which packs all before the first is written
            delta, place = deltas[task], folder / f"{task}.safetensors"
            if before is not None:
                before.result()
            before = writer.submit(delta.spend if passing else delta.save, place)
        if before is not None:
            before.result()


def _opened(folder: Path, fingerprint: str) -> Weights:
    weights = Weights.open(folder)
    if weights.fingerprint() != fingerprint:
        raise CheckpointError(f"{folder} is not the model its task files were packed against; save it again")
    return weights
