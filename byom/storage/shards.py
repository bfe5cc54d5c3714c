"""Tensors as a folder of safetensors files and their index, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from byom.storage.atomic import replacing
from byom.storage.streamed import Progress, Spec, write_streamed
from byom.storage.tensor_files import INDEX, SINGLE, size, written


def save(
    folder: Path,
    specs: Mapping[str, Spec],
    read: Callable[[str], Tensor],
    ties: Mapping[str, str],
    shard_bytes: int,
    progress: Progress | None = None,
) -> Path:
    """Write tensors into a folder of safetensors files; an interrupted or failed write leaves the old folder alone.

    Args:
        folder: Where the result goes.
        specs: Tensor name to its shape and dtype, in the order in which shards are filled.
        read: Gives one tensor by name.
        ties: Alias to canonical name, recorded in the metadata.
        shard_bytes: Largest size of a file in bytes.
        progress: Called with the bytes of each tensor that has been written.

    Returns:
        The folder.

    Raises:
        CheckpointError: If the folder holds other files or cannot be written.
    """
    sizes = {name: size(*spec) for name, spec in specs.items()}
    with replacing(folder, written()) as partial:
        shards = _shards(sizes, shard_bytes)
        for number, names in enumerate(shards):
            notes = {"format": 1, "ties": dict(ties if number == 0 else {})}
            held = {name: specs[name] for name in names}
            write_streamed(partial / _shard_name(number, len(shards)), held, read, notes, progress)
        if len(shards) > 1:
            _write_index(partial, shards, sum(sizes.values()))
    return folder


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, nbytes in sizes.items():
        if shards[-1] and used + nbytes > limit:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += nbytes
    return shards


def _shard_name(number: int, total: int) -> str:
    return SINGLE if total == 1 else f"model-{number + 1:05d}-of-{total:05d}.safetensors"


def _write_index(folder: Path, shards: list[list[str]], total: int) -> None:
    where = {name: _shard_name(i, len(shards)) for i, names in enumerate(shards) for name in names}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / INDEX).write_bytes(json.dumps(index, indent=1, sort_keys=True).encode())
