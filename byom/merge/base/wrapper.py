"""Merge methods that change what another one is given, or what it made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from byom.merge.base.method import MergeMethod
from byom.merge.base.needs import Needs
from byom.merge.base.problem import Problem


@dataclass(frozen=True)
class Wrapper(MergeMethod):
    """A method around another one, whose needs and simpler rules are its own; tables name both, as in ``SVC of TSV-M``.

    Args:
        then: The method that merges.
    """

    then: MergeMethod

    def __post_init__(self) -> None:
        object.__setattr__(self, "title", f"{type(self).title} of {self.then.title}")

    @property
    def needs(self) -> Needs:
        """The needs of the wrapped method."""
        return self.then.needs

    @property
    def passes(self) -> int:
        """See `PlannedMethod.passes`: those of the wrapped method."""
        return getattr(self.then, "passes", 0)

    def among(self, tasks: Sequence[str], every: Sequence[str]) -> MergeMethod:
        """Wrap what the wrapped method is for these tasks."""
        return replace(super().among(tasks, every), then=self.then.among(tasks, every))

    def simpler(self, problem: Problem) -> list[str]:
        """Name what the wrapped method names."""
        return self.then.fallbacks(problem)
