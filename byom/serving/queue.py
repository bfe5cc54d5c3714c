"""The order of requests: those of one task together, switches few, and no task left waiting."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from byom.serving.errors import Refusal

Key = str | None
"""A task, or None for items whose task is yet to be told."""


@dataclass
class Ticket:
    """A request on its way: items in order, and their answers as they come.

    Args:
        items: What is asked, prepared for the model.
        arrived: When it arrived, in seconds of a monotonic clock.
        deliver: Called with None when all answers are there, or with why there are none; the first call counts.
    """

    items: list[Any]
    arrived: float
    deliver: Callable[[Refusal | None], None]
    answers: list[Any] = field(default_factory=list)
    left: int = 0
    given_up: bool = False

    def __post_init__(self) -> None:
        self.answers = [None] * len(self.items)
        self.left = len(self.items)

    def answer(self, places: list[int], answers: list[Any]) -> bool:
        """Put answers in their places, and return whether they were the last."""
        for place, one in zip(places, answers, strict=True):
            self.answers[place] = one
        self.left -= len(places)
        return self.left == 0


@dataclass(frozen=True)
class Part:
    """Items of one request that one task's model answers together.

    Args:
        ticket: The request.
        places: Which of its items.
    """

    ticket: Ticket
    places: list[int]

    @property
    def items(self) -> list[Any]:
        """The items, in the order of `places`."""
        return [self.ticket.items[place] for place in self.places]


class Queue:
    """Requests that wait, in the order of each task; not safe for threads by itself.

    Args:
        batch: Items taken at once at most; a single request with more is taken whole.
        patience: Seconds after which the oldest request of all goes first.
    """

    def __init__(self, batch: int, patience: float) -> None:
        self.batch, self.patience = batch, patience
        self._waiting: dict[Key, deque[Part]] = {}

    def __len__(self) -> int:
        """Return how many items wait."""
        return sum(len(part.places) for parts in self._waiting.values() for part in parts)

    def put(self, task: Key, part: Part) -> None:
        """Let a part wait; one of a request that came earlier stands before those that came later."""
        parts = self._waiting.setdefault(task, deque())
        place = len(parts)
        while place and parts[place - 1].ticket.arrived > part.ticket.arrived:
            place -= 1
        parts.insert(place, part)

    def take(self, current: Key, now: float) -> tuple[Key, list[Part]]:
        """Take the next batch: of the current task while it fills batches, else of whoever waited longest.

        Args:
            current: The task that the model holds.
            now: Seconds of the clock that tickets arrived by.

        Returns:
            The task and its parts, the oldest first; no parts if nothing waits.
        """
        self._forget()
        if not self._waiting:
            return current, []
        oldest = min(self._waiting, key=lambda task: self._waiting[task][0].ticket.arrived)
        late = now - self._waiting[oldest][0].ticket.arrived > self.patience
        full = sum(len(part.places) for part in self._waiting.get(current, ())) >= self.batch
        chosen = current if full and not late else oldest
        parts, room = [], self.batch
        waiting = self._waiting[chosen]
        while waiting and (not parts or len(waiting[0].places) <= room):
            parts.append(waiting.popleft())
            room -= len(parts[-1].places)
        if not waiting:
            del self._waiting[chosen]
        return chosen, parts

    def clear(self) -> list[Part]:
        """Take everything that waits."""
        parts = [part for waiting in self._waiting.values() for part in waiting]
        self._waiting.clear()
        return parts

    def _forget(self) -> None:
        """Drop what nobody waits for any more."""
        for task in list(self._waiting):
            kept = deque(part for part in self._waiting[task] if not part.ticket.given_up)
            if kept:
                self._waiting[task] = kept
            else:
                del self._waiting[task]
