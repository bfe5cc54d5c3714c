"""Which examples a split is made of: permutations keyed by seed and task, without leaks."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np

from byom.errors import DataError
from byom.source.base import Pool
from byom.suite import Task

Draw = tuple[str, list[int]]


def draw(task: Task, pools: dict[str, Pool], seed: int) -> dict[str, Draw]:
    """Choose the examples of every split.

    All draws are plain random permutations, so a rare class may be absent from a small split; only shots are
    drawn class by class. The test split is drawn first, with a key that knows no seed, from the official test
    pool or, where there is none, from the training pool. Then validation (from the official pool where there is
    one), train and shots are drawn by `seed`, each passing over contents (exact text, or exact pixels) that occur
    in the test split; train and shots pass over those of the validation split too. Shots may overlap train. Only
    examples that are looked at are decoded.

    Args:
        task: Sizes, classes and the name that keys the permutations.
        pools: What the source holds.
        seed: Which draw.

    Returns:
        Split ("test", "validation", "train", "shots") to the pool and the places in it.

    Raises:
        DataError: If a label is unknown, a class has no example, or there are too few examples.
    """
    classes = {name: _classes(task, pool) for name, pool in pools.items()}
    test_pool = "test" if "test" in pools else "train"
    test = _first(task, "test", _order(len(pools[test_pool]), "test", task.name), task.test)
    kept = set(test) if test_pool == "train" else set()
    seen = _contents(pools[test_pool], test)

    valid_pool = "validation" if "validation" in pools else "train"
    order = _order(len(pools[valid_pool]), "validation", task.name, seed)
    fresh = _fresh(pools[valid_pool], order, seen, kept if valid_pool == "train" else set())
    validation = _first(task, "validation", fresh, task.validation)
    kept |= set(validation) if valid_pool == "train" else set()
    seen |= _contents(pools[valid_pool], validation)

    rest = pools["train"]
    train = _first(task, "train", _fresh(rest, _order(len(rest), "train", task.name, seed), seen, kept), task.train)
    shots = _shots(task, rest, classes["train"], _order(len(rest), "shots", task.name, seed), seen, kept)
    return {
        "train": ("train", train),
        "validation": (valid_pool, validation),
        "test": (test_pool, test),
        "shots": ("train", shots),
    }


def content(value: Any) -> bytes:
    """Return a digest that is equal for equal texts, and for images of equal mode, size and pixels."""
    if isinstance(value, str):
        return hashlib.sha256(value.encode()).digest()
    return hashlib.sha256(f"{value.mode} {value.size}\n".encode() + value.tobytes()).digest()


def _classes(task: Task, pool: Pool) -> list[int]:
    number = {label: task.index(label) for label in dict.fromkeys(pool.labels)}
    return [number[label] for label in pool.labels]


def _order(count: int, *key: Any) -> list[int]:
    digest = hashlib.sha256("\n".join(map(str, key)).encode()).digest()
    generator = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "big")))
    return generator.permutation(count).tolist()


def _contents(pool: Pool, index: Iterable[int]) -> set[bytes]:
    return {content(pool.inputs[i]) for i in index}


def _fresh(pool: Pool, order: Iterable[int], seen: set[bytes], kept: set[int]) -> Iterator[int]:
    return (i for i in order if i not in kept and content(pool.inputs[i]) not in seen)


def _first(task: Task, split: str, candidates: Iterable[int], count: int) -> list[int]:
    chosen = list(islice(candidates, count))
    if len(chosen) < count:
        raise DataError(
            f"task {task.name} asks for {count} {split} examples, but only {len(chosen)} are left for it; "
            f"lower {split} (or another of train, validation, test) of the task"
        )
    return chosen


def _shots(task: Task, pool: Pool, classes: list[int], order: list[int], seen: set[bytes], kept: set[int]) -> list[int]:
    found: Counter[int] = Counter()
    chosen = []
    for i in _fresh(pool, (i for i in order if found[classes[i]] < task.shots), seen, kept):
        found[classes[i]] += 1
        chosen.append(i)
    absent = [name for number, name in enumerate(task.classes) if not found[number]]
    if absent:
        raise DataError(
            f"class {absent[0]!r} of task {task.name} has no training example ({len(absent)} such classes); "
            "add examples, lower `test` and `validation`, or take the class out of `classes`"
        )
    return sorted(chosen, key=lambda i: classes[i])
