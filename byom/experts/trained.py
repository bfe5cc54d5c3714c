"""Experts that are fine-tuned here, and kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from byom.experts.base import Experts, Host

if TYPE_CHECKING:
    from byom.data.suite import Task
    from byom.weights import Weights


@dataclass(frozen=True)
class Trained(Experts):
    """Fine-tune every task's expert from the pre-trained model by ``finetune=``, once."""

    family = "trained"
    validation = "unseen"
    trained = True

    def identify(self, task: Task) -> Any:
        """Return nothing: the recipe and the task say it all."""
        return None

    def open(self, host: Host, task: str, member: int) -> Weights:
        """Return the cached expert, fine-tuned first if there is none; see `Experts.open`."""
        return host.trained(task, member)
