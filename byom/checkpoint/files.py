"""Containers of tensors: safetensors, PyTorch's own files, one or in shards, in a folder or alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from byom.checkpoint.pickled import HOLDERS, read_pickled
from byom.checkpoint.plain import load, require_dense
from byom.errors import CheckpointError
from byom.storage import foreign
from byom.storage.folder import PYTORCH, SAFETENSORS, indexed, require_agreement
from byom.storage.quantised import require_plain
from byom.weights import Spec, Weights
from byom.weights.ties import file_ties

BESIDE = re.compile(r"training_args|optimizer|scheduler|scaler|rng_state(_\d+)?")
"""Files that a trainer leaves next to the weights."""


@dataclass(frozen=True)
class _Held:
    """What `byom.weights.ties.file_ties` asks of files, for tensors in memory."""

    path: Path
    specs: Mapping[str, tuple[tuple[int, ...], torch.dtype]]
    ties: Mapping[str, str]
    read: Callable[[str], Tensor]


def open_raw(path: Path) -> tuple[Weights, str]:
    """Open a file or folder under the names that it has.

    A folder with both formats is read as safetensors, as transformers does. A file is read by what it holds, whatever
    the end of its name.

    Args:
        path: A safetensors file, a file of `torch.save` or `pickle.dump`, or a folder with one or with shards.

    Returns:
        The tensors, and the name of the format. Safetensors are read lazily.

    Raises:
        CheckpointError: If the file is missing, quantised, ambiguous, or cannot be read without running code.
    """
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        raise CheckpointError(foreign.missing(path))
    if foreign.is_safetensors(path) or (path.suffix == ".safetensors" and not foreign.is_pickle(path)):
        return Weights.open(path), "safetensors"
    state, kind = _pickled(path)
    return _held(path, state), kind


def _held(path: Path, state: Mapping[str, Tensor]) -> Weights:
    """Return tensors of PyTorch's own files, with the names that a configuration beside them ties to theirs."""
    held = Weights.of(state, origin=str(path))
    files = _Held(path, {name: (held.shape(name), held.dtype(name)) for name in held}, held.ties, held.raw)
    require_plain(path, files.specs)
    tied = file_ties(files)
    specs = {name: Spec(*files.specs[tied.stored.get(name, name)]) for name in (*held, *tied.stored)}
    doubled = tied.doubled.difference(*held.ties.items())
    return Weights(specs, tied.renamed(held.raw), ties=tied.ties, origin=str(path), doubled=doubled)


def _folder(path: Path) -> tuple[Weights, str]:
    if list(path.glob("*.safetensors")) or (path / SAFETENSORS.index_file).is_file():
        shards = list(path.glob("*.safetensors.index.json"))
        return Weights.open(path), "sharded safetensors" if shards else "safetensors"
    if (path / PYTORCH.index_file).is_file():
        return _sharded(path), "sharded PyTorch state dict"
    if (path / PYTORCH.single_file).is_file():
        return open_raw(path / PYTORCH.single_file)
    ends = foreign.PICKLES
    files = sorted(file for file in path.iterdir() if file.suffix in ends and not BESIDE.fullmatch(file.stem))
    if len(files) != 1 or foreign.is_shard(files[0].name):
        raise CheckpointError(foreign.unclear(path, [file.name for file in files]))
    return open_raw(files[0])


def _sharded(path: Path) -> Weights:
    places = indexed(path, PYTORCH)
    shards = {shard: _pickled(path / shard)[0] for shard in sorted(set(places.values()))}
    held = [(name, shard) for shard, state in shards.items() for name in state]
    require_agreement(path / PYTORCH.index_file, places, held)
    return _held(path, {name: tensor for state in shards.values() for name, tensor in state.items()})


def _pickled(path: Path) -> tuple[dict[str, Tensor], str]:
    """Read a state dict through PyTorch's own restricted reader, and whatever it refuses through ours."""
    if why := foreign.misplaced(path):
        raise CheckpointError(f"{path} {why}")
    try:
        content = load(path)
    except Exception:  # of any kind, on files that are damaged or made to mislead it
        return read_pickled(path), "pickled module"
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds one {type(content).__name__} without a name; it is not a state dict")
    inner = next((content[name] for name in HOLDERS if isinstance(content.get(name), Mapping)), content)
    require_dense(path, inner)
    state = {str(name): value for name, value in inner.items() if isinstance(value, Tensor)}
    if not state:
        raise CheckpointError(f"{path} holds no tensor by name; it is not a state dict")
    return state, "PyTorch state dict"
