"""Tasks and suites: a task is labelled data with named classes, a suite is tasks that are merged together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch

from byom.data.source.base import Source
from byom.data.source.package import PackageMissing
from byom.errors import DataError, OptionError, suggest
from byom.functional.metrics import metric
from byom.functional.seeding import keyed
from byom.storage.names import require_file_names

MODALITIES = ("image", "text")
HOLDOUTS = ("drawn", "task_vectors")


@dataclass(frozen=True)
class Task:
    """Labelled data with named classes.

    Args:
        name: A short name; records and caches use it, and draws are keyed by it.
        source: Where the examples come from.
        modality: "image" or "text".
        classes: Readable names, in the order of the labels 0 ... C-1. A mapping from the data's own labels to
            readable names is accepted too; labels that share a name are one class.
        labels: The data's own label to readable name; filled from `classes` and identical to it otherwise.
        templates: Sentences with ``{}`` for the class name, for heads made from words.
        prompt: For texts, how an example is put to a model that answers in words: a sentence with the columns of the
            data in braces, such as ``{sentence1}``.
        metric: What the score is, one of `byom.functional.metrics.METRICS`; labels of a correlation are numbers.
        train: How many examples are drawn to train on; None takes all that are left.
        validation: How many to select hyperparameters on; None takes all that are held out.
        test: How many to report, the same ones for every seed; None takes all.
        shots: How many per class make a head of prototypes.
        holdout: How validation examples are held out of training data: ``drawn`` by seed, without contents that
            occur in the test split; or ``task_vectors``: the last tenth, 5,000 at most, of a permutation that is the
            same for every seed, as the fine-tunes of the task vectors' code held them out.
        licence: Of the data, for people.
        homepage: Where the data is described.
    """

    name: str
    source: Source
    modality: str
    classes: tuple[str, ...]
    labels: Mapping[str, str] = field(default_factory=dict)
    templates: tuple[str, ...] = ()
    prompt: str = ""
    metric: str = "accuracy"
    train: int | None = 600
    validation: int | None = 100
    test: int | None = 300
    shots: int = 5
    holdout: Literal["drawn", "task_vectors"] = "drawn"
    licence: str = field(default="", metadata={"signature": False})
    homepage: str = field(default="", metadata={"signature": False})

    def __post_init__(self) -> None:
        classes, labels = _named(self.classes, self.labels)
        object.__setattr__(self, "classes", classes)
        object.__setattr__(self, "labels", labels)
        object.__setattr__(self, "templates", tuple(self.templates))
        self._check()

    @property
    def regression(self) -> bool:
        """True where labels are numbers."""
        return metric(self.metric).regression

    def index(self, label: str) -> float:
        """Return the class number of one of the data's own labels, or the label as a number.

        Raises:
            DataError: If the task does not know the label.
        """
        if self.regression:
            return self._number(label)
        if label not in self.labels:
            raise DataError(
                f"the data of task {self.name} has the label {label!r}, which is not one of its classes: "
                f"{suggest(label, self.labels)}. Add it to `classes` or filter it out in `source`"
            )
        return self.classes.index(self.labels[label])

    def _number(self, label: str) -> float:
        try:
            return float(label)
        except ValueError:
            raise DataError(
                f"task {self.name} is scored by {self.metric}, but has the label {label!r}, which is not a number; "
                "correct `label` of its source, or its metric"
            ) from None

    def _require_filled(self, template: str) -> None:
        """Refuse a template that a class's name cannot be put into, or that gives every class one sentence."""
        try:
            filled = template.format("a") != template.format("b")
        except (KeyError, IndexError, ValueError):
            filled = False
        if not filled:
            raise OptionError(f"task {self.name} has the template {template!r}; give it one {{}} for the class's name")

    def _check(self) -> None:
        if self.modality not in MODALITIES:
            raise OptionError(f"task {self.name} has modality {self.modality!r}; {suggest(self.modality, MODALITIES)}")
        if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes):
            raise OptionError(f"task {self.name} needs two or more classes with different names, not {self.classes}")
        unnamed = sorted(set(self.labels.values()) - set(self.classes))
        if unnamed:
            raise OptionError(f"task {self.name} maps a label to {unnamed[0]!r}; {suggest(unnamed[0], self.classes)}")
        for template in self.templates:
            self._require_filled(template)
        metric(self.metric)
        if self.holdout not in HOLDOUTS:
            raise OptionError(f"task {self.name} has holdout={self.holdout!r}; {suggest(self.holdout, HOLDOUTS)}")
        for size in ("train", "validation", "test", "shots"):
            if (count := getattr(self, size)) is not None and count < 1:
                raise OptionError(f"task {self.name} has {size}={count}; give at least 1 example")


