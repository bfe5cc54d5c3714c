"""The bytes of one quantised tensor."""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from byom.errors import CheckpointError
from byom.functional import tables
from byom.variants.base.levels import Written

HEAD = struct.Struct("<BHf")  # whether there are entries, the number of components, the step


def to_bytes(written: Written) -> Tensor:
    """Write integers, their scales and the tables they are coded by.

    Args:
        written: A difference of one tensor as integers.

    Returns:
        Uint8 ``[n]``: head, scales (fp16), one byte for the table of each row, and the stream of a range coder.
    """
    rows = written.rows()
    chosen = _chosen(rows)
    head = HEAD.pack(written.entries is not None, len(written.scales), written.step)
    scales = written.scales.numpy().astype("<f2").tobytes()
    data = head + scales + bytes(chosen) + tables.encode(rows, chosen)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def from_bytes(code: Tensor, sides: tuple[int, int]) -> Written:
    """Read what `to_bytes` wrote.

    Args:
        code: The bytes.
        sides: Rows and columns of the difference.

    Raises:
        CheckpointError: If the bytes are not those of a difference with these sides.
    """
    data, (rows, columns) = code.detach().cpu().numpy().tobytes(), sides
    try:
        some, rank, step = HEAD.unpack_from(data)
        sizes = [rows] * rank + [columns] * rank + [rows * columns] * some
        scales = np.frombuffer(data, dtype="<f2", count=rank, offset=HEAD.size)
        start = HEAD.size + 2 * rank
        chosen = data[start : start + len(sizes)]
        if some > 1 or not (0 < step < math.inf and np.isfinite(scales).all()):
            raise ValueError("not the head of a difference")
        found = [row.astype(np.int8) for row in tables.decode(data[start + len(sizes) :], sizes, chosen)]
    except (struct.error, ValueError) as error:
        raise _corrupt(sides) from error
    entries = torch.from_numpy(found.pop().reshape(rows, columns)) if some else None
    left = torch.from_numpy(np.array(found[:rank], dtype=np.int8).reshape(rank, rows).T.copy())
    right = torch.from_numpy(np.array(found[rank:], dtype=np.int8).reshape(rank, columns))
    return Written(left, right, torch.from_numpy(scales.astype(np.float16)), entries, step)


def _chosen(rows: Sequence[np.ndarray]) -> list[int]:
    counts = [tables.histograms(row.reshape(1, -1))[0] for row in rows]
    return tables.best(np.array(counts))[0].tolist() if rows else []


def _corrupt(sides: tuple[int, int]) -> CheckpointError:
    return CheckpointError(
        f"the bytes of a quantised difference are not those of a tensor of {sides[0]} x {sides[1]}; "
        "pack or fetch it again"
    )
