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
from byom.checkpoint.adapters.merged import write_adapter
from byom.checkpoint.convert import DTYPES
from byom.errors import CheckpointError, OptionError
from byom.folders import beside, card
from byom.folders.beside import MANIFEST
from byom.folders.models import Expert, Models
from byom.folders.result import Result, Watch, nbytes
from byom.folders.skeleton import skeleton
from byom.folders.source import HUB, Source
from byom.storage import manifest
from byom.storage.atomic import replacing, require_own
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
            f"{out} needs {nbytes:,} bytes, and the disk has {free:,} left. Free space or choose another folder"
        )


def written_bytes(result: Result) -> dict[str, int]:
    """Return the folders that a merge writes, relative to the output, to the most bytes of their weights."""
    dtype = _dtype(result)
    base = result.models.base
    sizes = {".": nbytes(base, dtype)}
    for name, expert in result.models.heads.items():
        sizes[f"{HEADS}/{name}"] = nbytes(expert.whole(base), dtype)
    return sizes


def write(result: Result, out: Path, watch: Watch | None = None) -> Path:
    """Merge, and write the folder that other tools open.

    Args:
        result: What is merged.
        out: The folder; created, or replaced as a whole if it holds an earlier result that nobody changed.
        watch: Called with the bytes of every tensor that is read or written.

    Returns:
        The folder.

    Raises:
        CheckpointError: If a model cannot be read or the folder not be written; then nothing changes.
        OptionError: If the folder and an input lie in one another.
    """
    models = result.models
    every = {"base": models.source} | {name: expert.source for name, expert in models.experts.items()}
    own = manifest.own(out, MANIFEST)
    require_apart(out, every.values())
    require_own(out, own)
    require_space(out, sum(written_bytes(result).values()))
    make = _adapter if result.request.to == "peft" else _folder
    with hashing(every) as digests, replacing(out, own) as partial:
        make(result, partial, watch)
        recipe = yaml.safe_dump(dict(result.request.recipe), sort_keys=False, allow_unicode=True)
        done = digests()
        (partial / RECIPE).write_text(recipe, encoding="utf-8")
        (partial / CARD).write_text(card.card(result, recipe, done), encoding="utf-8")
        notes = {"byom": byom.__version__, "method": card.method(result), "models": card.sources(result, done)}
        manifest.noted(partial, MANIFEST, {**notes, "notes": list(models.notes), "simpler": result.fallbacks})
    return out


def _folder(result: Result, folder: Path, watch: Watch | None) -> None:
    models, dtype, place = result.models, _dtype(result), files_of(result)
    merged, settings = beside.agreed(result.merged(watch), place)
    merged.save(folder, dtype=dtype, progress=watch)
    _complete(folder, place, merged if dtype is None else merged.to(dtype), models, settings)
    merged = Weights.open(folder)  # what lies there is not merged again for every head
    for name, expert in models.heads.items():
        whole(expert, merged, folder / HEADS / name, models, dtype, watch)


def _adapter(result: Result, folder: Path, watch: Watch | None) -> None:
    source = result.models.source
    name = source.given.removeprefix(HUB).partition("@")[0] if source.given.startswith(HUB) else source.given
    write_adapter(result.low_rank(), folder, base_model=name, module=skeleton(source.folder))


def whole(
    expert: Expert,
    shared: Weights,
    folder: Path,
    models: Models,
    dtype: torch.dtype | None = None,
    watch: Watch | None = None,
) -> None:
    """Write one expert's model with other values of what it shares, as a folder that transformers opens.

    Args:
        expert: The expert.
        shared: Values in the base's names.
        folder: The folder to write.
        models: The models of the request.
        dtype: What floating-point tensors are written in; None keeps theirs.
        watch: Called with the bytes of every tensor that is read or written.
    """
    place = models.source.folder if expert.source.is_adapter else expert.source.folder
    weights, settings = beside.agreed(expert.whole(shared), place)
    weights.save(folder, dtype=dtype, progress=watch)
    typed = weights if dtype is None else weights.to(dtype)
    _complete(folder, place, typed, models, {**settings, **expert.settings})


def files_of(result: Result) -> Path | None:
    """Return the folder whose tokenizer and configuration are copied; None where a file of weights is alone."""
    choice, models = result.request.files, result.models
    source = models.source if choice == "base" else models.experts[choice].source
    if choice != "base" and (source.folder is None or source.is_adapter):
        raise OptionError(f"files={choice}: {source.given} is no folder of a model; choose another")
    return source.folder


def _complete(folder: Path, place: Path | None, weights: Weights, models: Models, settings: Mapping[str, Any]) -> None:
    beside.copy(place, folder)
    models.vocabulary.complete(folder, place)
    beside.configured(folder, weights, settings)


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


def _dtype(result: Result) -> torch.dtype | None:
    return DTYPES[result.request.dtype] if result.request.dtype else None
