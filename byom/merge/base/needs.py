"""Needs: the input of a merge method or variant besides the models."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Needs:
    """Input that must be there, so that tables can state it and a run can refuse before it starts.

    Args:
        statistics: Names of per-task statistics (`byom.statistics`).
        inputs: Splits whose inputs are looked at, any of ``train``, ``validation`` and ``test``.
        labels: Whether their labels are used as well.
        members: Fine-tuned models per task, for methods that merge several.
        joint: Whether a jointly fine-tuned model is asked for.
    """

    statistics: frozenset[str] = frozenset()
    inputs: frozenset[str] = frozenset()
    labels: bool = False
    members: int = 1
    joint: bool = False

    def __or__(self, other: Needs) -> Needs:
        """Return what both need together, as a method that wraps another does."""
        return Needs(
            self.statistics | other.statistics,
            self.inputs | other.inputs,
            self.labels or other.labels,
            max(self.members, other.members),
            self.joint or other.joint,
        )

    @property
    def sees_test(self) -> bool:
        """True where test inputs are looked at, which a table must flag."""
        return "test" in self.inputs

    @property
    def words(self) -> str:
        """The entry of a table's column: weights, unlabelled or labelled inputs, test inputs."""
        return ", ".join(self.entries)

    @property
    def entries(self) -> list[str]:
        """The words one by one, the models first."""
        kind = "labelled" if self.labels else "unlabelled"
        phrases = [f"{'test inputs' if split == 'test' else f'{kind} {split} inputs'}" for split in sorted(self.inputs)]
        models = f"{self.members} models a task" if self.members > 1 else "weights"
        return [models, *phrases]

    def to_json(self) -> dict[str, Any]:
        """Return all fields and what follows from them, as a record holds them."""
        sets = {name: sorted(getattr(self, name)) for name in ("statistics", "inputs")}
        return {**asdict(self), **sets, "words": self.words, "sees_test": self.sees_test}
