"""Tensors of other kinds than one dense array of numbers, refused with what turns them into one."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from byom.errors import CheckpointError

MALFORMED = (
    pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, ValueError, ImportError, LookupError, TypeError,
    OverflowError, MemoryError, zipfile.BadZipFile, NotImplementedError, OSError,
)  # fmt: skip
"""Errors of PyTorch's reader on files that it does not read."""
_REMEDIES = {
    "quantised": "Call dequantize() on it, or save the model before it was quantised",
    "sparse": "Call to_dense() on it, and save again",
    "nested": "Call to_padded_tensor or take it apart, and save again",
    "without values (on the device 'meta')": "Load the model onto a real device before saving it",
}


def require_dense(file: Path, state: Mapping[Any, Any]) -> None:
    """Refuse quantised, sparse and nested tensors, and subclasses that hold something else than they show.

    Args:
        file: The file that the tensors are of.
        state: Name to tensor; values that are none are passed over.

    Raises:
        CheckpointError: Naming the tensor and what it is.
    """
    for name, value in state.items():
        if "_packed_params" in str(name):
            raise CheckpointError(
                f"{file} is quantised (torch.ao.quantization): '{name}' holds codes and scales. Save the model before "
                "it was quantised"
            )
        if isinstance(value, Tensor) and (kind := _kind(value)):
            remedy = _REMEDIES.get(kind, "Save plain tensors: dequantize() or full_tensor() makes one of most kinds")
            raise CheckpointError(f"{file}: tensor '{name}' is {kind}, and cannot be merged as it is. {remedy}")


def _kind(tensor: Tensor) -> str | None:
    if tensor.is_quantized:
        return "quantised"
    if tensor.is_nested:
        return "nested"
    if tensor.layout != torch.strided:
        return "sparse"
    if tensor.is_meta:
        return "without values (on the device 'meta')"
    return None if type(tensor) in (Tensor, nn.Parameter, nn.Buffer) else f"a {type(tensor).__name__}"
