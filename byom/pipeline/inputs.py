"""The inputs of runs that options name without saying what is in them: files of the user's own, branches of hubs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from byom.backbone.base import Backbone
from byom.data.suite import Suite, Task
from byom.errors import ByomError
from byom.experts.base import Experts
from byom.experts.finetune.base import Recipe
from byom.functional.precision import DEFAULT, later
from byom.storage.signature import signature

Contents = dict[str, Any]
"""What was read to a digest of its bytes, or a commit; empty where the options say everything."""
MISSING = "missing"


def contents(suite: Suite, backbone: Backbone, experts: Experts, cache: Path) -> Contents:
    """Return the contents of everything that a run reads from places that may hold something else tomorrow.

    Args:
        suite: The tasks.
        backbone: The encoder.
        experts: Where the tasks' own models come from.
        cache: Where digests of unchanged files are remembered.
    """
    models = {f"expert {task.name}": _read(lambda t=task: experts.contents(t, cache)) for task in suite.tasks}
    data = {f"data {task.name}": _read(lambda t=task: t.source.contents(cache)) for task in suite.tasks}
    return _told({"backbone": _read(lambda: backbone.contents(cache)), **models, **data})


class Names:
    """Names in the cache of what belongs to one task: each is the hash of all that determines it.

    Files are looked at once: what they hold when a name is first asked for goes into all names of their task.

    Args:
        backbone: The encoder.
        experts: Where the tasks' own models come from.
        recipe: How models are fine-tuned here.
        seed: Draws data and orders training.
        cache: Where digests of unchanged files are remembered.
        precision: That of training; experts from elsewhere do not depend on it.
    """

    def __init__(
        self, backbone: Backbone, experts: Experts, recipe: Recipe, seed: int, cache: Path, precision: str = DEFAULT
    ) -> None:
        self._backbone, self._experts, self._recipe = backbone, experts, recipe
        self._seed, self._cache, self._precision = seed, cache, precision
        self._keys: dict[str, Any] = {}
        self._read: dict[str, list[Contents]] = {}

    def expert(self, task: Task, member: int = 0) -> str:
        """Return the name of a task's expert and of everything made with it; members are further fine-tunes."""
        if task.name not in self._keys:
            self._keys[task.name] = self._experts.key(task, self._recipe, self._cache)
        further: list[Any] = [member] if member else []
        further += later(self._precision) if any(self._experts.trains([task])) else []
        return signature(self._backbone, task, self._keys[task.name], self._seed, *further, *self._contents(task))

    def head(self, task: Task) -> str:
        """Return the name of the head that the backbone makes for a task."""
        return signature(self._backbone, task, self._seed, *self._contents(task))

    def _contents(self, task: Task) -> list[Contents]:
        if task.name not in self._read:
            data = _read(lambda: task.source.contents(self._cache))
            found = _told({"backbone": _read(lambda: self._backbone.contents(self._cache)), "data": data})
            self._read[task.name] = [found] if found else []
        return self._read[task.name]


def _read(what: Callable[[], Any]) -> Any:
    try:
        return what()
    except ByomError:  # whoever needs it says what is missing
        return MISSING


def _told(values: Contents) -> Contents:
    return {name: value for name, value in values.items() if value is not None}
