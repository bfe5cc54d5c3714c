"""The making of a large split: by chunks, in several processes where that pays."""

from __future__ import annotations

import sys
import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from byom.data.draft import ROWS, Draft
from byom.data.encode import Encode, Encoder, Examples, Filling, encoding
from byom.data.source.base import Pool
from byom.data.split import INPUTS
from byom.data.suite import Task
from byom.data.workers import Chunk, NoWorkers, filled, usable
from byom.storage.signature import signature

PATIENCE = 15.0
"""Seconds of work from which further processes are started; each needs a few to start."""


@dataclass(frozen=True)
class Making:
    """The making of a split: which examples, and by what they are encoded.

    Args:
        task: The task.
        backbone: What encodes.
        pool: What the examples are taken from.
        name: The pool's name.
        places: Which of it.
        origin: What errors call the pool.
    """

    task: Task
    backbone: Encoder
    pool: Pool
    name: str
    places: list[int]
    origin: str

    def small(self) -> dict[str, Tensor]:
        """Return all inputs, encoded in memory."""
        encode = encoding(self.backbone)
        parts = [rows for _, rows in self._here(0, len(self.places)).encoded(encode, self.task)]
        inputs = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return {name.removeprefix(INPUTS): value for name, value in inputs.items()}

    def large(self, path: Path, labels: Tensor, label: str) -> None:
        """Write the split by chunks, in several processes where that pays; see `Draft`."""
        encode = encoding(self.backbone)

        def rows() -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
            """Learn what a row looks like from the first example."""
            _, first = next(self._here(0, 1).encoded(encode, self.task))
            return {name: (tuple(value.shape[1:]), value.dtype) for name, value in first.items()}

        key = signature(ROWS, self.name, self.places, labels.tolist(), digits=64)
        draft = Draft(path, key, labels, rows)
        filling = Filling(self.backbone, self.task, path, draft.file, draft.columns)
        with tqdm(total=len(labels), desc=label, unit="example", leave=False, mininterval=1) as bar:
            bar.update(sum(len(self._span(chunk)) for chunk in draft.done))
            with closing(self._filled(filling, draft, encode)) as filled_chunks:  # an interrupt ends its processes
                for chunk, sums in filled_chunks:
                    draft.note(chunk, sums)
                    bar.update(len(self._span(chunk)))
        draft.finish()

    def _filled(self, filling: Filling, draft: Draft, encode: Encode) -> Generator[tuple[int, dict[str, str]]]:
        """Fill the first chunk here, which tells how long the others take, and those in processes where it pays."""
        missing = draft.missing()
        start = time.perf_counter()
        for chunk in missing[:1]:
            yield chunk, self._fill(filling, encode, chunk)
        spent, left = time.perf_counter() - start, missing[1:]
        processes = usable()
        if spent * len(left) > PATIENCE and processes > 1 and _part(self.pool.inputs, []) is not None:
            try:
                yield from filled(filling, left, self._sent, min(processes, len(left)))
            except NoWorkers as reason:
                sys.stderr.write(f"byom: encoding in this process alone ({reason})\n")
        for chunk in left:
            if chunk not in draft.done:
                yield chunk, self._fill(filling, encode, chunk)

    def _fill(self, filling: Filling, encode: Encode, chunk: int) -> dict[str, str]:
        span = self._span(chunk)
        return filling.fill(encode, span.start, self._here(span.start, span.stop))

    def _span(self, chunk: int) -> range:
        return range(chunk * ROWS, min((chunk + 1) * ROWS, len(self.places)))

    def _here(self, start: int, stop: int) -> Examples:
        places = self.places[start:stop]
        return Examples(_At(self.pool.inputs, places), places, self.origin)

    def _sent(self, chunk: int) -> Chunk:
        """Return a chunk that another process can be sent."""
        span = self._span(chunk)
        places = self.places[span.start : span.stop]
        part = _part(self.pool.inputs, places)
        assert part is not None
        return chunk, span.start, Examples(part, places, self.origin)


class _At(Sequence[Any]):
    """Some places of a sequence, looked up when they are asked for."""

    def __init__(self, inputs: Sequence[Any], places: list[int]) -> None:
        self._inputs, self._places = inputs, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: Any) -> Any:
        return self._inputs[self._places[number]]


def _part(inputs: Sequence[Any], places: list[int]) -> Sequence[Any] | None:
    """Return some examples so that pickling them sends little; None if these inputs are not made for it."""
    if isinstance(inputs, list | tuple):
        return [inputs[i] for i in places]
    take = getattr(inputs, "take", None)
    return None if take is None else take(places)
