"""The files of a folder that hold its weights; folders that could be read in two ways are refused."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

from byom.errors import CheckpointError, listed
from byom.storage.foreign import cause


class Names(NamedTuple):
    """Names of the files of a sharded model in one format.

    Args:
        index_file: Names the shard of every tensor.
        single_file: The model in one file.
        shard: Fits the name of any shard.
    """

    index_file: str
    single_file: str
    shard: re.Pattern[str]


SAFETENSORS = Names(
    "model.safetensors.index.json", "model.safetensors", re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
)
PYTORCH = Names("pytorch_model.bin.index.json", "pytorch_model.bin", re.compile(r"pytorch_model-\d{5}-of-\d{5}\.bin"))
_AGAIN = "Download it again"


def indexed(folder: Path, names: Names) -> dict[str, str]:
    """Return an index's tensor names and their shards.

    Args:
        folder: A folder with an index.
        names: The format's names of files.

    Raises:
        CheckpointError: If the index is damaged, names files that are missing or lie elsewhere, or other files of the
            folder hold the same model once more.
    """
    index = folder / names.index_file
    places = _read(index)
    shards = sorted(set(places.values()))
    if outside := [name for name in shards if _is_outside(name)]:
        raise CheckpointError(
            f"{index} names {listed(outside)}, outside of its folder; only files in it are read. {_AGAIN}"
        )
    if missing := [name for name in shards if not _is_file(folder / name)]:
        raise CheckpointError(f"{index} names shards that are missing: {missing}. Download them again")
    _require_one_model(folder, names, set(shards))
    return places


def require_agreement(index: Path, places: Mapping[str, str], held: Iterable[tuple[str, str]]) -> None:
    """Check that every tensor lies in one shard, the one that the index names if it names any.

    Args:
        index: The index, for messages.
        places: Tensor name to shard, as the index has it.
        held: Tensor names and the shards that hold them.

    Raises:
        CheckpointError: If a tensor lies in no shard, in two, or in another than the index says.
    """
    found: dict[str, str] = {}
    for name, shard in held:
        if name in found:
            raise CheckpointError(
                f"{index.parent}: tensor '{name}' lies in {found[name]} and in {shard}, and one of the two would be "
                "lost. "
                "Save the model again into an empty folder, or download it again"
            )
        found[name] = shard
    if lost := sorted(set(places) - set(found)):
        raise CheckpointError(f"{index} names tensors that no shard holds: {lost[:5]}. {_AGAIN}")
    if moved := [name for name in sorted(found) if places.get(name, found[name]) != found[name]]:
        name = moved[0]
        raise CheckpointError(
            f"{index} places '{name}' in {places[name]}, and {found[name]} holds it: index and shards are of different "
            f"models. {_AGAIN}"
        )


def parsed(text: str) -> Any:
    """Parse JSON.

    Raises:
        ValueError: If it is none, is nested too deep, or a table in it has a name twice with different values.
    """
    try:
        return json.loads(text, object_pairs_hook=_table)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for name, value in pairs:
        if name in table:
            raise ValueError(f"'{name}' is there twice")
        table[name] = value
    return table


def _read(index: Path) -> dict[str, str]:
    try:
        places = parsed(index.read_text(encoding="utf-8"))["weight_map"]
        if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
            raise ValueError("weight_map is not a table of tensors and their files")
    except (OSError, ValueError, KeyError, TypeError) as error:
        if why := cause(index):
            raise CheckpointError(f"{index} {why}") from error
        raise CheckpointError(
            f"{index} is damaged or not an index ({error!r}). Delete it and make or fetch it again"
        ) from error
    return places


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that no file can have
        return False


def _is_outside(name: str) -> bool:
    """Say whether a file lies outside of the folder that names it; links within the folder are followed."""
    kinds = (PurePosixPath(name), PureWindowsPath(name))
    return not name or "\0" in name or any(path.is_absolute() or path.drive or ".." in path.parts for path in kinds)


def _require_one_model(folder: Path, names: Names, shards: set[str]) -> None:
    index, single = names.index_file, names.single_file
    if (folder / single).is_file() and shards != {single}:
        raise CheckpointError(
            f"{folder} holds the model twice, in {single} and in the shards that {index} names; byom would "
            f"read the shards and transformers {single}. Delete the one that is out of date"
        )
    others = {file.name for file in folder.iterdir() if names.shard.fullmatch(file.name)} - shards
    if others:
        raise CheckpointError(
            f"{folder} holds shards that {index} does not name: {listed(sorted(others))}. They are left of "
            "another save, or the index is: delete what is out of date, or download the folder again"
        )
    ending = "." + index.partition(".")[2]
    for other in sorted(folder.glob(f"*{ending}")):
        if other.name != index and _read(other) != _read(folder / index):
            raise CheckpointError(
                f"{folder} holds two indexes that differ, {index} and {other.name}. Keep the one of the model "
                "that is meant"
            )
