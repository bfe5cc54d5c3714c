"""Batches on their way to a device: gathered, pinned and copied while the model computes on those before."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable
from queue import Empty, Full, Queue
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
R = TypeVar("R")
AHEAD = 2
"""Batches that are ready before the model asks for them: one being copied and one being gathered hide both."""
WAIT = 0.1  # seconds after which a thread looks whether it is still wanted


def feed(batches: Iterable[tuple], device: torch.device, ahead: int = AHEAD) -> Generator[tuple, None, None]:
    """Yield batches with inputs and labels on a device, in the same order.

    Towards a GPU one thread asks for the next batches (gathering rows releases Python's lock), pins them, and copies
    them in a stream of its own. On a CPU nothing is done: gathering 50 images of 224 pixels takes 1 ms and computing
    on them half a second or more, so that a thread could gain no more than it costs; the system reads a mapped file
    ahead by itself.

    Args:
        batches: Tuples that begin with inputs (name to tensor) and labels; the rest is handed on as it is.
        device: Where the model computes.
        ahead: How many batches are made ready before they are asked for.

    Yields:
        The tuples. Close it (``contextlib.closing``) where it may not be read to its end: that stops the thread.

    Raises:
        Exception: Whatever asking for a batch raised, when the batches before it have been yielded.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        for inputs, labels, *rest in batches:
            yield ({name: value.to(device) for name, value in inputs.items()}, labels.to(device), *rest)
        return
    copier = Copier(device)
    reading = prepared(batches, copier.start, ahead)
    try:
        for moving in reading:
            yield copier.finish(moving)
    finally:
        reading.close()


class Moving(NamedTuple):
    """A batch that is being copied."""

    batch: tuple
    done: Any  # torch.cuda.Event


class Copier:
    """Copies batches to a GPU in a stream of its own, so that copying and computing overlap.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def start(self, batch: tuple) -> Moving:
        """Begin to copy a batch; called in the reading thread."""
        inputs, labels, *rest = batch
        with torch.cuda.stream(self.stream):
            moved = ({name: self._sent(value) for name, value in inputs.items()}, self._sent(labels), *rest)
            return Moving(moved, self.stream.record_event())

    def finish(self, moving: Moving) -> tuple:
        """Return a batch for the current stream, which waits for the copy; the process does not."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(moving.done)
        inputs, labels, *_ = moving.batch
        for tensor in (*inputs.values(), labels):
            tensor.record_stream(current)  # or its memory would be reused while the model still reads it
        return moving.batch

    def _sent(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory().to(self.device, non_blocking=True)


def prepared(items: Iterable[T], prepare: Callable[[T], R], ahead: int = AHEAD) -> Generator[R, None, None]:
    """Yield what a function makes of items, in their order; a thread asks for them and calls it, a few ahead.

    Args:
        items: Read in the thread.
        prepare: Called in the thread.
        ahead: How many are made before they are asked for.

    Raises:
        Exception: What either raised, in its turn.
    """
    queue: Queue[tuple[R | None, BaseException | None, bool]] = Queue(ahead)
    stopped = threading.Event()

    def put(entry: tuple[R | None, BaseException | None, bool]) -> None:
        while not stopped.is_set():
            try:
                queue.put(entry, timeout=WAIT)
                break
            except Full:
                continue

    def read() -> None:
        try:
            for item in items:
                put((prepare(item), None, False))
                if stopped.is_set():
                    return
            put((None, None, True))
        except BaseException as error:  # the caller raises it
            put((None, error, True))

    thread = threading.Thread(target=read, name="byom-feed", daemon=True)
    thread.start()
    try:
        while True:
            made, error, last = queue.get()
            if error is not None:
                raise error
            if last:
                return
            yield made  # pyright: ignore[reportReturnType] - None only where it is the last
    finally:
        stopped.set()
        _drain(queue)
        thread.join()


def _drain(queue: Queue) -> None:
    """Let go of what was made ready and is not wanted: on a GPU it holds memory."""
    while True:
        try:
            queue.get_nowait()
        except Empty:
            return
