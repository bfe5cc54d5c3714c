"""Experts: a family of checkpoints, which of them belongs to which task, and how they were trained."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from string import Formatter
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from byom.errors import CheckpointError, OptionError, suggest
from byom.storage.repository import Download

if TYPE_CHECKING:
    from pathlib import Path

    from byom.backbone.base import Backbone
    from byom.checkpoint import Checkpoint
    from byom.data.suite import Task
    from byom.experts.finetune.base import Recipe
    from byom.functional.heads import Readout
    from byom.weights import Weights

Validation = Literal["seen", "unseen", "unknown"]
VALIDATIONS = ("seen", "unseen", "unknown")
UNRELATED = 0.5


class Host(Protocol):
    """The party that experts are opened for: tasks, the encoder they were fine-tuned from, and a place to train it."""

    @property
    def backbone(self) -> Backbone:
        """The encoder that is merged."""
        ...

    @property
    def tasks(self) -> Mapping[str, Task]:
        """Tasks by name."""
        ...

    @property
    def pretrained(self) -> Weights:
        """theta_0."""
        ...

    def trained(self, task: str, member: int = 0) -> Weights:
        """Return theta_t as it is fine-tuned here."""
        ...

    def checkpoint(self, path: Path) -> Checkpoint:
        """Return a checkpoint that was fine-tuned elsewhere, in the names of theta_0; read once."""
        ...


class Experts(ABC):
    """A source of the fine-tuned weights of a suite's tasks."""

    family: str
    """Origin of the experts and of their training; models of two families are never in one table."""
    validation: Validation
    """State of the validation examples: seen in training, unseen, or unknown."""

    default: ClassVar[bool] = False
    """True for the option that names and signatures of runs leave out: runs had it before others existed."""

    @abstractmethod
    def key(self, task: Task, recipe: Recipe, cache: Path | None = None) -> Any:
        """Return what determines a task's expert, as JSON or as an option.

        Args:
            task: The task.
            recipe: How models are fine-tuned here.
            cache: See `contents`.
        """

    def contents(self, task: Task, cache: Path | None = None) -> str | None:
        """Return what tells a task's expert from others under the same options; None where the options tell it.

        Args:
            task: The task.
            cache: Where digests of unchanged files are remembered; None reads them every time.

        Raises:
            CheckpointError: If files are missing.
        """
        return None

    def trains(self, tasks: Iterable[Task]) -> Iterator[Task]:
        """Yield those of some tasks whose experts are fine-tuned here."""
        yield from ()

    @abstractmethod
    def open(self, host: Host, task: str, member: int) -> Weights:
        """Return a task's expert in the names and shapes of the pre-trained model.

        Args:
            host: Encoder, tasks, caches.
            task: The task.
            member: 0 for the expert; others are further fine-tunes of the same task.

        Raises:
            CheckpointError: If it cannot be had, or does not fit the backbone.
        """

    def head(self, host: Host, task: str) -> Readout | None:
        """Return the head that came with a task's expert; None lets the backbone make it."""
        return None

    def notes(self, host: Host) -> dict[str, Any]:
        """Return notes on the experts, next to their family, for a record."""
        return {}

    def downloads(self, tasks: Iterable[Task]) -> Iterator[Download]:
        """Say what would have to be fetched; nothing where nothing would."""
        yield from ()

    def held(self, task: Task) -> bool:
        """Say whether `key` can be asked without fetching anything: whether a task's expert is on this machine."""
        return True

    def fetch(self, task: Task) -> None:  # noqa: B027 - most kinds need none
        """Bring a task's expert to this machine; nothing to do where it does not come from another."""


def check_family(family: str, validation: str) -> None:
    """Refuse experts whose origin is not stated.

    Raises:
        OptionError: If the family has no name or the word for validation is unknown.
    """
    if not family or family == "trained":
        raise OptionError("experts.family must name who fine-tuned the checkpoints, for example experts.family=mine")
    if validation not in VALIDATIONS:
        raise OptionError(f"experts.validation={validation!r}; {suggest(validation, VALIDATIONS)}")


def require_place(option: str, text: str, *, everywhere: bool = False) -> str:
    """Refuse a path or name that a task's name cannot be put into.

    Args:
        option: The option's name, for the message.
        text: The path or name, with ``{task}`` in it where it differs by task.
        everywhere: Whether it must differ by task.

    Returns:
        The text.

    Raises:
        OptionError: If it has other braces, or none where some are needed.
    """
    try:
        fields = {name for _, name, _, _ in Formatter().parse(text) if name is not None}
    except (ValueError, TypeError) as error:
        raise OptionError(
            f"{option}={text!r} cannot be read ({error}); braces come in pairs, as in {{task}}"
        ) from error
    if odd := sorted(fields - {"task"}):
        raise OptionError(
            f"{option}={text!r} has {{{odd[0]}}} in it, and only {{task}} is put in; write {{{{ for a brace"
        )
    if everywhere and "task" not in fields:
        raise OptionError(f"{option}={text!r} must have {{task}} in it")
    return text


def named(names: Mapping[str, str], task: str) -> str:
    """Return what a family calls a task."""
    return names.get(task, task)


def require_related(expert: Weights, pretrained: Weights, task: str) -> Weights:
    """Refuse weights that are not a fine-tune of the pre-trained model.

    Returns:
        The expert.

    Raises:
        CheckpointError: If they differ by more than half the pre-trained model's norm, as models that were trained
            apart do; merging them would give numbers that look like a bad method.
    """
    ratio = (expert - pretrained).norm() / max(pretrained.norm(), 1e-30)
    if not ratio <= UNRELATED:
        raise CheckpointError(
            f"{expert.origin} (task {task}) is {ratio:.2f} times the pre-trained model's norm away from it, so it was "
            f"hardly fine-tuned from {pretrained.origin}; give the backbone that it started from"
        )
    return expert
