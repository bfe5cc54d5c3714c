"""Packing folders: a bundle whose reference transformers opens, and one folder of each task out of it again."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial as bound
from pathlib import Path
from typing import Any

import yaml

import byom
from byom.checkpoint.adapters.export import write_one
from byom.checkpoint.bundle import HEADS, Bundle, own_files
from byom.checkpoint.convert import DTYPES
from byom.checkpoint.patch import write_task_patch
from byom.errors import OptionError, listed, one_of
from byom.folders import beside, card
from byom.folders.output import RECIPE, files_of, hashing, require_apart, require_space
from byom.folders.result import Result, Watch, nbytes
from byom.folders.skeleton import skeleton
from byom.merge.base import Problem
from byom.storage import manifest
from byom.storage.atomic import replacing, require_own
from byom.variants.base.variant import PackingVariant
from byom.weights import Weights
from byom.weights.placed import chosen

KIND = "folders"
FORMS = ("folder", "peft", "patch")


def pack(result: Result, out: Path, watch: Watch | None = None) -> Path:
    """Pack every expert against the merged model or the base, as the variant says.

    Args:
        result: The models, the method and the variant.
        out: The bundle's folder; created, or replaced as a whole if it holds an earlier one that nobody changed.
        watch: Called with the bytes of every tensor that is read.

    Returns:
        The folder.

    Raises:
        CheckpointError: If a model cannot be read or the folder not be written; then nothing changes.
        OptionError: If the variant cannot be packed from folders.
    """
    models, variant = result.models, result.request.variant
    assert variant is not None
    variant = variant.merged_by(result.request.merge)
    every = {"base": models.source} | {name: expert.source for name, expert in models.experts.items()}
    require_apart(out, every.values())
    require_own(out, own_files(out))
    require_space(out, nbytes(models.base))
    problem = Problem(models.base, models.completed).on(chosen(result.request.device))
    problem = problem if watch is None else problem.watched(watch)
    reference = result.merged(watch) if variant.on == "merged" else problem.pretrained
    served = variant.streamed(problem, _typed(reference, result.request.dtype))
    heads = {name: Weights.of(expert.head, expert.source.given) for name, expert in models.heads.items()}
    starts = {name: pair for name, expert in models.experts.items() if (pair := expert.start) != ("", "")}
    place = files_of(result)
    shared = beside.agreed(served.reference, place)[0]
    base = None if served.base is None else beside.agreed(served.base, place)[0]
    with hashing(every) as digests:
        bundle = Bundle(shared, served.deltas, base, heads, starts)
        return bundle.save(out, bound(_completed, result=result, digests=digests))


def reads(result: Result) -> int:
    """Return the bytes that merging and packing read, if every expert is packed by itself.

    What is packed against the shared models is read from where these were written, which does not count.
    """
    variant, experts = result.request.variant, sum(nbytes(each) for each in result.models.completed.values())
    passes = variant.passes if isinstance(variant, PackingVariant) else 1
    merging, base = variant is not None and variant.on == "merged", nbytes(result.models.base)
    shared = (result.reads if merging else base) + (base if variant is not None and variant.shares_base else 0)
    return shared + passes * experts


def _typed(reference: Weights, dtype: str) -> Weights:
    return reference.to(DTYPES[dtype]) if dtype else reference


def _completed(folder: Path, *, result: Result, digests: Any) -> Mapping[str, Any]:
    """Write what lies beside the weights, and return the bundle's notes."""
    models = result.models
    place = files_of(result)
    for name in ("reference", "base"):
        if (folder / name).is_dir():
            weights = Weights.open(folder / name)
            beside.copy(place, folder / name)
            models.vocabulary.complete(folder / name, place)
            beside.configured(folder / name, weights, beside.agreed(weights, place)[1])
    for name, expert in models.heads.items():
        place = models.source.folder if expert.source.is_adapter else expert.source.folder
        beside.copy(place, folder / HEADS / name)
        models.vocabulary.complete(folder / HEADS / name, place)
        beside.configured(folder / HEADS / name, expert.weights, expert.settings)
    recipe = yaml.safe_dump(dict(result.request.recipe), sort_keys=False, allow_unicode=True)
    (folder / RECIPE).write_text(recipe, encoding="utf-8")
    notes = {"kind": KIND, "byom": byom.__version__, "method": card.method(result)}
    return {**notes, "models": card.sources(result, digests()), "notes": list(models.notes)}


def unpack(folder: Path, task: str, out: Path, dtype: str = "", to: str = "folder", server: str = "") -> Path:
    """Write one task's model of a bundle in a form that needs no byom.

    Args:
        folder: The bundle.
        task: The task.
        out: What is written; a folder is created, or replaced as a whole if it holds an earlier result that nobody
            changed.
        to: ``folder`` writes the whole model, ``peft`` an adapter on the bundle's reference, and ``patch`` one file
            with the values in which it differs from that; see `byom.checkpoint.patch`.
        server: ``vllm`` writes an adapter as it accepts them, or refuses.
        dtype: What floating-point tensors are written in, one of `DTYPES`; empty keeps theirs.

    Returns:
        The folder.

    Raises:
        OptionError: If the bundle does not hold the task, or the folders lie in one another.
        CheckpointError: If the bundle cannot be read or the folder not be written.
    """
    one_of("to", to, FORMS)
    bundle = Bundle.open(folder)
    weights = bundle.whole(task)
    if out.resolve().is_relative_to(folder.resolve()) or folder.resolve().is_relative_to(out.resolve()):
        raise OptionError(f"{out} and the bundle {folder} lie in one another; choose another folder")
    if to != "folder":
        if dtype:
            raise OptionError(f"dtype={dtype} is for to=folder; to={to} has the reference's dtype")
        return _difference(bundle, folder, task, out, to, server)
    if server:
        raise OptionError(f"server={server} is for to=peft")
    own = manifest.own(out, beside.MANIFEST)
    require_own(out, own)
    written = DTYPES[dtype] if dtype else None
    require_space(out, nbytes(weights, written))
    place = folder / HEADS / task
    place = place if (place / beside.CONFIG).is_file() else folder / "reference"
    weights, settings = beside.agreed(weights, place)
    with replacing(out, own) as partial:
        weights.save(partial, dtype=written)
        beside.copy(place, partial)
        beside.configured(partial, weights if written is None else weights.to(written), settings)
        manifest.noted(partial, beside.MANIFEST, {"byom": byom.__version__, "bundle": str(folder), "task": task})
    return out


def _difference(bundle: Bundle, folder: Path, task: str, out: Path, to: str, server: str) -> Path:
    """Write what a task has of its own, to be put on the bundle's reference."""
    if task in bundle.heads:
        raise OptionError(
            f"'{task}' has a head of its own ({listed(bundle.heads[task])}), which the reference lacks, so that "
            f"to={to} would lose it; unpack it with to=folder"
        )
    if to == "patch":
        if server:
            raise OptionError(f"server={server} is for to=peft")
        return write_task_patch(bundle, task, out)
    place = folder / "reference"
    return write_one(bundle, task, out, base_model=str(place), module=skeleton(place), server=server or None)
