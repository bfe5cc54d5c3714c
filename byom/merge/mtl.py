"""Joint multi-task fine-tuning: the reference row that merging tries to reach without training."""

from __future__ import annotations

from dataclasses import dataclass

from byom.merge.base import MergeMethod, Problem
from byom.merge.base.checks import require_weights
from byom.merge.base.needs import Needs
from byom.weights import Weights
from byom.weights.placed import beside


@dataclass(frozen=True)
class JointFineTuning(MergeMethod):
    """Fine-tune one model on the training examples of all tasks together; no merging at all.

    In expectation training minimises ``sum_t alpha_t loss_t(theta)``, starting at theta_0.

    The recipe is the experts' own: the batches of all tasks are mixed, each batch from one task, so that training
    takes as many steps as all experts together.

    Args:
        weights: Factor on each task's loss (alpha), in the order of the tasks; empty weighs them equally. Only
            ratios matter; a task of weight 0 is left out.

    Raises:
        OptionError: If a weight is negative, none is positive, or their number is not that of the tasks.
    """

    weights: tuple[float, ...] = ()

    title = "Joint fine-tuning (MTL)"

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(self.weights))
        require_weights(self.weights)

    @property
    def needs(self) -> Needs:
        """Labelled training examples of all tasks."""
        return Needs(inputs=frozenset({"train"}), labels=True, joint=True)

    def __call__(self, problem: Problem) -> Weights:
        """Train, or read what was trained before; see `MergeMethod.__call__`."""
        self.check(problem)
        tasks = problem.tasks
        weights = self.weights or (1.0,) * len(tasks)
        trained = problem.inputs().joint(dict(zip(tasks, weights, strict=True)))
        # masks are no parameters, of which training may diverge
        trained = trained.carrying(set(trained.mergeable()) - set(problem.pretrained.mergeable()))
        there = beside(trained, problem.pretrained)
        return there.derived(there.read_finite, there.origin)
