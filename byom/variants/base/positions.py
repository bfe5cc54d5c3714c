"""Positions of kept entries as bytes: a byte per gap, a bit per place, or a range coder's words, as is smaller."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from byom.errors import CheckpointError, suggest
from byom.functional.compiled import kernels
from byom.variants.base import coded
from byom.variants.base.unpacker import Entries, Parts

Array = NDArray[Any]

ESCAPE = 255  # a byte that adds 255 to the gap and is followed by more of it
PLAIN = "positions"  # the part that holds positions as they are, in memory
CHUNK = 1 << 23  # places of a bitmap unpacked at once; a multiple of 8


def encode(indices: Tensor, numel: int) -> tuple[str, Tensor]:
    """Write sorted positions in the smaller of two byte forms.

    Kinds: `gap8` holds the distance to the previous position less one, in base-255 steps (254 is ``[254]``,
    255 is ``[255, 0]``); `bitmap` holds one bit per place, lowest bit first; `all` and `none` hold nothing.

    Args:
        indices: Flat positions, int64 [k], strictly ascending, in [0, numel).
        numel: Number of places.

    Returns:
        The kind and its bytes, uint8 on the CPU.

    Raises:
        ValueError: If the positions are not strictly ascending or not in [0, numel).
    """
    places = indices.detach().cpu().numpy().astype(np.int64, copy=False).reshape(-1)
    if len(places) and (found := kernels(numel)):
        kind, data = _compiled(found, np.ascontiguousarray(places), numel)
        return kind, torch.from_numpy(data)
    gaps = np.diff(places, prepend=-1) - 1
    if len(places) and (gaps.min() < 0 or places[-1] >= numel):
        raise _unsorted(numel)
    kind = _smallest(len(gaps), int((gaps // ESCAPE).sum()), numel)
    write: dict[str, Callable[[], Array]] = {
        "gap8": lambda: _to_gaps(gaps),
        "bitmap": lambda: _to_bitmap(places, numel),
    }
    return kind, torch.from_numpy(write.get(kind, _nothing)())


def smallest(indices: Tensor, numel: int) -> tuple[str, Tensor]:
    """Write sorted positions in the smallest form of all, those of `encode` and near the entropy of positions.

    Kind `coded` holds the gaps as `byom.variants.base.coded` writes them, with the weights of their own distribution
    where that is smaller, as it is where kept entries lie close together; otherwise those of a geometric one, behind a
    byte 0. Positions drawn at random take ``log2 C(n, k)`` bits, and 6 bytes or so.

    Args:
        indices: As in `encode`.
        numel: Number of places (n).

    Returns:
        The kind and its bytes, uint8 on the CPU.

    Raises:
        ValueError: As in `encode`.
    """
    kind, data = encode(indices, numel)
    if kind in ("all", "none"):
        return kind, data
    gaps = np.diff(indices.detach().cpu().numpy().reshape(-1), prepend=-1) - 1
    fair = np.concatenate([np.zeros(1, dtype=np.uint8), coded.encode(gaps, coded.geometric(len(gaps), numel))])
    least = min(fair, coded.encode(gaps), key=len)
    return ("coded", torch.from_numpy(least)) if len(least) < len(data) else (kind, data)


def decode(kind: str, data: Tensor, numel: int, count: int) -> Tensor:
    """Read positions back.

    Args:
        kind: `gap8`, `bitmap`, `coded`, `all` or `none`.
        data: The bytes, uint8, flat.
        numel: Number of places.
        count: Number of positions, k.

    Returns:
        Flat positions, int64 [k], strictly ascending, where the bytes lie.

    Raises:
        CheckpointError: If the bytes do not hold exactly `count` positions in [0, numel).
    """
    readers: dict[str, Callable[[Array, int], Array]] = {
        "gap8": _from_gaps,
        "bitmap": _from_bitmap,
        "coded": lambda data, numel: _from_coded(data, numel, count),
        "all": lambda data, numel: _only_empty(data, np.arange(numel, dtype=np.int64)),
        "none": lambda data, _: _only_empty(data, np.empty(0, dtype=np.int64)),
    }
    if kind not in readers:
        raise CheckpointError(f"unknown encoding of positions '{kind}': {suggest(kind, readers)}")
    if data.dtype != torch.uint8:
        raise _corrupt(f"the bytes are {data.dtype}, not torch.uint8")
    places = readers[kind](data.detach().cpu().numpy().reshape(-1), numel)
    if len(places) != count:
        raise _corrupt(f"'{kind}' holds {len(places)} positions where {count} are expected")
    return torch.from_numpy(places).to(data.device)


def decoded(parts: Parts, numel: int) -> Entries:
    """Return the values and positions among the parts of one parameter.

    Args:
        parts: ``values [k]`` and their positions, as `encode` or `smallest` gives them under their kind, or as int64
            ``positions [k]``.
        numel: Number of entries of the parameter.

    Raises:
        CheckpointError: If values and positions do not fit the parameter.
    """
    if "values" not in parts or len(parts) < 2:
        raise CheckpointError("values and their positions are not stored together; pack or fetch it again")
    values = parts["values"]
    if len(values) > numel:
        raise CheckpointError(f"{len(values)} stored values do not fit a tensor of {numel}")
    kind = next(part for part in parts if part != "values")
    if kind == PLAIN:
        return Entries(_required(parts[kind], numel, len(values)), values)
    return Entries(decode(kind, parts[kind], numel, len(values)), values)


def _required(places: Tensor, numel: int, count: int) -> Tensor:
    """Return positions that are held as they are, refusing those that are none."""
    fit = places.dtype == torch.int64 and len(places) == count
    if not fit or (count and (places[0] < 0 or places[-1] >= numel or bool((places.diff() <= 0).any()))):
        raise _corrupt(f"they are not {count} ascending ones of {numel} places")
    return places


def _smallest(count: int, escapes: int, numel: int) -> str:
    if count in (0, numel):
        return "all" if count else "none"
    return "gap8" if count + escapes <= -(-numel // 8) else "bitmap"


def _compiled(found: Any, places: Array, numel: int) -> tuple[str, Array]:
    """Return what `encode` returns, by kernels that make neither gaps nor bits in wider types."""
    escapes = found.escapes(places)
    if escapes < 0 or places[-1] >= numel:
        raise _unsorted(numel)
    kind = _smallest(len(places), escapes, numel)
    if kind == "gap8":
        data = np.empty(len(places) + escapes, dtype=np.uint8)
        found.write_gaps(places, data)
    elif kind == "bitmap":
        data = np.zeros(-(-numel // 8), dtype=np.uint8)
        found.write_bits(places, data)
    else:
        data = _nothing()
    return kind, data


def _unsorted(numel: int) -> ValueError:
    return ValueError(f"positions must be strictly ascending in [0, {numel}); sort them first")


def _nothing() -> Array:
    return np.empty(0, dtype=np.uint8)


def _to_gaps(gaps: Array) -> Array:
    ends = np.cumsum(gaps // ESCAPE + 1) - 1
    data = np.full(ends[-1] + 1, ESCAPE, dtype=np.uint8)
    data[ends] = gaps % ESCAPE
    return data


def _from_gaps(data: Array, numel: int) -> Array:
    if len(data) and data[-1] == ESCAPE:
        raise _corrupt("the last gap is cut short")
    ends = np.flatnonzero(data != ESCAPE)
    places = np.cumsum(data, dtype=np.int64)[ends] + np.arange(len(ends))
    if len(places) and places[-1] >= numel:
        raise _corrupt(f"a position reaches {places[-1]} of {numel} places")
    return places


def _to_bitmap(places: Array, numel: int) -> Array:
    data = np.empty(-(-numel // 8), dtype=np.uint8)
    for start in range(0, numel, CHUNK):
        low, high = np.searchsorted(places, (start, start + CHUNK))
        bits = np.zeros(min(CHUNK, numel - start), dtype=np.bool_)
        bits[places[low:high] - start] = True
        packed = np.packbits(bits, bitorder="little")
        data[start // 8 : start // 8 + len(packed)] = packed
    return data


def _from_bitmap(data: Array, numel: int) -> Array:
    if len(data) != -(-numel // 8):
        raise _corrupt(f"a bitmap of {numel} places is {-(-numel // 8)} bytes, not {len(data)}")
    if numel % 8 and data[-1] >> numel % 8:
        raise _corrupt(f"bits are set beyond the {numel} places")
    step = CHUNK // 8
    pieces = [_ones(data[start : start + step]) + 8 * start for start in range(0, len(data), step)]
    return np.concatenate([np.empty(0, dtype=np.int64), *pieces])


def _from_coded(data: Array, numel: int, count: int) -> Array:
    if not 0 < count < numel:
        raise _corrupt(f"{count} of {numel} places are not coded")
    fair = len(data) > 0 and data[0] == 0
    gaps = coded.decode(data[1:], count, coded.geometric(count, numel)) if fair else coded.decode(data, count)
    places = np.cumsum(gaps + 1) - 1
    if int(gaps.max()) >= numel or places[-1] >= numel:
        raise _corrupt(f"a position lies beyond the {numel} places")
    return places


def _ones(data: Array) -> Array:
    return np.flatnonzero(np.unpackbits(data, bitorder="little").view(np.bool_))


def _only_empty(data: Array, places: Array) -> Array:
    if len(data):
        raise _corrupt(f"{len(data)} bytes follow where none belong")
    return places


def _corrupt(what: str) -> CheckpointError:
    return CheckpointError(f"the positions of kept entries are corrupt: {what}; pack or fetch it again")
