"""Passes over tensors as compiled loops: what torch does in a dozen passes over memory happens in one.

Selecting, trimming, electing and packing are bound by memory. As torch has them, each step writes a temporary that the
next one reads: merging eight ViT-B/32 by TIES takes 15.0 s of one processor, and 5.5 s here. Only plain fp32 in memory
comes here (`byom.functional.compiled.operand` widens the rest); everything else, and small work, takes torch's road,
which is the oracle: both give the same bits. Numba compiles a function when it is first called, a few seconds for all,
and keeps the result beside this file, or in the user's cache where that cannot be written.

Import this through `byom.functional.compiled`, which knows whether it is there and worth its while.
"""

# pyright: reportUnknownMemberType=false

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray

Array = NDArray[Any]

CHUNK = 1024  # elements whose sums stay in the first-level cache
WORDS = 512  # of eight elements each, that are compared before a look at those between the edges
ESCAPE = 255  # see `byom.variants.base.positions`


def kernel(function: Callable[..., Any]) -> Any:
    """Compile a function when it is first called; it runs without Python's lock."""
    options = {"nogil": True, "error_model": "numpy"}
    try:
        compiled = njit(cache=True, **options)(function)
    except RuntimeError:  # no folder can be written to keep the result in
        return njit(**options)(function)

    @wraps(function)
    def call(*given: Any) -> Any:
        try:
            return compiled(*given)
        except OSError:  # the folder has filled up since; what was compiled is there, and only not kept
            return compiled(*given)

    return call


@kernel
def widen(values: Array, out: Array) -> None:
    """Write bf16, given as uint16, as fp32."""
    bits = out.view(np.uint32)
    for i in range(values.size):
        bits[i] = np.uint32(values[i]) << np.uint32(16)


@kernel
def magnitudes(left: Array, right: Array, out: Array) -> None:
    """Write ``|left - right|``."""
    for i in range(out.size):
        out[i] = abs(left[i] - right[i])


@kernel
def tally(values: Array, low: Any, high: Any, inside: Array) -> tuple[int, int, int, int]:
    """Count the values above `high`, equal to it and equal to `low`, and collect those between.

    Few are: what is compared goes to bytes, of which eight are looked at together, without a branch to mispredict.

    Args:
        values: Magnitudes.
        low: Lower edge.
        high: Upper edge, at least `low`.
        inside: Room for one value more.

    Returns:
        The number above, at the upper edge, at the lower edge (0 where both are one), and between.
    """
    above = found = 0
    flags, used = np.zeros(WORDS * 8, np.uint8), np.empty(WORDS, np.int64)
    words = flags.view(np.uint64)
    for start in range(0, values.size, flags.size):
        piece = values[start : start + flags.size]
        over = np.int32(0)
        for i in range(piece.size):
            over += np.int32(piece[i] > high)
        above += int(over)
        for i in range(piece.size):
            flags[i] = (piece[i] >= low) & (piece[i] <= high)
        flags[piece.size :] = 0
        count = 0
        for i in range(words.size):
            used[count] = i
            count += words[i] != 0
        for word in used[:count]:
            for i in range(word * 8, word * 8 + 8):
                inside[found] = piece[min(i, piece.size - 1)]
                found += flags[i]
    at_high = at_low = between = 0
    for i in range(found):
        value = inside[i]
        if value == high:
            at_high += 1
        elif value == low:
            at_low += 1
        else:
            inside[between] = value
            between += 1
    return above, at_high, at_low, between


@kernel
def trim(left: Array, right: Array, threshold: Any, ties: int, weight: Any, out: Array) -> None:
    """Write ``weight * (left - right)`` where it survives, and 0 of its sign elsewhere.

    Args:
        left: theta_t.
        right: theta_0.
        threshold: Magnitude of the smallest survivor.
        ties: How many of the first entries survive where they equal it.
        weight: The task's (w_t).
        out: Gets the result.
    """
    one, zero = np.float32(1), np.float32(0)
    head, base, result = left[:ties], right[:ties], out[:ties]
    for i in range(result.size):
        change = head[i] - base[i]
        result[i] = change * (one if abs(change) >= threshold else zero) * weight
    tail, base, result = left[ties:], right[ties:], out[ties:]
    for i in range(result.size):
        change = tail[i] - base[i]
        result[i] = change * (one if abs(change) > threshold else zero) * weight


