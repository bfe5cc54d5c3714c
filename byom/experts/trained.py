"""Experts that are fine-tuned here, and kept."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from byom.experts.base import Experts, Host

if TYPE_CHECKING:
    from pathlib import Path

    from byom.data.suite import Task
    from byom.experts.finetune.base import Recipe
    from byom.weights import Weights


@dataclass(frozen=True)
class Trained(Experts):
    """Fine-tune every task's expert from the pre-trained model by ``finetune=``, once."""

    family = "trained"
    validation = "unseen"
    default = True

    def key(self, task: Task, recipe: Recipe, cache: Path | None = None) -> Recipe:
        """Return the recipe; see `Experts.key`."""
        return recipe

    def trains(self, tasks: Iterable[Task]) -> Iterator[Task]:
        """Yield all of them."""
        yield from tasks

    def open(self, host: Host, task: str, member: int) -> Weights:
        """Return the cached expert, fine-tuned first if it is missing; see `Experts.open`."""
        return host.trained(task, member)
