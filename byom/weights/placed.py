"""Weights whose tensors are on another device when they are read, each read and sent ahead of its turn."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from copy import copy
from functools import cache
from itertools import pairwise
from threading import local
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from byom.errors import OptionError
from byom.weights.spec import CPU, Rounding, rounded
from byom.weights.weights import Weights

Chosen = Callable[[str], torch.device]
PINNED = 1 << 28  # bytes of the largest tensor that is copied to pinned memory, which PyTorch keeps

_SOURCES: WeakKeyDictionary[Weights, Weights] = WeakKeyDictionary()
"""Placed weights to those that were given."""
_THREAD = local()


def placed(weights: Weights, device: torch.device | str | Chosen) -> Weights:
    """Return the same weights, whose tensors are on a device when they are read.

    Args:
        weights: What is read; names, shapes, types, ties and checksums are theirs.
        device: The device, or one for each canonical name.

    Returns:
        Weights of the same kind; the same object if all of its tensors are known to be there.
    """
    chosen = device if callable(device) else fitting([weights], torch.device(device), None)
    if all(weights.place(name) == chosen(name) for name in weights.canonical()):
        return weights
    source = home(weights)
    seen, ahead = copy(source), _Ahead(source, chosen)
    seen._read, seen._place, seen._checksum = Rounding(ahead.raw, ahead.cast), chosen, source.checksum
    _SOURCES[seen] = source
    return seen


def beside(weights: Weights, others: Weights) -> Weights:
    """Return the same weights, whose tensors come to where those of others lie, as far as that is known.

    Args:
        weights: What is read.
        others: Weights with these names.
    """

    def place(name: str) -> torch.device:
        return (others.place(name) if name in others else None) or weights.place(name) or CPU

    apart = any(weights.place(name) not in (None, place(name)) for name in weights.canonical())
    return placed(weights, place) if apart else weights


def brought(weights: Weights, place: Chosen) -> Weights:
    """Return the same weights, whose tensors come to a place once they were computed; nothing is computed ahead.

    Args:
        weights: What is read, such as a merged model.
        place: The device of each canonical name.
    """
    seen = copy(weights)

    def raw(name: str) -> Tensor:
        with within_memory(f"merging '{name}'"):
            return weights.raw(name).to(place(name))

    def cast(name: str) -> Tensor | None:
        with within_memory(f"merging '{name}'"):
            value = rounded(weights._read, name)
            return None if value is None else value.to(place(name))

    seen._read, seen._place = Rounding(raw, cast), place
    return seen


@contextmanager
def within_memory(work: str) -> Iterator[None]:
    """Say what to do where a GPU's memory does not hold what a block computes there.

    Args:
        work: What it does, for the message.

    Raises:
        OptionError: Instead of PyTorch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = str(error).partition("\n")[0]
        raise OptionError(
            f"{work} takes more memory than the GPU has left ({reason}); use merge.device=cpu, and device=cpu where "
            "the encoder takes part"
        ) from error


def chosen(name: str, auto: torch.device | None = None) -> torch.device:
    """Return the device that ``merge.device`` names.

    Args:
        name: ``auto``, ``cpu``, ``cuda`` or ``cuda:1``.
        auto: What ``auto`` takes if it is a GPU; None takes a GPU if there is one.

    Raises:
        OptionError: If there is no such device here.
    """
    if name == "auto":
        found = auto or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return found if found.type == "cuda" else CPU  # others lack fp64, in which matrices are factored
    try:
        if name is None or torch.empty(0, device=name).is_meta:  # None is whatever PyTorch takes by itself
            raise RuntimeError("it holds no values")
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise OptionError(
            f"merge.device={name} cannot be used here ({reason}); use merge.device=auto or merge.device=cpu"
        ) from error
    return torch.device(name)


def follow(seen: Weights, weights: Weights) -> None:
    """Let `home` find of weights that only watch others what it finds of these."""
    if weights in _SOURCES:
        _SOURCES[seen] = _SOURCES[weights]


def home(weights: Weights) -> Weights:
    """Return the weights that were given to `placed`, or the same."""
    return _SOURCES.get(weights, weights)


