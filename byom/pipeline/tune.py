"""Hyperparameter selection on validation data that no expert was trained on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from byom.errors import OptionError, suggest
from byom.merge.base import MergeMethod

Objective = Callable[[MergeMethod], float]


class Tuner(ABC):
    """Chooses hyperparameters of a merge method."""

    @abstractmethod
    def candidates(self, method: MergeMethod) -> Sequence[dict[str, Any]]:
        """Return the settings to try; none means: take the method as it is."""

    def select(self, method: MergeMethod, objective: Objective) -> tuple[MergeMethod, dict[str, Any]]:
        """Return the method with the best setting, and the trail of all settings tried.

        Args:
            method: Hyperparameters to start from.
            objective: Validation score of a method, larger is better; the first of equals wins.

        Returns:
            The chosen method, and ``{"searched", "chosen", "trail"}`` for the record.
        """
        trail = [
            {**setting, "validation": objective(replace(method, **setting))} for setting in self.candidates(method)
        ]
        if not trail:
            return method, {"searched": 0, "chosen": {}, "trail": []}
        best = dict(max(trail, key=lambda row: row["validation"]))
        best.pop("validation")
        return replace(method, **best), {"searched": len(trail), "chosen": best, "trail": trail}


@dataclass(frozen=True)
class AsGiven(Tuner):
    """Take the hyperparameters of the configuration."""

    def candidates(self, method: MergeMethod) -> Sequence[dict[str, Any]]:
        """Return nothing to try."""
        return []


@dataclass(frozen=True)
class Validation(Tuner):
    """Try a grid and keep the setting with the best normalised accuracy of the merged model on validation data.

    The merged model alone is tuned; variants then build on that model, so that they differ in nothing else.

    Args:
        grid: Hyperparameter to values; empty takes the method's published grid (none for methods without one).
    """

    grid: Mapping[str, Sequence[float]] = field(default_factory=dict)

    def candidates(self, method: MergeMethod) -> Sequence[dict[str, Any]]:
        """Return every combination of the grid.

        Raises:
            OptionError: If the grid names a hyperparameter that the method lacks.
        """
        grid = self.grid or method.grid
        fields = getattr(method, "__dataclass_fields__", {})
        for name in grid:
            if name not in fields:
                raise OptionError(f"{type(method).__name__} has no hyperparameter '{name}'; {suggest(name, fields)}")
        return [dict(zip(grid, values, strict=True)) for values in product(*grid.values())] if grid else []
