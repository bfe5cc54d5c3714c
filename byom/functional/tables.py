"""A range coder for small integers, with a fixed family of probability tables to choose from."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, localcontext
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[Any]

LIMIT = 127  # the largest magnitude that tables know
PIECE = 1 << 16  # integers that are counted at once: what the caches hold
TOTAL = 1 << 22  # what the weights of a table add up to, about; each integer has at least 1 of it


@lru_cache(maxsize=1)
def weights() -> Array:
    """Return all tables: weights of the integers from -`LIMIT` to `LIMIT`.

    The first are normal distributions of growing width; the others have a free weight of 0 and fall off
    geometrically on both sides. They are made in decimal arithmetic, whose results the standard fixes to the last
    digit, so that what one machine writes any other reads.

    Returns:
        ``[K, 2 LIMIT + 1]`` float64 with integer values, K at most 256.
    """
    with localcontext() as context:
        context.prec = 30
        normal = [_normal(Decimal(2) ** (Decimal(step) / 4)) for step in range(-10, 25)]
        spiked = [
            _spiked(1 - Decimal(2) ** (-Decimal(step) / 2), Decimal(ratio))
            for step in range(1, 33)
            for ratio in ("0.03", "0.12", "0.25", "0.4", "0.6", "0.8")
        ]
    return np.array([_scaled(half) for half in normal + spiked])


def _normal(width: Decimal) -> list[Decimal]:
    """Return weights of the magnitudes from 0 to `LIMIT`."""
    return [(-((Decimal(value) / width) ** 2) / 2).exp() for value in range(LIMIT + 1)]


def _spiked(zero: Decimal, ratio: Decimal) -> list[Decimal]:
    """Return weights of the magnitudes, that of 0 in all `zero` of them, each other one `ratio` of the one before."""
    side = (1 - zero) * (1 - ratio) / 2
    return [zero, *(side * ratio**value for value in range(LIMIT))]


def _scaled(half: Sequence[Decimal]) -> list[float]:
    whole = half[0] + 2 * sum(half[1:])
    counts = [float(max(1, int(TOTAL * weight / whole + Decimal("0.5")))) for weight in half]
    return [*reversed(counts[1:]), *counts]


@lru_cache(maxsize=1)
def lengths() -> Array:
    """Return code lengths in bits, ``[K, 2 LIMIT + 1]`` float64, of every integer under every table."""
    table = weights()
    return np.log2(table.sum(1, keepdims=True)) - np.log2(table)


def best(histograms: Array) -> tuple[Array, Array]:
    """Choose the table that writes each row of integers in the fewest bits.

    Args:
        histograms: ``[C, 2 LIMIT + 1]``, how often each integer occurs in each of C rows.

    Returns:
        The tables' numbers, uint8 ``[C]``, and the bits that they take, float64 ``[C]``.
    """
    bits = (torch.from_numpy(histograms).double() @ torch.from_numpy(lengths()).T).numpy()
    chosen = bits.argmin(1)
    return chosen.astype(np.uint8), bits[np.arange(len(bits)), chosen]


def histograms(rows: Array) -> Array:
    """Count integers.

    Args:
        rows: ``[C, n]`` integers, none beyond `LIMIT` in magnitude.

    Returns:
        ``[C, 2 LIMIT + 1]`` int64.
    """
    count, width = len(rows), 2 * LIMIT + 1
    if count == 1 and rows.size > PIECE:
        return np.sum([histograms(rows[:, at : at + PIECE]) for at in range(0, rows.size, PIECE)], axis=0)
    shifted = rows.astype(np.int64) + LIMIT + width * np.arange(count)[:, None]
    return np.bincount(shifted.reshape(-1), minlength=count * width).reshape(count, width)


def encode(rows: Sequence[Array], chosen: Sequence[int]) -> bytes:
    """Write rows of integers as one stream.

    Args:
        rows: Integers, none beyond `LIMIT` in magnitude; any lengths.
        chosen: The table of each row.

    Returns:
        The stream: a multiple of 4 bytes.
    """
    coder = _coding().stream.queue.RangeEncoder()
    for row, table in zip(rows, chosen, strict=True):
        if len(row):
            coder.encode(np.ascontiguousarray(row.astype(np.int32) + LIMIT), _model(int(table)))
    return coder.get_compressed().astype("<u4").tobytes()


def decode(data: bytes, sizes: Sequence[int], chosen: Sequence[int]) -> list[Array]:
    """Read rows of integers back.

    Args:
        data: What `encode` wrote.
        sizes: The length of each row.
        chosen: The table of each row.

    Returns:
        The rows, int32.

    Raises:
        ValueError: If the stream is cut short, goes on by more than a word, or names a table that there is not.
    """
    if len(data) % 4 or len(chosen) != len(sizes) or any(table >= len(weights()) for table in chosen):
        raise ValueError("not a stream of integers")
    coder = _coding().stream.queue.RangeDecoder(np.frombuffer(data, dtype="<u4").astype(np.uint32))
    try:
        rows = [
            coder.decode(_model(int(table)), size) - LIMIT if size else np.empty(0, dtype=np.int32)
            for size, table in zip(sizes, chosen, strict=True)
        ]
    except AssertionError as error:  # no stream that the coder writes leads there
        raise ValueError("not a stream of integers") from error
    if not coder.maybe_exhausted():
        raise ValueError("the stream goes on")
    return rows


@lru_cache(maxsize=256)
def _model(table: int) -> Any:
    row = weights()[table]
    return _coding().stream.model.Categorical(row / row.sum(), lazy=False, perfect=False)


def _coding() -> Any:
    """Import the coder where it is first needed: it is a compiled library."""
    import constriction

    return constriction
