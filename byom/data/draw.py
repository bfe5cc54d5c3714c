"""Draws of the examples of each split: permutations keyed by seed and task, without leaks."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch

from byom.data.source.base import Pool
from byom.data.suite import Task
from byom.errors import DataError

Draw = tuple[str, list[int]]  # pool and places in it
SPLITS = ("train", "validation", "test", "shots")
HELD_OUT = 5000


class Draws(Mapping[str, Draw]):
    """The examples of every split: name of the split ("test", "validation", "train", "shots") to pool and places.

    All draws are plain random permutations, so a rare class may be absent from a small split; only shots are
    drawn class by class. The test split is drawn first, with a key that knows no seed, from the official test
    pool or, without one, from the training pool. Then validation (from the official pool if the source has
    one), train and shots are drawn by `seed`, each passing over contents (exact text, or exact pixels) that occur
    in the test split; train and shots pass over those of the validation split too. Shots may overlap train. Only
    examples that are looked at are decoded, and a split is drawn when it is asked for.

    With ``holdout="task_vectors"`` validation and train are parts of one fixed permutation of the training pool,
    and nothing is passed over: published splits are taken as they were published.

    Args:
        task: Sizes, classes and the name that keys the permutations.
        pools: What the source holds.
        seed: Which draw.

    Raises:
        DataError: If a label is unknown, a class has no example, or there are too few examples.
    """

    def __init__(self, task: Task, pools: dict[str, Pool], seed: int) -> None:
        self.task, self.pools, self.seed = task, pools, seed
        self._classes = {name: _classes(task, pool) for name, pool in pools.items()}
        self._fixed = task.holdout == "task_vectors"
        self._seen: dict[str, set[bytes]] = {}

    def __getitem__(self, split: str) -> Draw:
        return getattr(self, split)

    def __iter__(self) -> Iterator[str]:
        return iter(SPLITS)

    def __len__(self) -> int:
        return len(SPLITS)

    @cached_property
    def test(self) -> Draw:
        """Drawn without a seed."""
        pool = "test" if "test" in self.pools else "train"
        if self._fixed and pool == "train":
            raise DataError(f"task {self.task.name} has holdout=task_vectors, but its source has no test split")
        order = _order(len(self.pools[pool]), "test", self.task.name)
        return pool, _first(self.task, "test", order, self.task.test)

    @cached_property
    def validation(self) -> Draw:
        """The examples that hyperparameters are selected on."""
        if self._fixed:
            held = self._shuffled("validation", self._parts[1])
            return "train", _first(self.task, "validation", held, self.task.validation)
        pool = "validation" if "validation" in self.pools else "train"
        fresh = self._fresh(pool, self._ordered(pool, "validation"), ["test"])
        return pool, _first(self.task, "validation", fresh, self.task.validation)

    @cached_property
    def train(self) -> Draw:
        """The examples that experts are trained on."""
        return "train", _first(self.task, "train", self._rest("train"), self.task.train)

    @cached_property
    def shots(self) -> Draw:
        """A few examples of each class; where labels are numbers, the training examples."""
        if self.task.regression:
            return self.train
        counts: Counter[float] = Counter()
        classes, chosen = self._classes["train"], []
        # a class that is complete is passed over before its examples are decoded
        order = (i for i in self._rest("shots", lambda i: counts[classes[i]] < self.task.shots))
        for i in order:
            counts[classes[i]] += 1
            chosen.append(i)
        absent = [name for number, name in enumerate(self.task.classes) if not counts[number]]
        if absent:
            raise DataError(
                f"class {absent[0]!r} of task {self.task.name} has no training example ({len(absent)} such classes); "
                "add examples, lower `test` and `validation`, or take the class out of `classes`"
            )
        return "train", sorted(chosen, key=lambda i: classes[i])

    def _rest(self, split: str, wanted: Callable[[int], bool] = lambda _: True) -> Iterator[int]:
        """Give training examples in the split's order, without those that are held out."""
        if self._fixed:
            return (i for i in self._shuffled(split, self._parts[0]) if wanted(i))
        order = (i for i in self._ordered("train", split) if wanted(i))
        return self._fresh("train", order, ["test", "validation"])

    @cached_property
    def _parts(self) -> tuple[list[int], list[int]]:
        """Return what the task vectors' code trains on and what it holds out."""
        count = len(self.pools["train"])
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
        held = min(count // 10, HELD_OUT)
        return order[: count - held], order[count - held :]

    def _ordered(self, pool: str, split: str) -> list[int]:
        return _order(len(self.pools[pool]), split, self.task.name, self.seed)

    def _shuffled(self, split: str, places: list[int]) -> list[int]:
        return [places[i] for i in _order(len(places), split, self.task.name, self.seed)]

    def _fresh(self, pool: str, order: Iterable[int], earlier: Iterable[str]) -> Iterator[int]:
        """Pass over places and contents that earlier splits have."""
        contents = set[bytes]().union(*map(self._contents, earlier))
        places = {i for split in earlier if self[split][0] == pool for i in self[split][1]}
        inputs = self.pools[pool].inputs
        return (i for i in order if i not in places and content(inputs[i]) not in contents)

    def _contents(self, split: str) -> set[bytes]:
        if split not in self._seen:
            pool, places = self[split]
            self._seen[split] = {content(self.pools[pool].inputs[i]) for i in places}
        return self._seen[split]


def draw(task: Task, pools: dict[str, Pool], seed: int) -> dict[str, Draw]:
    """Choose the examples of every split; see `Draws`."""
    return dict(Draws(task, pools, seed))


def content(value: Any) -> bytes:
    """Return a digest that is equal for equal texts or rows of texts, and for images of equal mode, size and pixels."""
    if isinstance(value, Mapping):
        value = "\x1f".join(f"{column}\x1e{text}" for column, text in value.items())
    if isinstance(value, str):
        return hashlib.sha256(value.encode(errors="surrogatepass")).digest()
    return hashlib.sha256(f"{value.mode} {value.size}\n".encode() + value.tobytes()).digest()


def _classes(task: Task, pool: Pool) -> list[float]:
    number = {label: task.index(label) for label in dict.fromkeys(pool.labels)}
    return [number[label] for label in pool.labels]


def _order(count: int, *key: Any) -> list[int]:
    digest = hashlib.sha256("\n".join(map(str, key)).encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))
    return generator.permutation(count).tolist()


def _first(task: Task, split: str, candidates: Iterable[int], count: int | None) -> list[int]:
    chosen = list(islice(candidates, count))
    if len(chosen) < (count or 1):
        raise DataError(
            f"task {task.name} asks for {count or 'all'} {split} examples, but only {len(chosen)} are left for it; "
            f"lower {split} (or another of train, validation, test) of the task"
        )
    return chosen
