"""The encoder's weights: those of one task at a time, or of the reference."""

from __future__ import annotations

from torch import nn

from byom.checkpoint.bundle import Bundle


class Filled:
    """A module that is filled with a task's whole state at every switch.

    Args:
        bundle: Where the weights come from.
        module: Filled with the reference at once.
    """

    def __init__(self, bundle: Bundle, module: nn.Module) -> None:
        self.bundle, self.module = bundle, module
        self.task: str | None = None
        self._fill(None)

    def switch(self, task: str | None) -> None:
        """Give the module a task's weights; None is the reference."""
        if task != self.task:
            self._fill(task)
            self.task = task

    def _fill(self, task: str | None) -> None:
        weights = self.bundle.reference if task is None else self.bundle.weights(task)
        self.module.load_state_dict(dict(weights.state()))
