"""PyTorch's own restricted reader, and the tensors it gives that are no dense arrays of numbers."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from byom.errors import CheckpointError
from byom.functional.tensors import require_values


def load(file: Path) -> Any:
    """Read a file of `torch.save` through PyTorch's restricted reader, from where it lies on disk if that is possible.

    Args:
        file: The file.

    Returns:
        What was saved.

    Raises:
        CheckpointError: If it is compressed or has an entry twice.
        Exception: Of many kinds, if it is damaged or holds more than tensors.
    """
    if file.suffix == ".safetensors":
        raise ValueError("by its name, torch would not take it for its own file")
    mapped = zipfile.is_zipfile(file)
    if mapped:
        with zipfile.ZipFile(file) as archive:
            require_stored(archive)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Detected pickle protocol")  # what it then cannot read, we read
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)


def require_stored(archive: zipfile.ZipFile) -> None:
    """Refuse a zip file that is compressed, or has an entry twice, of which readers take one or the other.

    Raises:
        CheckpointError: Without the file's name; mapped into memory, compressed bytes would pass for values.
    """
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
        raise CheckpointError("it is compressed, which torch.save does not do; it may unpack to any size")
    names = archive.namelist()
    if len(set(names)) < len(names):
        raise CheckpointError("it has an entry twice, and readers differ in which they take. Save it again")


def require_dense(file: Path, state: Mapping[Any, Any]) -> None:
    """Refuse quantised, sparse and nested tensors, and subclasses that hold something else than they show.

    Args:
        file: The file that the tensors are of.
        state: Name to tensor; values that are none are passed over.

    Raises:
        CheckpointError: Naming the tensor and what it is.
    """
    for name in state:
        if "_packed_params" in str(name):
            raise CheckpointError(
                f"{file} is quantised (torch.ao.quantization): '{name}' holds codes and scales. Save the model before "
                "it was quantised"
            )
    require_values({str(name): value for name, value in state.items() if isinstance(value, Tensor)}, str(file))
