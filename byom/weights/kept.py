"""Cuts on disk, so that the cells of a sweep find them whatever process they run in."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from byom.errors import CheckpointError
from byom.functional.selection import Cut
from byom.storage.atomic import write_json
from byom.storage.lock import alone
from byom.storage.signature import signature
from byom.weights.weights import Weights

Offset = int
Cuts = dict[str, tuple[Any, Offset]]
ByDensity = dict[float, Cuts]
Make = Callable[[Sequence[Weights], Sequence[float]], list[ByDensity]]
"""Finds the cuts of some targets at some densities in one pass."""

KEPT = ("global", "tensor")
"""Scopes whose cuts are kept; those of rows are as many numbers as a model has rows."""
_FOLDER: ContextVar[Path | None] = ContextVar("folder of cuts", default=None)


@contextmanager
def keeping(folder: Path) -> Iterator[None]:
    """Keep the cuts that are found in a block on disk, and take those that are there.

    Args:
        folder: Where; of several processes that want the same cuts one finds them, and the others wait.
    """
    token = _FOLDER.set(folder)
    try:
        yield
    finally:
        _FOLDER.reset(token)


def shared(
    targets: Sequence[Weights], reference: Weights, densities: Sequence[float], scope: str, make: Make
) -> list[ByDensity]:
    """Return the cuts of some targets by density: those on disk, and what `make` finds of the others, kept there.

    Args:
        targets: The models.
        reference: The model that differences are taken to.
        densities: What is asked for, at least.
        scope: What is ranked together.
        make: Called for targets of which a density is missing, with all densities.
    """
    folder = _FOLDER.get()
    if folder is None or scope not in KEPT or not targets or not all(map(_on_disk, targets)):
        return make(targets, densities)
    told = reference.fingerprint()
    files = [folder / f"{signature(target.fingerprint(), told, scope, digits=16)}.json" for target in targets]
    names = reference.mergeable()
    held = [_read(file, names) for file in files]
    if not _missing(held, densities):
        return held
    with _alone(folder, f"{told}-{scope}"):
        held = [_read(file, names) for file in files]
        missing = _missing(held, densities)
        found = make([targets[index] for index in missing], densities) if missing else []
        for index, each in zip(missing, found, strict=True):
            held[index] |= each
            _write(files[index], held[index])
    return held


@contextmanager
def _alone(folder: Path, name: str) -> Iterator[None]:
    """Hold a lock in the folder of cuts; see `byom.storage.lock.alone`."""
    with ExitStack() as stack:
        try:
            stack.enter_context(alone(folder / name))
        except OSError as error:
            raise CheckpointError(f"cannot keep cuts in {folder} ({error}); set cache= to a writable folder") from error
        yield


def _on_disk(weights: Weights) -> bool:
    """Return whether a model's checksums are those of its files: others would be computed for a name, as a pass is."""
    return weights._checksum is not None


def _missing(held: Sequence[ByDensity], densities: Sequence[float]) -> list[int]:
    return [index for index, each in enumerate(held) if not set(densities) <= set(each)]


def _write(file: Path, cuts: ByDensity) -> None:
    values = {repr(float(density)): _packed(each) for density, each in cuts.items()}
    write_json(file, {"values": values, "digest": signature(values, digits=64)})


def _packed(cuts: Cuts) -> dict[str, Any]:
    """Return cuts as JSON: a cut of the whole model stands once, and thresholds are exact."""
    places = {cut: place for place, cut in enumerate(dict.fromkeys(cut for cut, _ in cuts.values()))}
    return {
        "cuts": [[float(cut.threshold).hex(), cut.last, cut.count] for cut in places],
        "parameters": {name: [places[cut], offset] for name, (cut, offset) in cuts.items()},
    }


def _read(file: Path, names: Sequence[str]) -> ByDensity:
    """Return the cuts of a file; none if it is missing or damaged, so that they are found again."""
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
        if held["digest"] != signature(held["values"], digits=64):
            return {}
        return {float(density): _unpacked(each, names) for density, each in held["values"].items()}
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return {}


def _unpacked(values: Mapping[str, Any], names: Sequence[str]) -> Cuts:
    cuts = [Cut(float.fromhex(threshold), last, count) for threshold, last, count in values["cuts"]]
    return {name: (cuts[values["parameters"][name][0]], values["parameters"][name][1]) for name in names}
