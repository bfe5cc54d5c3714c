"""The encoded examples that some runs read: how many bytes of them are in the cache, and how many will be."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from byom.data.splits import SPLITS, load
from byom.data.suite import Task
from byom.errors import ByomError
from byom.pipeline.plan import sample

if TYPE_CHECKING:
    from byom.pipeline.settings import Settings


@dataclass(frozen=True)
class Encoded:
    """Bytes of encoded examples.

    Args:
        here: Those in the cache.
        missing: Those that will be there, of splits of a known size.
        unknown: Splits of which nobody knows the size before they are read.
    """

    here: int
    missing: int
    unknown: int

    def text(self) -> str:
        """Return them as a line."""
        more = f", and {self.unknown} splits whose size is known once they are read" if self.unknown else ""
        return (
            f"data       {self.here / 1e9:.1f} GB of encoded examples here, {self.missing / 1e9:.1f} GB to come{more}"
        )


def encoded(cells: Sequence[Settings]) -> Encoded:
    """Return the bytes of the encoded examples that some runs read; nothing is fetched, and nothing is encoded."""
    reads = {
        repr((cell.backbone, task, 0 if split == "test" else cell.seed, split)): (cell, task, split)
        for cell in cells
        for task in cell.suite.tasks
        for split in _read(cell, task)
    }
    sizes = [_size(cell, task, split) for cell, task, split in reads.values()]
    return Encoded(
        sum(size for size, here in sizes if here and size),
        sum(size for size, here in sizes if not here and size),
        sum(size is None for size, _ in sizes),
    )


def _read(cell: Settings, task: Task) -> Iterator[str]:
    """Yield the splits that a run reads of a task, as far as its options say."""
    if task in cell.experts.trains(cell.suite.tasks):
        yield from SPLITS
        return
    method, tune = cell.effective()
    named = {*cell.evaluate.splits, *cell.needs.inputs, *(what.split for what in cell.wanted().values())}
    yield from sorted(named | ({"validation"} if tune.candidates(method) else set()))


def _size(cell: Settings, task: Task, split: str) -> tuple[int | None, bool]:
    """Return the bytes of a split, None if they are unknown, and whether it is in the cache."""
    try:
        if task.source.here():
            path = load(task, cell.backbone, cell.seed, cell.cache).path(split)
            if path.is_file():
                return path.stat().st_size, True
        drawn = "train" if split == "shots" and task.regression else split
        count = task.shots * len(task.classes) if drawn == "shots" else getattr(task, drawn)
        return (None if count is None else count * _row(cell.backbone, task)), False
    except ByomError:  # whoever needs the data, or the tokenizer, says what is missing
        return None, False


def _row(backbone: Any, task: Task) -> int:
    """Return the bytes of an encoded example."""
    if not all(each.local for each in backbone.downloads()) and task.modality == "text":
        raise ByomError("the tokenizer is not here")
    return sum(value.nbytes for value in backbone.encode([sample(task)], task).values())


def said(cells: Iterable[Settings]) -> str:
    """Return the line of a plan."""
    return encoded([cell for cell in cells if cell.place().finished() is None]).text()
