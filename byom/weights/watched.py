"""Weights that say how much of them is read, for a command that shows how far it is."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from threading import Lock
from weakref import WeakKeyDictionary

from torch import Tensor

from byom.storage.tensor_files import size
from byom.weights.placed import follow
from byom.weights.weights import Weights

_WATCHED: WeakKeyDictionary[Weights, Weights] = WeakKeyDictionary()
"""Watched weights to those that nobody watches."""


def watched(weights: Weights, callback: Callable[[int], None]) -> Weights:
    """Return the same weights, which call back with the bytes of each tensor that is read, each time it is read.

    A single value counts as much as its tensor. Looking at a few values of each tensor (`unwatched`) does not count.

    Args:
        weights: What is read.
        callback: Takes the size in bytes that the tensor has in `weights`; called in the thread that reads, by one at a
            time.

    Returns:
        Weights of the same kind.
    """
    seen, read, one = copy(weights), weights.raw, Lock()

    def reading(name: str) -> Tensor:
        value = read(name)
        with one:
            callback(size(weights.shape(name), weights.dtype(name)))
        return value

    seen._read, seen._checksum = reading, weights.checksum
    _WATCHED[seen] = unwatched(weights)
    follow(seen, weights)
    return seen


def unwatched(weights: Weights) -> Weights:
    """Return the weights that a reader who does not count takes: those that were given to `watched`, or the same."""
    return _WATCHED.get(weights, weights)
