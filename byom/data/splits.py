"""From a task to encoded examples: drawn by seed, free of leaks, encoded once and read from a mapped file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from byom.data.draft import ROWS
from byom.data.draw import SPLITS, Draws
from byom.data.encode import Encoder
from byom.data.making import Making
from byom.data.split import Split, fingerprint, open_split, save_split
from byom.data.suite import Task
from byom.errors import DataError
from byom.storage.lock import alone
from byom.storage.place import require_writable
from byom.storage.signature import describe, signature

__all__ = ["SPLITS", "Split", "Splits", "fingerprint", "load"]

FORMAT = 1


class Splits(Mapping[str, Split]):
    """A task's splits, encoded for a backbone when they are asked for.

    The test split is the same for every seed; the others are drawn by `seed` from what is left (`byom.data.draw`).
    What was encoded once is mapped from ``<cache>/data/<signature>-<split>.safetensors``; a damaged file is made
    again. Large splits are encoded by several processes, and what a kill leaves of one is gone on with.

    Args:
        task: The task.
        backbone: What encodes raw inputs.
        seed: Which draw.
        cache: The folder of caches.

    Raises:
        DataError: If data is missing, altered or too small for the task.
        CheckpointError: If the cache cannot be written, such as on a full disk.
    """

    def __init__(self, task: Task, backbone: Encoder, seed: int, cache: Path) -> None:
        self.task, self.backbone, self.seed, self.cache = task, backbone, seed, Path(cache)
        self._signature, self._first = _signatures(task, backbone, (seed, 0), self.cache)
        self.read: dict[str, Split] = {}

    def __getitem__(self, name: str) -> Split:
        if name not in SPLITS:
            raise KeyError(name)
        if name not in self.read:
            self.read[name] = self._split(name)
        return self.read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(SPLITS)

    def __len__(self) -> int:
        return len(SPLITS)

    @cached_property
    def draws(self) -> Draws:
        """The examples of every split."""
        return Draws(self.task, self.task.source.pools(self.cache), self.seed)

    def path(self, name: str) -> Path:
        """Return where a split is kept: the test split, which no seed draws, once for all of them."""
        own, first = (self.cache / "data" / f"{each}-{name}.safetensors" for each in (self._signature, self._first))
        return own if name != "test" or own.is_file() else first  # earlier versions kept one for every seed

    def _split(self, name: str) -> Split:
        path = self.path(name)
        split = open_split(path, self.cache)
        if split is None:
            require_writable(path.parent, "encoded examples", "set cache= to a writable folder")
            with alone(path):
                split = open_split(path, self.cache) or self._made(name, path)
        return split

    def _made(self, name: str, path: Path) -> Split:
        pool_name, places = self.draws[name]
        pool = self.draws.pools[pool_name]
        labels = torch.tensor([self.task.index(pool.labels[i]) for i in places], dtype=_kind(self.task))
        origin = f"the {pool_name} examples of task {self.task.name} ({_named(self.task.source)})"
        making = Making(self.task, self.backbone, pool, pool_name, places, origin)
        if len(places) <= ROWS:
            split = Split(making.small(), labels)
            save_split(path, split)
            return split
        making.large(path, labels, f"encode {self.task.name} {name}")
        split = open_split(path, self.cache)
        if split is None:
            raise DataError(f"{path} was damaged while it was written; check the disk, and run the same command again")
        return split


def load(task: Task, backbone: Encoder, seed: int, cache: Path) -> Splits:
    """Return a task's splits: "train", "validation", "test" and "shots"; see `Splits`."""
    return Splits(task, backbone, seed, cache)


def _kind(task: Task) -> torch.dtype:
    return torch.float32 if task.regression else torch.int64


def _named(source: Any) -> str:
    """Return what a source is called in messages."""
    where = getattr(source, "path", "") or getattr(getattr(source, "root", None), "path", "")
    return f"{type(source).__name__} {where}".strip()


def _signatures(task: Task, backbone: Encoder, seeds: Iterable[int], cache: Path) -> list[str]:
    """Return the name of a task's splits for each of some seeds."""
    sizes = [task.train, task.validation, task.test, task.shots]
    data = [describe(task.source), task.source.digest(cache), task.name, task.classes, task.labels]
    later = [task.holdout] if task.holdout != "drawn" else []  # what is added later must not encode old data again
    later += [task.metric] if task.regression else []
    encoding = backbone.encoding_for(task)
    return [signature(FORMAT, data, sizes, seed, encoding, *later, digits=16) for seed in seeds]
