"""The size of batches in evaluation: as given, or found by doubling until memory or speed stops it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress

import torch
from torch import Tensor

from byom.data.splits import Split
from byom.errors import OptionError

ON_CPU = 50
FIRST, LARGEST = 32, 1024
GAIN = 1.05
"""Twice as many examples must be this much faster, or the smaller batch is kept."""
AUTO = "auto"


def require_batch_size(option: str, value: int | str | None) -> None:
    """Refuse what is neither a whole number from 1 on, nor ``auto``, nor None.

    Raises:
        OptionError: Naming the option.
    """
    number = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if not (number or value is None or value == AUTO):
        raise OptionError(f"{option}={value} must be a whole number from 1 on, auto, or null")


class BatchSize:
    """Examples of a forward pass; it changes no score beyond rounding.

    ``auto`` doubles the size from 32 on: at every size one batch warms up and one is timed, and a size that is not
    5 % faster than its half ends the search. Where memory runs out, at whatever size, the size is halved and the
    batch repeated. What was found holds for all further splits.

    Args:
        given: A number, ``auto``, or None: ``auto`` on a GPU, and 50 on a CPU.
        device: Where the encoder computes.
    """

    def __init__(self, given: int | str | None, device: torch.device) -> None:
        searched = given == AUTO or (given is None and device.type == "cuda")
        self.device = device
        self.now = FIRST if searched else int(given or ON_CPU)
        self.settled = not searched
        self.plain = ON_CPU if searched else self.now
        """A size for passes that hold more than activations, such as those of statistics."""
        self._limit = LARGEST if searched else self.now
        self._kept, self._best, self._warm = self.now, 0.0, False

    def batches(self, split: Split) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
        """Yield a split's batches, each of the size that holds when it is asked for; see `Split.batches`."""
        if self.settled:
            yield from split.batches(self.now)
            return
        order = split._order()
        while len(order):
            index, order = order[: self.now], order[self.now :]
            yield from split.batches(len(index), index)

    def run(
        self, compute: Callable[[dict[str, Tensor]], Tensor], inputs: Mapping[str, Tensor], count: int
    ) -> Iterator[tuple[slice, Tensor]]:
        """Compute on a batch, in pieces where memory does not hold it whole.

        Args:
            compute: Maps inputs to a tensor; called again on fewer examples where memory ran out.
            inputs: Name to ``[B, ...]``.
            count: Examples in it (B).

        Yields:
            Places in the batch, and the result on them.

        Raises:
            OptionError: If memory does not hold one example.
        """
        start = 0
        while start < count:
            step = min(self._limit, count - start)
            part = dict(inputs) if step == count else {n: v[start : start + step] for n, v in inputs.items()}
            result = fitting(compute, part)
            if result is None:
                self._halve(step)
                continue
            yield slice(start, start + step), result
            start += step

    def observe(self, count: int, amount: int, seconds: float) -> None:
        """Take in how long a batch took, and say what the next ones hold.

        Args:
            count: Its examples; batches of another size than the present one tell nothing.
            amount: Its numbers (pixels or tokens), because texts are of several lengths.
            seconds: The time it took.
        """
        if self.settled or count != self.now:
            return
        if not self._warm:
            self._warm = True
            return
        rate = amount / max(seconds, 1e-9)
        if rate < GAIN * self._best:
            self.now, self.settled = self._kept, True
            return
        self._kept, self._best, self._warm = self.now, rate, False
        self.now = min(2 * self.now, self._limit)
        self.settled = self.now == self._kept

    def _halve(self, tried: int) -> None:
        if tried == 1:
            raise OptionError(
                f"the memory of {self.device} does not hold one example of this model; use device=cpu, or end what "
                "else runs on it"
            )
        self._limit = tried // 2
        self.now, self.settled = min(self.now, self._limit), True


def fitting(compute: Callable[..., Tensor], *arguments: object) -> Tensor | None:
    """Return a result, or None where memory ran out; what the attempt held is free by then."""
    with suppress(torch.OutOfMemoryError):  # once it is left, nothing holds the frames and their tensors
        return compute(*arguments)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None
