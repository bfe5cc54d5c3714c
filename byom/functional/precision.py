"""The precision in which encoders compute: single precision, TensorFloat-32, or 16 bits where autocast takes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from byom.errors import OptionError, one_of

DEFAULT = "fp32"
PRECISIONS = (DEFAULT, "tf32", "bf16", "fp16")
HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def require_precision(name: str, device: torch.device | None = None) -> str:
    """Refuse a precision that is unknown, or that a device does not compute in.

    Args:
        name: One of `PRECISIONS`.
        device: Where the encoder computes; None asks for the name alone.

    Returns:
        The name.

    Raises:
        OptionError: Saying what to use instead.
    """
    one_of("precision", name, PRECISIONS)
    if device is not None and device.type not in ("cpu", "cuda") and name == "tf32":
        raise OptionError(f"precision=tf32 is of NVIDIA's GPUs, and would do nothing on {device}; use precision=fp32")
    if device is not None and device.type == "cpu" and name in ("tf32", "fp16"):
        why = "TensorFloat-32 is of GPUs" if name == "tf32" else "16-bit floats of this kind are slow on CPUs"
        raise OptionError(f"precision={name} cannot be used on the CPU ({why}); use precision=fp32 or precision=bf16")
    return name


def later(precision: str) -> list[dict[str, str]]:
    """Return what a precision adds to a name; nothing where it is the one of the time before there were others."""
    return [] if precision == DEFAULT else [{"precision": precision}]


@contextmanager
def products(precision: str, device: torch.device) -> Iterator[None]:
    """Let a GPU's fp32 matrix products and convolutions be TensorFloat-32 in a block, or forbid it, and put that back.

    PyTorch allows it for convolutions unless told otherwise; with ``fp32`` they are computed as on a CPU.
    """
    if device.type != "cuda":
        yield
        return
    kinds: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [kind.allow_tf32 for kind in kinds]
    try:
        for kind in kinds:
            kind.allow_tf32 = precision == "tf32"
        yield
    finally:
        for kind, allowed in zip(kinds, before, strict=True):
            kind.allow_tf32 = allowed


def lowered(precision: str, device: torch.device) -> AbstractContextManager:
    """Return a context in which autocast computes in 16 bits what bears it; weights stay as they are."""
    if (half := HALVES.get(precision)) is None:
        return nullcontext()
    return torch.autocast(device.type, half)


def exact(precision: str, device: torch.device) -> AbstractContextManager:
    """Return a context inside of `lowered` in which nothing is computed in 16 bits: that of heads and losses."""
    return torch.autocast(device.type, enabled=False) if precision in HALVES else nullcontext()
