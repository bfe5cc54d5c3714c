"""Writing a merged folder: weights, what lies beside them, heads, model card and recipe, all or nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

import byom
from byom.checkpoint.convert import DTYPES
from byom.errors import CheckpointError, OptionError
from byom.folders import beside, card
from byom.folders.beside import MANIFEST
from byom.folders.models import Expert, Models
from byom.folders.result import Result
from byom.folders.source import Source
from byom.storage import manifest
from byom.storage.atomic import replacing, require_own
from byom.storage.tensor_files import size
from byom.weights import Weights

RECIPE, CARD = "recipe.yaml", "README.md"
HEADS = "heads"


def require_apart(out: Path, sources: Iterable[Source]) -> None:
    """Refuse an output folder that an input lies in, or that lies in an input.

    Raises:
        OptionError: Naming both.
    """
    out = out.resolve()
    for source in sources:
        place = source.path.resolve()
        if out.is_relative_to(place) or place.is_relative_to(out):
            raise OptionError(
                f"the output folder {out} and the input {place} lie in one another; choose another folder"
            )


def require_space(out: Path, nbytes: int) -> None:
    """Refuse to start what the disk has no room for.

    Args:
        out: The folder that is going to be written.
        nbytes: Bytes that are going to be written.

    Raises:
        CheckpointError: With what is needed and what is there.
    """
    here = next(folder for folder in (out.resolve(), *out.resolve().parents) if folder.exists())
    free = shutil.disk_usage(here).free
    if free < nbytes:
        raise CheckpointError(
            f"{out} needs {nbytes / 1e9:,.1f} GB, and the disk has {free / 1e9:,.1f} GB left. Free space or choose "
            "another folder"
        )


def written_bytes(result: Result) -> dict[str, int]:
    """Return the folders that a merge writes, relative to the output, to the bytes of their weights."""
    dtype = _dtype(result)
    base = result.models.base
    sizes = {".": nbytes(base, dtype)}
    for name, expert in result.models.heads.items():
        sizes[f"{HEADS}/{name}"] = nbytes(expert.whole(base), dtype)
    return sizes


def nbytes(weights: Weights, dtype: torch.dtype | None = None) -> int:
    """Return the bytes of distinct tensors.

    Args:
        weights: The weights.
        dtype: What floating-point tensors are written in; None keeps theirs.
    """
    types = {name: weights.dtype(name) for name in weights.canonical()}
    if dtype is not None:
        types = {name: dtype if own.is_floating_point else own for name, own in types.items()}
    return sum(size(weights.shape(name), own) for name, own in types.items())


def write(result: Result, out: Path, watch: Any = None) -> Path:
    """Merge, and write the folder that other tools open.

    Args:
        result: What is merged.
        out: The folder; created, or replaced as a whole if it holds an earlier result that nobody changed.
        watch: Called with the bytes of every tensor that is written.

    Returns:
        The folder.

    Raises:
        CheckpointError: If a model cannot be read or the folder not be written; then nothing changes.
        OptionError: If the folder and an input lie in one another.
    """
    models, dtype = result.models, _dtype(result)
    every = {"base": models.source} | {name: expert.source for name, expert in models.experts.items()}
    require_apart(out, every.values())
    require_own(out, manifest.own(out, MANIFEST))
    require_space(out, sum(written_bytes(result).values()))
    with hashing(every) as digests, replacing(out, manifest.own(out, MANIFEST)) as partial:
        merged = result.merged()
        watched(merged, watch).save(partial, dtype=dtype)
        _complete(partial, files_of(result), merged if dtype is None else merged.to(dtype), models)
        for name, expert in models.heads.items():
            whole(expert, merged, partial / HEADS / name, models, dtype, watch)
        recipe = yaml.safe_dump(dict(result.request.recipe), sort_keys=False, allow_unicode=True)
        done = digests()
        (partial / RECIPE).write_text(recipe, encoding="utf-8")
        (partial / CARD).write_text(card.card(result, recipe, done), encoding="utf-8")
        notes = {"byom": byom.__version__, "method": card.method(result), "models": card.sources(result, done)}
        manifest.noted(partial, MANIFEST, {**notes, "notes": list(models.notes), "simpler": result.fallbacks})
    return out


def whole(
    expert: Expert, shared: Weights, folder: Path, models: Models, dtype: torch.dtype | None = None, watch: Any = None
) -> None:
    """Write one expert's model with other values of what it shares, as a folder that transformers opens.

    Args:
        expert: The expert.
        shared: Values in the base's names.
        folder: The folder to write.
        models: The models of the request.
        dtype: What floating-point tensors are written in; None keeps theirs.
        watch: Called with the bytes of every tensor that is written.
    """
    weights = expert.whole(shared)
    watched(weights, watch).save(folder, dtype=dtype)
    place = None if expert.source.is_adapter else expert.source.folder
    _complete(folder, place, weights if dtype is None else weights.to(dtype), models)


def files_of(result: Result) -> Path | None:
    """Return the folder whose tokenizer and configuration are copied; None where a file of weights is alone."""
    choice, models = result.request.files, result.models
    source = models.source if choice == "base" else models.experts[choice].source
    if choice != "base" and (source.folder is None or source.is_adapter):
        raise OptionError(f"files={choice}: {source.given} is no folder of a model; choose another")
    return source.folder


def _complete(folder: Path, place: Path | None, weights: Weights, models: Models) -> None:
    beside.copy(place, folder)
    models.vocabulary.complete(folder, place)
    untied = set(models.base.ties) - set(weights.ties) if set(models.base) <= set(weights) else set()
    beside.configured(folder, weights, {"tie_word_embeddings": False} if untied else {})


@contextmanager
def hashing(sources: Mapping[str, Source]) -> Iterator[Callable[[], dict[str, str]]]:
    """Compute the SHA-256 of models on the side, and give a function that waits for them."""
    with ThreadPoolExecutor(1) as pool:
        futures = {name: pool.submit(source.sha256) for name, source in sources.items()}
        try:
            yield lambda: {name: future.result() for name, future in futures.items()}
        finally:
            for future in futures.values():
                future.cancel()


def watched(weights: Weights, watch: Any) -> Weights:
    """Return weights that call back with the bytes of every tensor that is read."""
    if watch is None:
        return weights

    def read(name: str) -> Any:
        tensor = weights.raw(name)
        watch(size(weights.shape(name), weights.dtype(name)))
        return tensor

    return weights.derived(read, weights.origin)


def _dtype(result: Result) -> torch.dtype | None:
    return DTYPES[result.request.dtype] if result.request.dtype else None