@kernel
def votes(rows: Array) -> int:
    """Return how many coordinates of ``[T, n]`` have a sum over tasks above 0, less those with one below."""
    room, found = np.empty(CHUNK, np.float32), 0
    for start in range(0, rows.shape[1], CHUNK):
        row = rows[0, start : start + CHUNK]
        sums = room[: row.size]
        for j in range(row.size):
            sums[j] = row[j]
        for task in range(1, rows.shape[0]):
            row = rows[task, start : start + CHUNK]
            for j in range(row.size):
                sums[j] += row[j]
        more = np.int32(0)
        for j in range(sums.size):
            more += np.int32(sums[j] > 0) - np.int32(sums[j] < 0)
        found += int(more)
    return found


@kernel
def elect(rows: Array, base: Array, majority: Any, weights: Array, mean: bool, scale: Any, out: Array) -> None:
    """Write ``base + scale * combined``, of what agrees with the elected sign, as `byom.functional.deltas` has it.

    Args:
        rows: ``[T, n]`` trimmed task vectors, times their weights.
        base: ``[n]`` theta_0.
        majority: Sign of coordinates whose sum is 0.
        weights: ``[T]`` magnitudes of the weights, which the mean divides by.
        mean: Whether the sum is divided.
        scale: lambda.
        out: Gets the result.
    """
    zero, one = np.float32(0), np.float32(1)
    rooms = np.empty((3, CHUNK), np.float32)
    for start in range(0, base.size, CHUNK):
        origin, result, row = base[start : start + CHUNK], out[start : start + CHUNK], rows[0, start : start + CHUNK]
        signs, sums, parts = rooms[0, : row.size], rooms[1, : row.size], rooms[2, : row.size]
        for j in range(row.size):
            signs[j] = row[j]
        for task in range(1, rows.shape[0]):
            row = rows[task, start : start + CHUNK]
            for j in range(row.size):
                signs[j] += row[j]
        for j in range(signs.size):
            sign = (one if signs[j] > zero else zero) - (one if signs[j] < zero else zero)
            signs[j] = majority if sign == zero else sign
        for task in range(rows.shape[0]):
            row, weight = rows[task, start : start + CHUNK], weights[task]
            if task == 0:
                for j in range(row.size):
                    value = row[j] * (one if row[j] * signs[j] > zero else zero)
                    sums[j] = value
                    parts[j] = weight * (one if value != zero else zero)
            else:
                for j in range(row.size):
                    value = row[j] * (one if row[j] * signs[j] > zero else zero)
                    sums[j] += value
                    parts[j] += weight * (one if value != zero else zero)
        for j in range(result.size):
            whole = parts[j] if mean and parts[j] != zero else one
            result[j] = origin[j] + scale * (sums[j] / whole)


@kernel
def survivors(left: Array, right: Array, threshold: Any, ties: int, first: int, out: Array) -> int:
    """Write the positions at which ``left - right`` survives, and return their number; see `trim`.

    Args:
        left: theta_t.
        right: The reference.
        threshold: Magnitude of the smallest survivor.
        ties: How many of the first entries survive where they equal it.
        first: Position of the first entry.
        out: Room for as many positions as there are entries.
    """
    room, count = np.empty(CHUNK, np.uint8), 0
    for start in range(0, left.size, CHUNK):
        one, other = left[start : start + CHUNK], right[start : start + CHUNK]
        kept = room[: one.size]
        equal = min(max(ties - start, 0), one.size)
        for j in range(one.size):
            kept[j] = abs(one[j] - other[j]) > threshold
        for j in range(equal):
            kept[j] = abs(one[j] - other[j]) >= threshold
        place = first + start
        for j in range(kept.size):
            out[count] = place + j
            count += kept[j]
    return count


@kernel
def gather(values: Array, places: Array, first: int, out: Array) -> None:
    """Write the values at positions, of which `first` is that of the first value."""
    for i in range(places.size):
        out[i] = values[places[i] - first]


@kernel
def escapes(places: Array) -> int:
    """Return how many bytes the gaps between positions take beyond one each; -1 unless these ascend from 0 on."""
    more, previous = 0, -1
    for i in range(places.size):
        gap = places[i] - previous - 1
        if gap < 0:
            return -1
        if gap >= ESCAPE:
            more += gap // ESCAPE
        previous = places[i]
    return more


@kernel
def write_gaps(places: Array, out: Array) -> None:
    """Write gaps between ascending positions as bytes, into as many as `escapes` and one each."""
    at, previous = 0, -1
    for i in range(places.size):
        gap = places[i] - previous - 1
        while gap >= ESCAPE:
            out[at] = ESCAPE
            gap -= ESCAPE
            at += 1
        out[at] = gap
        at += 1
        previous = places[i]


@kernel
def write_bits(places: Array, out: Array) -> None:
    """Set the bits of positions, lowest first, in bytes that are 0."""
    for i in range(places.size):
        out[places[i] >> 3] |= np.uint8(1 << (places[i] & 7))