class _Sent(NamedTuple):
    """A tensor that was read, and on CUDA the event after which it has arrived."""

    value: Tensor
    arrived: torch.cuda.Event | None = None


class _Ahead:
    """Reads tensors and sends them, the next one ahead while those who asked for this one compute with it.

    Looking ahead begins with the second of two tensors that are read in order, and a tensor that was read for nothing
    is let go with the next request; so whoever reads here and there reads no more than that. What is merged when it is
    read is not merged ahead, which would hold two tensors of every model.

    Args:
        source: What is read.
        chosen: Where each tensor goes.
    """

    def __init__(self, source: Weights, chosen: Chosen) -> None:
        self._source, self._chosen = source, chosen
        self._order = {} if isinstance(source._read, Rounding) else dict(pairwise(source.mergeable()))
        self._last = ""
        self._next: tuple[str, Future[_Sent]] | None = None

    def raw(self, name: str) -> Tensor:
        """Return a tensor as it was computed, on its device."""
        if getattr(_THREAD, "reads_ahead", False):  # it would wait for what stands behind it in the queue
            return _arrived(_sent(self._source, name, self._chosen(name)), self._chosen(name))
        held, self._next = self._next, None
        if held is not None and held[0] == name:
            sent = held[1].result()
        else:
            sent = _sent(self._source, name, self._chosen(name))
        follower = self._order.get(name)
        if follower is not None and self._order.get(self._last) == name:
            work = _reader().submit(_read_ahead, self._source, follower, self._chosen(follower))
            self._next = follower, work
        self._last = name
        return _arrived(sent, self._chosen(name))

    def cast(self, name: str) -> Tensor | None:
        """Return a tensor in its declared dtype where that takes less than to cast it; see `Rounding`."""
        value = rounded(self._source._read, name)
        return None if value is None else value.to(self._chosen(name))


def _read_ahead(source: Weights, name: str, device: torch.device) -> _Sent:
    _THREAD.reads_ahead = True
    if device.type != "cuda":
        return _Sent(source.raw(name))  # sent by who asks for it
    return _sent(source, name, device)


def _sent(source: Weights, name: str, device: torch.device) -> _Sent:
    value = source.raw(name)
    if device.type != "cuda" or value.device.type != "cpu":
        return _Sent(value.to(device))
    with torch.cuda.device(device), torch.cuda.stream(stream := _stream(device)):
        value = value.pin_memory() if value.nbytes <= PINNED else value  # from other memory the driver copies by pieces
        sent = value.to(device, non_blocking=True)
        event = torch.cuda.Event()
        event.record(stream)
    return _Sent(sent, event)


def _arrived(sent: _Sent, device: torch.device) -> Tensor:
    """Return a tensor for the stream that computes, which waits for it without keeping the host."""
    if sent.arrived is None:
        return sent.value.to(device)
    stream = torch.cuda.current_stream(device)
    stream.wait_event(sent.arrived)
    sent.value.record_stream(stream)
    return sent.value


@cache
def _reader() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(1, "byom reads ahead")


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def room(device: torch.device | str) -> int | None:
    """Return the bytes that are free on a device; None where nothing says so."""
    device = torch.device(device)
    if device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def fitting(models: Iterable[Weights], device: torch.device, room: int | None) -> Chosen:
    """Return where each tensor of some models is computed with: on a device if all fit there together, else the CPU.

    Args:
        models: All models of a merge.
        device: Where they go if they fit.
        room: Bytes that are free there; None if that is not known.

    Returns:
        The device of each canonical name of the first model.
    """
    first, *_ = every = list(models)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    copies = 2 * len(every) + 3  # those that are merged and the next ones, their differences, and the result

    def bytes_of(name: str) -> int:
        width = 8 if any(name in each and each.dtype(name) == torch.float64 for each in every) else 4
        return copies * width * torch.Size(first.shape(name)).numel()

    beyond = {name for name in first.canonical() if room is not None and bytes_of(name) > room}
    return lambda name: CPU if name in beyond else device
