"""Containers of tensors: safetensors, PyTorch's own files, one or in shards, in a folder or alone."""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from byom.checkpoint.pickled import read_pickled
from byom.errors import CheckpointError
from byom.weights import Weights

INDEX = "pytorch_model.bin.index.json"
PICKLED = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
HOLDERS = ("state_dict", "model_state_dict", "model")
BESIDE = re.compile(r"training_args|optimizer|scheduler|scaler|rng_state(_\d+)?")
"""Files that a trainer leaves next to the weights."""


def open_raw(path: Path) -> tuple[Weights, str]:
    """Open a file or folder under the names that it has.

    Args:
        path: A safetensors file, a file of `torch.save` or `pickle.dump`, or a folder with one or with shards.

    Returns:
        The tensors, and the name of the format. Safetensors are read lazily.

    Raises:
        CheckpointError: If the file is missing, or cannot be read without running code.
    """
    if not path.exists():
        raise CheckpointError(f"there is no checkpoint at {path}")
    if path.is_dir():
        return _folder(path)
    if path.suffix == ".safetensors":
        return Weights.open(path), "safetensors"
    state, kind = _pickled(path)
    return Weights.of(state, origin=str(path)), kind


def _folder(path: Path) -> tuple[Weights, str]:
    if (path / INDEX).is_file():
        return _sharded(path), "sharded PyTorch state dict"
    if list(path.glob("*.safetensors")):
        shards = list(path.glob("*.safetensors.index.json"))
        return Weights.open(path), "sharded safetensors" if shards else "safetensors"
    files = sorted(file for file in path.iterdir() if file.suffix in PICKLED and not BESIDE.fullmatch(file.stem))
    if len(files) != 1:
        what = f"{len(files)} files of weights ({', '.join(f.name for f in files)})" if files else "no file of weights"
        raise CheckpointError(f"{path} holds {what}; name one file")
    return open_raw(files[0])


def _sharded(path: Path) -> Weights:
    places: Mapping[str, str] = json.loads((path / INDEX).read_text())["weight_map"]
    state: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        if not (path / name).is_file():
            raise CheckpointError(f"{path / INDEX} names {name}, which is not there. Download it again")
        state |= _pickled(path / name)[0]
    if lost := sorted(set(places) - set(state)):
        raise CheckpointError(f"{path / INDEX} names tensors that no shard holds: {lost[:5]}. Download it again")
    return Weights.of(state, origin=str(path))


def _pickled(path: Path) -> tuple[dict[str, Tensor], str]:
    """Read a state dict through PyTorch's own restricted reader, and whatever it refuses through ours."""
    try:
        content = _loaded(path)
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, ValueError, ImportError):
        return read_pickled(path), "pickled module"
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds one {type(content).__name__} without a name; it is not a state dict")
    inner = next((content[name] for name in HOLDERS if isinstance(content.get(name), Mapping)), content)
    state = {str(name): value for name, value in inner.items() if isinstance(value, Tensor)}
    if not state:
        raise CheckpointError(f"{path} holds no tensor by name; it is not a state dict")
    return state, "PyTorch state dict"


def _loaded(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")  # what it then cannot read, we read
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
