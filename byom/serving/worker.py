"""The thread that owns the model: it takes batches, switches between them, and answers."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import torch

from byom.serving.errors import Refusal
from byom.serving.model import Model
from byom.serving.options import Options
from byom.serving.queue import Key, Part, Queue, Ticket

LOG = logging.getLogger("byom.serving")
CLOSING = "the server is shutting down; ask again in a moment"
DEAD = "the model cannot answer any more ({0}); restart the server"


class Worker:
    """One thread with the model. Nothing else touches it, so that no request sees half a switch.

    Args:
        model: The bundle's model.
        options: Batch, queue and patience.
    """

    switched: Callable[[float], Any] = staticmethod(lambda _: None)
    """Told the seconds of every switch."""
    batched: Callable[[int], Any] = staticmethod(lambda _: None)
    """Told the items of every forward pass."""

    def __init__(self, model: Model, options: Options) -> None:
        self.model, self.options = model, options
        self.failure: BaseException | None = None
        self._queue = Queue(options.batch, options.patience)
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="byom-model", daemon=True)

    def start(self) -> None:
        """Start answering."""
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """True while requests are answered."""
        return self.failure is None and not self._closing and self._thread.is_alive()

    def waiting(self) -> int:
        """Return how many items wait."""
        with self._changed:
            return len(self._queue)

    def submit(self, task: Key, ticket: Ticket) -> None:
        """Let a request wait for its turn.

        Args:
            task: Its task; None lets the model tell it from each item.
            ticket: The request, which hears of its end.

        Raises:
            Refusal: If the queue is full (503), the server is closing (503) or the model is gone (500).
        """
        with self._changed:
            if self.failure is not None:
                raise Refusal(500, DEAD.format(_named(self.failure)))
            if self._closing:
                raise Refusal(503, CLOSING, {"Retry-After": "1"})
            waiting = len(self._queue)
            if waiting + len(ticket.items) > self.options.queue:
                raise Refusal(
                    503,
                    f"{waiting} items wait already, and the queue holds {self.options.queue}; ask again in a moment",
                    {"Retry-After": "1"},
                )
            self._queue.put(task, Part(ticket, list(range(len(ticket.items)))))
            self._changed.notify()

    def close(self) -> None:
        """Refuse what waits and what comes; what runs is answered. Returns at once, and may be called again."""
        with self._changed:
            self._closing = True
            left = self._queue.clear()
            self._changed.notify()
        _refuse(left, Refusal(503, CLOSING, {"Retry-After": "1"}))

    def join(self, seconds: float) -> None:
        """Wait until the thread has ended."""
        if self._thread.ident is not None:
            self._thread.join(seconds)

    def _run(self) -> None:
        parts: list[Part] = []
        try:
            if self.options.threads:
                torch.set_num_threads(self.options.threads)
            while True:
                with self._changed:
                    while not len(self._queue) and not self._closing:
                        self._changed.wait()
                    if self._closing:
                        return
                    task, parts = self._queue.take(self.model.held, time.monotonic())
                if parts:
                    self._answer(task, parts)
        except BaseException as error:
            LOG.exception("the model's thread ended")
            with self._changed:
                self.failure = error
                left = self._queue.clear()
            _refuse([*parts, *left], Refusal(500, DEAD.format(_named(error))))

    def _answer(self, task: Key, parts: list[Part]) -> None:
        items = [item for part in parts for item in part.items]
        if task is not None or self.model.routes_on_reference:
            self._switch(task)
        size = self.options.batch
        pieces = [items[start : start + size] for start in range(0, len(items), size)]
        try:
            found = [one for piece in pieces for one in self._forward(task, piece)]
        except Exception as error:  # a forward pass changes no weight: the next one is none the worse
            LOG.exception("a batch of %d items failed", len(items))
            _refuse(parts, Refusal(500, f"the model failed on this request ({_named(error)}); the others go on"))
            return
        for part in parts:
            own, found = found[: len(part.places)], found[len(part.places) :]
            if task is None:
                self._sort(part, own)
            elif part.ticket.answer(part.places, own):
                part.ticket.deliver(None)

    def _forward(self, task: Key, items: list[Any]) -> list[Any]:
        self.batched(len(items))
        if task is None:
            return self.model.route(items)
        return [{"task": task} | answer for answer in self.model.predict(items)]

    def _switch(self, task: Key) -> None:
        if self.model.held == task:
            return
        start = time.perf_counter()
        self.model.switch(task)
        self.switched(time.perf_counter() - start)

    def _sort(self, part: Part, tasks: list[str]) -> None:
        """Let routed items wait for the tasks that they were sent to."""
        by_task: dict[str, list[int]] = {}
        for place, task in zip(part.places, tasks, strict=True):
            by_task.setdefault(task, []).append(place)
        with self._changed:
            closing = self._closing
            for task, places in by_task.items() if not closing else ():
                self._queue.put(task, Part(part.ticket, places))
        if closing:
            _refuse([part], Refusal(503, CLOSING, {"Retry-After": "1"}))


def _refuse(parts: list[Part], why: Refusal) -> None:
    for ticket in {id(part.ticket): part.ticket for part in parts}.values():
        ticket.given_up = True
        ticket.deliver(why)


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
