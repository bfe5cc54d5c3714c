"""Pruning of task vectors before they are merged."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from byom.errors import fraction
from byom.functional.tensors import wide
from byom.merge.base import Problem
from byom.variants.base.variant import Preparation
from byom.weights import Weights
from byom.weights.cuts import Cuts, Scope, cuts, require_scope


@dataclass(frozen=True)
class Pruned(Preparation):
    """Reset all but the top m % of every task vector to the pre-trained values: ``theta_0 + u_t(m)``.

    Kept entries are the expert's own values, so that density 1 changes no bit. Statistics and further members of
    the problem are left as they are.

    Args:
        density: Fraction of entries kept (m), in [0, 1], as `byom.variants.base.sparse.TopMagnitude` counts them.
        scope: Entries that are ranked together: ``global``, ``tensor`` or ``row``, as `TopMagnitude` ranks them.

    Raises:
        OptionError: If a hyperparameter is out of range.
    """

    density: float = 0.1
    scope: Scope = "global"

    def __post_init__(self) -> None:
        fraction("byom.density", self.density)
        require_scope("byom.scope", self.scope)

    def __call__(self, problem: Problem) -> Problem:
        """Prune lazily; the cut of a task is found when one of its tensors is first read."""
        base = problem.pretrained
        return replace(problem, finetuned={task: self._pruned(w, base) for task, w in problem.finetuned.items()})

    def _pruned(self, expert: Weights, base: Weights) -> Weights:
        @cache  # fingerprints of both models are taken once, not with every tensor
        def plan() -> Cuts:
            return cuts(expert, base, self.density, self.scope)

        def read(name: str) -> Tensor:
            if not expert.merges(name):
                return expert[name]
            cut, offset = plan()[name]
            values, origin = expert.read_finite(name), base.read_finite(name)
            return torch.where(cut.mask(wide(values) - wide(origin), offset), values, origin)

        return expert.derived(read, f"{expert.origin}, pruned")
