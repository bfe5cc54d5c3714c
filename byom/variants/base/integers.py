"""Small unsigned integers as bytes: a few bits each, lowest bit first."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from byom.errors import CheckpointError

CHUNK = 1 << 20  # integers whose bits are spread out at once; a multiple of 8, so that chunks end at whole bytes


def pack(codes: Tensor, bits: int) -> Tensor:
    """Write integers one after another, without gaps between their bits.

    Args:
        codes: Integers in ``[0, 2^bits)``, any shape, ``n`` of them.
        bits: Bits of each, from 1 to 8.

    Returns:
        ``[ceil(n * bits / 8)]`` uint8 on the CPU.

    Raises:
        ValueError: If an integer needs more bits or `bits` is out of range.
    """
    _require_bits(bits)
    flat = codes.detach().reshape(-1).cpu()
    if len(flat) and not 0 <= int(flat.min()) <= int(flat.max()) < 1 << bits:
        raise ValueError(f"codes must lie in [0, {1 << bits}) to be written in {bits} bits")
    values = flat.to(torch.uint8).numpy()
    pieces = []
    for start in range(0, len(values), CHUNK):
        spread = np.unpackbits(values[start : start + CHUNK, None], axis=1, bitorder="little", count=bits)
        pieces.append(np.packbits(spread.reshape(-1), bitorder="little"))
    return torch.from_numpy(np.concatenate([np.empty(0, dtype=np.uint8), *pieces]))


def unpack(data: Tensor, bits: int, numel: int) -> Tensor:
    """Read integers back.

    Args:
        data: What `pack` returned.
        bits: Bits of each, from 1 to 8.
        numel: Number of integers (n).

    Returns:
        ``[n]`` uint8, where the bytes lie.

    Raises:
        CheckpointError: If the bytes are not those of n integers.
        ValueError: If `bits` is out of range.
    """
    _require_bits(bits)
    expected = -(-numel * bits // 8)
    if data.dtype != torch.uint8 or data.numel() != expected:
        raise CheckpointError(
            f"{numel} integers of {bits} bits are {expected} bytes, not {data.numel()} of {data.dtype}; "
            "pack or fetch it again"
        )
    packed = data.reshape(-1).cpu().numpy()
    codes = np.empty(numel, dtype=np.uint8)
    for start in range(0, numel, CHUNK):
        count = min(CHUNK, numel - start)
        piece = packed[start * bits // 8 : -(-(start + count) * bits // 8)]
        spread = np.unpackbits(piece, bitorder="little", count=count * bits).reshape(count, bits)
        codes[start : start + count] = np.packbits(spread, axis=1, bitorder="little").reshape(-1)
    return torch.from_numpy(codes).to(data.device)


def _require_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"integers of {bits} bits cannot be written; use 1 to 8")
