"""Raw inputs to rows: read and encoded a few at a time, in whatever process that is."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from byom.data.draft import Column, put, writing
from byom.data.split import INPUTS
from byom.data.suite import Task
from byom.errors import ByomError, DataError

BATCH = 64
BYTES = 1 << 22
"""Bytes of decoded images that are encoded together, or one image where it is larger; encoders make fp32 of them."""


Encode = Callable[[list[Any], Task], dict[str, Tensor]]


class Encoder(Protocol):
    """The part of a backbone that this package uses."""

    def encoding_for(self, task: Task) -> Any:
        """Describe the encoding in JSON values: tokenizer and length, or resolution and cropping."""
        ...

    def encode(self, inputs: list[Any], task: Task) -> dict[str, Tensor]:
        """Turn N raw inputs into tensors of N rows whose other sizes do not depend on the inputs."""
        ...


@dataclass(frozen=True)
class Examples:
    """Raw examples of a split, with what errors call them.

    Args:
        inputs: They themselves, decoded when they are asked for.
        places: Their places in the pool.
        origin: Pool, task and source, for messages.
    """

    inputs: Sequence[Any]
    places: Sequence[int]
    origin: str

    def __getitem__(self, number: int) -> Any:
        try:
            return self.inputs[number]
        except (ByomError, MemoryError, IndexError):
            raise
        except Exception as error:
            raise self._bad(number, "read", error) from error

    def _bad(self, number: int, what: str, error: Exception) -> DataError:
        return DataError(
            f"example {self.places[number]} of {self.origin} cannot be {what} ({type(error).__name__}: {error}); "
            "restore or remove it"
        )

    def batches(self) -> Iterator[tuple[int, list[Any]]]:
        """Yield the examples by few, each time with the number of the first."""
        held: list[Any] = []
        used = 0
        for number in range(len(self.places)):
            held.append(self[number])
            used += _decoded(held[-1])
            if len(held) == BATCH or used >= BYTES:
                yield number + 1 - len(held), held
                held, used = [], 0
        if held:
            yield len(self.places) - len(held), held

    def encoded(self, encode: Encode, task: Task) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield the rows of a few examples at a time, with the number of the first.

        Raises:
            DataError: If an example cannot be read or encoded; the message has its place in the pool.
        """
        for first, batch in self.batches():
            try:
                rows = encode(batch, task)
            except (ByomError, MemoryError):
                raise
            except Exception as error:
                self._blame(encode, task, first, batch)
                raise error from None
            yield first, {f"{INPUTS}{name}": value for name, value in rows.items()}

    def _blame(self, encode: Encode, task: Task, first: int, batch: list[Any]) -> None:
        """Raise the error of the example that cannot be encoded where others can."""
        failed: list[tuple[int, Exception]] = []
        for number, value in enumerate(batch, first):
            try:
                encode([value], task)
            except Exception as error:
                failed.append((number, error))
        if 0 < len(failed) < len(batch):
            number, error = failed[0]
            raise self._bad(number, "encoded", error) from error


def encoding(encoder: Any) -> Encode:
    """Return an encoder's `encode`, with what it reads from files kept open where it can do that."""
    reader = getattr(encoder, "reader", None)
    return encoder.encode if reader is None else reader().encode


def _decoded(value: Any) -> int:
    """Return about how many bytes a decoded image takes; texts count nothing."""
    width, height = getattr(value, "size", None) or (0, 0)
    return 3 * width * height


@dataclass(frozen=True)
class Filling:
    """A draft that is filled with rows, by any process that has this.

    Args:
        encoder: What encodes.
        task: Whose examples these are.
        path: The file that the draft becomes, for messages.
        file: The draft.
        columns: Where its rows lie.
    """

    encoder: Any
    task: Task
    path: Path
    file: Path
    columns: Mapping[str, Column]

    def fill(self, encode: Encode, start: int, examples: Examples) -> dict[str, str]:
        """Encode examples, and put them on the disk from row `start` on.

        Args:
            encode: The encoder's, as `encoding` gives it.
            start: The first row.
            examples: The examples.

        Returns:
            Name to the CRC-32 of the rows.

        Raises:
            CheckpointError: If they cannot be written.
        """
        sums = dict.fromkeys(self.columns, 0)
        for first, rows in examples.encoded(encode, self.task):
            with writing(self.path), self.file.open("r+b") as file:
                written = put(file, self.columns, start + first, rows)
            for name, content in written.items():
                sums[name] = zlib.crc32(content, sums[name])
        with writing(self.path), self.file.open("r+b") as file:
            os.fsync(file.fileno())
        return {name: f"{value:08x}" for name, value in sums.items()}