def _named(
    classes: tuple[str, ...] | Mapping[str, str], labels: Mapping[str, str]
) -> tuple[tuple[str, ...], dict[str, str]]:
    if isinstance(classes, Mapping):
        labels = {str(label): str(name) for label, name in classes.items()} | dict(labels)
        return tuple(dict.fromkeys(labels.values())), labels
    names = tuple(str(name) for name in classes)
    return names, {str(k): str(v) for k, v in labels.items()} or {name: name for name in names}


@dataclass(frozen=True)
class Suite:
    """Tasks that are learned apart and merged together.

    Args:
        name: A short name; records use it.
        tasks: The tasks in order; a mapping from name to task is accepted too.
        only: Cut the suite to the tasks of these names; empty keeps all. The suite is then called
            ``<name>-<names>``.
        size: Cut what is left to so many tasks; None keeps all. The suite is then called ``<name>-<size>-<draw>``.
        draw: Which tasks are kept: a permutation keyed by suite and draw, so that the subsets of one draw are nested.
        skip_missing: Whether `available` drops tasks whose data is not installed.
        missing: Names of the tasks that `available` dropped.
    """

    name: str
    tasks: tuple[Task, ...]
    only: tuple[str, ...] = field(default=(), metadata={"signature": False})  # name and tasks say the cut
    size: int | None = field(default=None, metadata={"signature": False})
    draw: int = field(default=0, metadata={"signature": False})
    skip_missing: bool = field(default=False, metadata={"signature": False})
    missing: tuple[str, ...] = field(default=(), metadata={"signature": False})

    def __post_init__(self) -> None:
        tasks = tuple(self.tasks.values()) if isinstance(self.tasks, Mapping) else tuple(self.tasks)
        names = [task.name for task in tasks]
        if isinstance(self.tasks, Mapping) and names != list(self.tasks):
            raise OptionError(f"suite {self.name} files its tasks under {list(self.tasks)}, but they are named {names}")
        if not tasks or len(set(names)) < len(names):
            raise OptionError(f"suite {self.name} needs one or more tasks with different names, not {names}")
        require_file_names(names, "task name")
        require_file_names([self.name], "suite name")
        object.__setattr__(self, "tasks", tasks)
        object.__setattr__(self, "only", tuple(self.only))
        object.__setattr__(self, "missing", tuple(self.missing))
        if self.only:
            self._name_tasks(self.only)
        if self.size is not None:
            self._cut(self.size)

    def _name_tasks(self, only: tuple[str, ...]) -> None:
        """Keep the tasks that are named; what is left is a suite of its own."""
        known = {task.name: task for task in self.tasks}
        if unknown := [name for name in only if name not in known]:
            raise OptionError(f"suite.only names {unknown[0]!r}; {suggest(unknown[0], known)}")
        cut = {"tasks": tuple(known[name] for name in only), "name": f"{self.name}-{'-'.join(only)}"[:120], "only": ()}
        for name, value in cut.items():
            object.__setattr__(self, name, value)

    def _cut(self, size: int) -> None:
        """Keep some tasks; what is left is a suite of its own, with neither size nor draw."""
        if not 1 <= size <= len(self.tasks):
            raise OptionError(f"suite.size={size}: suite {self.name} has {len(self.tasks)} tasks")
        generator = torch.Generator().manual_seed(keyed(self.draw, "subset", self.name))
        places = sorted(torch.randperm(len(self.tasks), generator=generator)[:size].tolist())
        cut = {"tasks": tuple(self.tasks[i] for i in places), "name": f"{self.name}-{size}-{self.draw}"}
        for name, value in {**cut, "size": None, "draw": 0}.items():
            object.__setattr__(self, name, value)

    def available(self) -> Suite:
        """Return the suite of the tasks whose data is there.

        Raises:
            DataError: If data is missing and not skipped, if none is left, or a package has another version.
        """
        gone = [task for task in self.tasks if self._absent(task)]
        if len(gone) == len(self.tasks):
            gone[0].source.check()
        left = tuple(task for task in self.tasks if task not in gone)
        return replace(self, tasks=left, missing=(*self.missing, *(task.name for task in gone)))

    def _absent(self, task: Task) -> bool:
        try:
            task.source.check()
        except PackageMissing:
            if self.skip_missing:
                return True
            raise
        return False
