"""Merging mixtures of Gaussians."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from byom.errors import OptionError, positive, whole
from byom.functional.means import precision_mean
from byom.merge.base import Group, Member, PlannedMethod, Problem
from byom.merge.base.checks import require_shape, require_weights, task_weights
from byom.merge.base.needs import Needs
from byom.merge.hessian_weighted import posterior_needs, previewed, require_posterior
from byom.weights import Weights

PIECE = 1 << 14  # elements at a time on the CPU, near the caches; fixed, as the order of sums decides their last bits
TINY = 1e-30  # stands for no precision at all in a logarithm


@dataclass(frozen=True)
class WeightedMembers:
    """All members as one problem, and the weight of each: its task's times its responsibility."""

    problem: Problem
    weights: list[float]


@dataclass(frozen=True)
class MixtureOfGaussians(PlannedMethod):
    """Preview a multi-task optimum from several fine-tuned models per task, each with a Gaussian around it.

    The posterior of a task is ``(1/K) sum_k N(theta_tk, H_tk^-1)``. A few EM steps look for the mode: the
    responsibilities ``r_tk ~ det(H_tk)^1/2 exp(-1/2 ||theta - theta_tk||^2_H_tk)``, with ``sum_k r_tk = 1``, then
    ``theta = theta_0 + (prior + sum a_t r_tk H_tk)^-1 sum a_t r_tk H_tk (theta_tk - theta_0)``, starting from equal
    responsibilities. One member per task is Hessian-weighted merging. Each step streams over all models.

    Args:
        members: Fine-tuned models per task (K), the first being theta_t.
        posterior: Which statistic H_tk is, ``fisher`` or ``ivon``; see `byom.merge.hessian_weighted.HessianWeighted`.
        prior: Precision of theta_0 in the units of H_tk (delta), at least 0.
        weights: Weight of each task (a_t), none negative, in the problem's order of tasks; empty gives 1 / T to each.
        steps: EM steps, at least 0; 0 keeps responsibilities equal.
        temperature: Divides the log-responsibilities, above 0. At 1 they are one-hot for any real model, since they
            sum over all parameters; with the Fisher of a mean loss, 1/N is the posterior after N examples.

    Raises:
        OptionError: If a hyperparameter is out of range.

    References:
        How to Weight Multitask Finetuning? Fast Previews via Bayesian Model-Merging, section 3.
        https://arxiv.org/abs/2412.08147

    Differences:
        No code of the paper is known, and details of its EM are not pinned down. In the responsibilities H_tk
        includes the prior, because one element without information would make the determinant 0.
    """

    members: int = 3
    posterior: Literal["fisher", "ivon"] = "fisher"
    prior: float = 1e-12
    weights: tuple[float, ...] = ()
    steps: int = 5
    temperature: float = 1.0

    title = "Mixture of Gaussians"
    previews = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "weights", tuple(self.weights))
        require_posterior(self.posterior, self.prior)
        require_weights(self.weights)
        whole("merge.members", self.members, 1)
        whole("merge.steps", self.steps, 0)
        positive("merge.temperature", self.temperature, "1, the formula's")

    @property
    def needs(self) -> Needs:
        """Several models per task, and the posterior's statistic of each."""
        return posterior_needs(self.posterior, self.members)

    def simpler(self, problem: Problem) -> list[str]:
        """Name the parameters without a Hessian."""
        return self._members(problem).uncovered(self.posterior)

    def plan(self, problem: Problem) -> WeightedMembers:
        """Find the responsibilities by EM over the whole vector of parameters."""
        everyone = self._members(problem)
        tasks = torch.tensor(task_weights(self.weights, problem), dtype=torch.float64).unsqueeze(1)
        shares = torch.full((len(tasks), self.members), 1 / self.members, dtype=torch.float64)
        for _ in range(self.steps if self.members > 1 else 0):
            evidence = self._evidence(everyone, (tasks * shares).flatten().tolist())
            shares = (evidence.reshape(shares.shape) / self.temperature).softmax(1)
        return WeightedMembers(everyone, (tasks * shares).flatten().tolist())

    def merge(self, group: Group, plan: WeightedMembers) -> Tensor:
        """Return the mode that the last responsibilities give, block by block."""
        return previewed(plan.problem.group(group.name), plan.weights, self.posterior, self.prior)

    def _members(self, problem: Problem) -> Problem:
        """Make every member a task of its own."""
        members = {f"{task}/{k}": one for task in problem.tasks for k, one in enumerate(self._of(problem, task))}
        statistics = {name: _statistic(name, member.statistics, self.posterior) for name, member in members.items()}
        return Problem(problem.pretrained, {n: m.weights for n, m in members.items()}, {self.posterior: statistics})

    def _of(self, problem: Problem, task: str) -> list[Member]:
        if self.members == 1:
            own = {kind: by_task[task] for kind, by_task in problem.statistics.items()}
            return [Member(problem.finetuned[task], own)]
        return list(problem.members[task][: self.members])

    def _evidence(self, everyone: Problem, weights: list[float]) -> Tensor:
        """Log-density of every member's Gaussian at the current theta, ``[T K]``, up to a constant."""
        evidence = torch.zeros(len(weights), dtype=torch.float64)
        uncovered = set(everyone.uncovered(self.posterior))
        for name in everyone.pretrained.mergeable():
            if name not in uncovered:
                group = everyone.group(name)
                require_shape(group, self.posterior)
                for _, piece in group.blocks(PIECE if group.pretrained.device.type == "cpu" else None):
                    evidence += self._density(piece, weights).cpu()
        return evidence

    def _density(self, piece: Group, weights: list[float]) -> Tensor:
        deltas, precisions = piece.deltas.double(), piece.statistics[self.posterior].double()
        away = deltas - precision_mean(deltas, precisions, weights, self.prior)
        believed = (precisions + self.prior).clamp(min=TINY)
        return 0.5 * (believed.log() - believed * away.square()).sum(1)


def _statistic(name: str, statistics: Mapping[str, Weights], posterior: str) -> Weights:
    if posterior not in statistics:
        raise OptionError(
            f"member '{name}' has no statistic '{posterior}'; give Member(..., statistics=...), or byom run fits it"
        )
    return statistics[posterior]
