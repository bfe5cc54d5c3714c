"""Plain tensor helpers: the precision of arithmetic, finiteness, shared storage."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """Return a floating-point tensor in fp32, or as it is if it is fp64: the precision of all arithmetic here."""
    return tensor.to(widened(tensor.dtype))


def widened(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which arithmetic on a type happens; torch has no promotion for those of 8 bits."""
    eight = dtype.is_floating_point and dtype.itemsize == 1
    return torch.float32 if eight else torch.promote_types(dtype, torch.float32)


def shared(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Find names that view the same storage in the same way: tied parameters."""
    first: dict[tuple, str] = {}
    ties: dict[str, str] = {}
    for name in sorted(tensors):
        t = tensors[name]
        key = (t.device, t.data_ptr(), tuple(t.shape), t.stride(), t.dtype)
        if t.numel() and first.setdefault(key, name) != name:
            ties[name] = first[key]
    return ties


def finite(tensor: Tensor) -> bool:
    """Return whether a non-empty tensor holds neither NaN nor infinity."""
    low, high = torch.aminmax(
        wide(tensor) if tensor.itemsize == 1 else tensor
    )  # propagates NaN, and needs no mask as large as the tensor
    return math.isfinite(low.item()) and math.isfinite(high.item())


def copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict's values on the CPU, in storage of their own; tied names stay one tensor."""
    ties = shared({name: tensor.detach() for name, tensor in state.items()})
    own = {name: tensor.detach().cpu().clone() for name, tensor in state.items() if name not in ties}
    return {name: own[ties.get(name, name)] for name in state}
