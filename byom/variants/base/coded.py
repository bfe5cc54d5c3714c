"""Integers from 0 on in about as many bits as their distribution allows, by a range coder.

A number below 8 is a class of its own; above, a class is a quarter of an octave, and the number's place in it follows
with equal probabilities. The classes' weights are integers that are stored, one byte each, or are found from integers
that reader and writer know: by IEEE addition, multiplication and division alone, never by a function whose last bit
depends on the machine. The bytes are the weights, if they are stored, and the 32-bit words of constriction's range
coder (https://bamler-lab.github.io/constriction/), lowest byte first. A closing number that both sides know is found
again with a chance of 1 in 65536 where the words are not those that were written.
"""

from __future__ import annotations

from typing import Any

import constriction
import numpy as np
from numpy.typing import NDArray

from byom.errors import CheckpointError

Array = NDArray[Any]
_STREAM: Any = constriction.stream  # pyright: ignore[reportAttributeAccessIssue]  # compiled, without stubs
Categorical, Uniform = _STREAM.model.Categorical, _STREAM.model.Uniform
RangeEncoder, RangeDecoder = _STREAM.queue.RangeEncoder, _STREAM.queue.RangeDecoder

FINE = 4  # classes of an octave
LARGEST = 1 << 48  # numbers below it have classes: 188
PLACE = 16  # bits of a number's place in its class that are written at once
CLOSING, ENDS = 0xB1, 1 << 16  # the number that ends the words, and how many it might be
FLOATS = np.array([0, *((16 + byte % 16) << byte // 16 for byte in range(1, 256))], dtype=np.int64)
"""The weights that a byte stands for: 0, and floating-point numbers of 4 bits and 16 exponents."""


def encode(numbers: Array, weights: Array | None = None) -> Array:
    """Write numbers.

    Args:
        numbers: Integers in ``[0, 2^48)``, flat.
        weights: The weight of every class from 0 on that a number may have, float64; None stores those of the numbers
            themselves, which takes a byte per class up to the largest.

    Returns:
        uint8, flat.

    Raises:
        ValueError: If a number is out of range or has no class among the weights.
    """
    numbers = numbers.astype(np.int64, copy=False).reshape(-1)
    if len(numbers) and not 0 <= int(numbers.min()) <= int(numbers.max()) < LARGEST:
        raise ValueError(f"numbers must lie in [0, 2^48), not from {numbers.min()} to {numbers.max()}")
    classes, widths = _classes(numbers)
    head = np.empty(0, dtype=np.uint8)
    if weights is None:
        stored = _nearest(np.bincount(classes, minlength=1))
        head, weights = np.array([len(stored), *stored], dtype=np.uint8), FLOATS[stored].astype(np.float64)
    if len(numbers) and int(classes.max()) >= len(weights):
        raise ValueError(f"a number of class {classes.max()} has none of the {len(weights)} weights")
    coder = RangeEncoder()
    coder.encode(classes.astype(np.int32), _model(weights))
    places = numbers - first(classes)
    for width in range(1, int(widths.max(initial=0)) + 1):
        chosen = places[widths == width]
        for low, bits in _pieces(width):
            coder.encode((chosen >> low & (1 << bits) - 1).astype(np.int32), Uniform(1 << bits))
    coder.encode(np.array([CLOSING], dtype=np.int32), Uniform(ENDS))
    return np.concatenate([head, coder.get_compressed().astype("<u4").view(np.uint8)])


def decode(data: Array, count: int, weights: Array | None = None) -> Array:
    """Read numbers back.

    Args:
        data: What `encode` returned.
        count: How many were written.
        weights: Those that `encode` was given; None if it stored them.

    Returns:
        ``[count]`` int64.

    Raises:
        CheckpointError: If the bytes are not those of as many numbers.
    """
    if weights is None:
        classes = int(data[0]) if len(data) else 0
        weights, data = FLOATS[data[1 : 1 + classes]].astype(np.float64), data[1 + classes :]
        if not classes or len(weights) != classes or (count and not weights.any()):
            raise corrupt("their weights are cut short")
    if len(data) % 4:
        raise corrupt(f"{len(data)} bytes are no whole number of words")
    coder = RangeDecoder(np.frombuffer(data.tobytes(), dtype="<u4").astype(np.uint32))
    found = _read(coder, _model(weights), count)
    if count and int(found.max()) >= len(weights):
        raise corrupt(f"one is of class {found.max()}, of {len(weights)}")
    widths, numbers = _widths(found), first(found)
    for width in range(1, int(widths.max(initial=0)) + 1):
        chosen = widths == width
        for low, bits in _pieces(width):
            numbers[chosen] += _read(coder, Uniform(1 << bits), int(chosen.sum())) << low
    if int(_read(coder, Uniform(ENDS), 1)[0]) != CLOSING or not coder.maybe_exhausted():
        raise corrupt(f"they are not {count}, or not as they were written")
    return numbers


def geometric(count: int, total: int) -> Array:
    """Return the weights of gaps between chosen places, if each place is chosen with the same probability.

    Args:
        count: How many are chosen, at least 1 (k).
        total: How many there are, more than k (n).

    Returns:
        The probabilities, float64, of all classes that a gap of up to ``n - k`` can have: ``r^a - r^b`` of gaps from a
        to below b, with ``r = 1 - k / n``.
    """
    ratio = (total - count) / total
    last = int(_classes(np.array([total - count]))[0][0])
    ends = first(np.arange(last + 2)).tolist()
    below = [_power(ratio, end) for end in ends]
    return np.array([below[at] - below[at + 1] for at in range(last + 1)])


def first(classes: Array) -> Array:
    """Return the smallest number of each class."""
    widths = _widths(classes)
    return (classes - FINE * widths).astype(np.int64) << widths


def corrupt(what: str) -> CheckpointError:
    """Return the error about bytes that cannot have been written here."""
    return CheckpointError(f"coded integers are corrupt: {what}; pack or fetch it again")


def _read(coder: Any, model: Any, count: int) -> Array:
    try:
        return coder.decode(model, count).astype(np.int64)
    except AssertionError as error:  # the coder's own error for words that no number leads to
        raise corrupt("no numbers have their words") from error


def _classes(numbers: Array) -> tuple[Array, Array]:
    """Return the class of each number, and in how many bits its place in the class is written."""
    widths = np.maximum(np.frexp(numbers.astype(np.float64))[1].astype(np.int64) - FINE.bit_length(), 0)
    return FINE * widths + (numbers >> widths), widths


def _widths(classes: Array) -> Array:
    return np.maximum(classes // FINE - 1, 0)


def _pieces(width: int) -> list[tuple[int, int]]:
    """Return the lowest bit and the number of bits of each part in which a place is written, in order."""
    return [(low, min(PLACE, width - low)) for low in range(0, width, PLACE)]


def _nearest(counts: Array) -> Array:
    """Return the bytes of the weights nearest to some counts, the largest count as the largest weight."""
    scaled = counts * (FLOATS[-1] / max(1, int(counts.max())))
    above = np.searchsorted(FLOATS, scaled).clip(1, len(FLOATS) - 1)
    nearer = np.where(scaled - FLOATS[above - 1] < FLOATS[above] - scaled, above - 1, above)
    return np.where(counts > 0, np.maximum(nearer, 1), 0).astype(np.uint8)


def _model(weights: Array) -> Any:
    """Return the model of some classes; one of none or one class gets others, which no number has."""
    padded = np.concatenate([weights, np.zeros(max(0, 2 - len(weights)))])
    return Categorical(padded if padded.any() else np.ones_like(padded), perfect=False)


def _power(base: float, exponent: int) -> float:
    """Return ``base^exponent`` by multiplications alone, which are the same on every machine."""
    result = 1.0
    while exponent:
        if exponent & 1:
            result *= base
        base, exponent = base * base, exponent >> 1
    return result
