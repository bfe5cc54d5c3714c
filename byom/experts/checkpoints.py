"""Experts that were fine-tuned elsewhere: reading, checking, their own heads."""

from __future__ import annotations

import sys
from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from byom.checkpoint.recognise import same_left_overs
from byom.errors import CheckpointError, OptionError, listed
from byom.experts import labels
from byom.experts.base import Experts, Host, require_related
from byom.experts.labels import Rows
from byom.functional.heads import reordered
from byom.weights import Weights

if TYPE_CHECKING:
    from byom.functional.heads import Readout


class Checkpoints(Experts):
    """Experts read from files; see `byom.checkpoint` for the formats."""

    heads: Literal["backbone", "checkpoint"]
    caution: str

    @property
    def reading(self) -> str:
        """Where heads come from and how they are read, for names in the cache; rows once went by their place alone."""
        return "checkpoint, rows by name" if self.heads == "checkpoint" else self.heads

    @abstractmethod
    def path(self, task: str) -> Path:
        """Return the file or folder of a task's expert."""

    def open(self, host: Host, task: str, member: int) -> Weights:
        """Return a task's expert; see `Experts.open`."""
        if member:
            raise OptionError(
                f"a method asks for several experts per task, and {self.family} has one; use experts=trained for it"
            )
        expert = require_related(host.checkpoint(self.path(task)).weights, host.pretrained, task)
        if apart := sorted(host.pretrained.ties.keys() - expert.ties.keys()):
            raise CheckpointError(
                f"{expert.origin} holds values of its own for {listed(apart)}, which {type(host.backbone).__name__} "
                "ties, so that it cannot compute with them; merge such models as weights (byom.checkpoint.read)"
            )
        return expert

    def head(self, host: Host, task: str) -> Readout | None:
        """Return the head in the checkpoint, if heads are taken from there.

        Raises:
            CheckpointError: If it holds none that the backbone knows, or names other classes than the task has.
        """
        if self.heads == "backbone":
            return None
        checkpoint, rows = host.checkpoint(self.path(task)), self.rows(host, task)
        head = host.backbone.own_head(host.tasks[task], checkpoint.extra)
        if head is None:
            raise CheckpointError(
                f"{self.path(task)} holds no classifier that {type(host.backbone).__name__} knows (it has "
                f"{', '.join(sorted(checkpoint.extra)) or 'nothing'} beside the encoder); set experts.heads=backbone"
            )
        if rows.assumed:
            sys.stderr.write(f"byom: rows of the classifier in {self.path(task)} (task {task}) are taken {rows.how}\n")
        return reordered(head, rows.order)

    def rows(self, host: Host, task: str) -> Rows:
        """Return which row of a task's classifier stands for which class.

        Raises:
            CheckpointError: If the checkpoint names other classes than the task has.
        """
        return labels.rows(host.tasks[task], self.path(task))

    def notes(self, host: Host) -> dict[str, Any]:
        """Return formats, how many frozen left-overs all files share, and how rows of classifiers were told apart.

        Raises:
            CheckpointError: If left-overs of two files differ.
        """
        checkpoints = {task: host.checkpoint(self.path(task)) for task in host.tasks}
        frozen = same_left_overs(checkpoints.items())
        rows = {task: self.rows(host, task).how for task in (host.tasks if self.heads == "checkpoint" else ())}
        return {
            "formats": sorted({checkpoint.format for checkpoint in checkpoints.values()}),
            "frozen_parameters": frozen.numel if frozen else 0,
            **({"rows": rows} if rows else {}),
            **({"caution": self.caution} if self.caution else {}),
        }
