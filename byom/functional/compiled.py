"""Compiled kernels where there is enough for them to do, how tensors reach them, and the threads that run them."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
T = TypeVar("T")

LEAST = 10_000_000  # elements for which loading the kernels, and compiling them once, is worth a second
SWITCH = "BYOM_KERNELS"  # 0 leaves the kernels out, to compare with torch's road
_LOADED: list[ModuleType] = []


def kernels(elements: int) -> Any:
    """Return `byom.functional.kernels`, or None where torch's road is to be taken.

    Args:
        elements: How many there are to look at in all. From `LEAST` on, the kernels are loaded; for fewer they are
            taken if they are there.
    """
    if os.environ.get(SWITCH) == "0":
        return None
    return _load() if elements >= LEAST else next(iter(_LOADED), None)


@cache
def _load() -> ModuleType | None:
    """Import the kernels, and with them Numba, which takes half a second; None where it does not import."""
    try:
        _LOADED.append(import_module("byom.functional.kernels"))
    except ImportError:
        return None
    return _LOADED[0]


def plain(*tensors: Tensor) -> bool:
    """Say whether kernels take tensors: they lie in memory, and arithmetic on them is in fp32."""
    return all(
        type(tensor) is Tensor
        and tensor.device.type == "cpu"
        and tensor.is_floating_point()
        and tensor.dtype != torch.float64
        and not tensor.is_conj()
        and not tensor.is_neg()
        for tensor in tensors
    )


def operand(found: Any, flat: Tensor, spare: Array) -> Array:
    """Return flat values in fp32: as they lie in memory, or widened into spare memory.

    Args:
        found: The kernels.
        flat: ``[n]``, `plain`.
        spare: At least n elements.
    """
    if flat.dtype == torch.float32:
        return flat.detach().numpy()
    into = spare[: len(flat)]
    if flat.dtype == torch.bfloat16:
        found.widen(flat.detach().view(torch.int16).numpy().view(np.uint16), into)
    else:
        torch.from_numpy(into).copy_(flat)
    return into


def spread(work: Callable[[int, int], T], n: int, step: int) -> list[T]:
    """Call a function with stretches of a range, in as many threads as torch has.

    Args:
        work: Function of (start, stop) that spends its time in kernels.
        n: End of the range.
        step: Where stretches start, a multiple of it.

    Returns:
        What it returned, in order of the stretches.
    """
    threads = max(1, min(torch.get_num_threads(), n // step))
    width = -(-n // (threads * step)) * step
    stretches = [(start, min(start + width, n)) for start in range(0, n, width or 1)]
    if len(stretches) < 2:
        return [work(*stretch) for stretch in stretches]
    with ThreadPoolExecutor(len(stretches)) as pool:
        return list(pool.map(work, *zip(*stretches, strict=True)))
