"""DARE: drop and rescale, before any merge method."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from byom.errors import fraction, one_of
from byom.functional.seeding import keyed
from byom.functional.selection import top_mask
from byom.functional.tensors import wide
from byom.merge.base import Group, MergeMethod, Problem, TensorwiseMethod, blockwise
from byom.merge.base.checks import require_experts
from byom.merge.base.method import lazily
from byom.merge.base.wrapper import Wrapper
from byom.merge.task_arithmetic import TaskArithmetic
from byom.weights import Weights

Select = Literal["random", "magnitude"]


@dataclass(frozen=True)
class Dare(Wrapper):
    """Drop a share of each task's changes, enlarge the rest to make up for them, and merge by another method.

    ``theta'_t = theta_0 + m_t tau_t / (1 - drop)`` in fp32, with ``m_t`` independent coin flips of chance ``1 - drop``:
    the expectation of every entry is the change itself. The experts ``theta'_t`` are then merged by `then`, which also
    says what is needed; statistics stay those of the experts as they were fine-tuned.

    Flips depend on the seed, the task's name and the parameter's name alone, and are drawn on the CPU for a whole
    parameter; so neither the order of tasks and parameters, nor blocks, nor the device changes them.

    Args:
        then: The method that merges what is left.
        drop: Fraction dropped (p), in [0, 1); 0 is `then` itself.
        rescale: Whether what is left is divided by ``1 - drop``.
        select: ``random``, or ``magnitude`` to drop the smallest entries of each parameter: all but
            ``floor((1 - drop) * n)``, ties keeping the lowest position. Rescaling applies to both.
        seed: Draws the flips.

    Raises:
        OptionError: If a hyperparameter is out of range, or `then` does not merge the experts alone.

    References:
        Language Models are Super Mario: Absorbing Abilities from Homologous Models as a Free Lunch.
        https://arxiv.org/abs/2311.03099

    Differences:
        `grid` is the authors', over `drop`; they fix the other method's values first, so tune `then` without DARE.
        PEFT and the authors draw in the order of calls. mergekit rescales to the L1 norm before dropping, which
        depends on the draw. The authors' magnitude variant drops ``floor(drop * n)`` and whatever ties with the last.
    """

    then: MergeMethod = field(default_factory=TaskArithmetic)
    drop: float = 0.5
    rescale: bool = True
    select: Select = "random"
    seed: int = 0

    title = "DARE"
    grid: ClassVar = {"drop": (0.1, 0.3, 0.5, 0.7, 0.9)}

    def __post_init__(self) -> None:
        super().__post_init__()
        fraction("merge.drop", self.drop, below=1)
        one_of("merge.select", self.select, get_args(Select))
        require_experts(self.then)

    def __call__(self, problem: Problem) -> Weights:
        """Merge the thinned experts lazily; see `MergeMethod.__call__`."""
        self.check(problem)
        problem = problem.settled()
        then = self.then
        plain = type(then).__call__ is TensorwiseMethod.__call__ and self.select == "random" and self.drop > 0
        if plain and isinstance(then, TensorwiseMethod) and then.elementwise:
            return self._by_blocks(problem, then)
        thinned = {task: self._thinned(task, expert, problem.pretrained) for task, expert in problem.finetuned.items()}
        return then(replace(problem, finetuned=thinned))

    def _by_blocks(self, problem: Problem, then: TensorwiseMethod) -> Weights:
        """Thin and merge piece by piece, with the flips that whole parameters get: no expert is there as a whole."""

        def merged(group: Group) -> Tensor:
            draws = [torch.Generator().manual_seed(keyed(self.seed, task, group.name)) for task in problem.tasks]

            def piecewise(_: int, piece: Group) -> Tensor:
                ours = wide(piece.pretrained)
                changes = [wide(expert) - ours for expert in piece.experts]
                experts = [ours + self._thin(delta, draw) for delta, draw in zip(changes, draws, strict=True)]
                return then.merge(replace(piece, experts=tuple(experts)))

            return blockwise(group, piecewise, final=True)

        return lazily(problem, merged, exposing=then.exposing)

    def _thinned(self, task: str, expert: Weights, base: Weights) -> Weights:
        def read(name: str) -> Tensor:
            if not expert.merges(name):
                return expert[name]
            theirs, ours = wide(expert.read_finite(name)), wide(base.read_finite(name))
            return ours + self._thin(theirs - ours, keyed(self.seed, task, name)) if self.drop else theirs

        return (expert - base).derived(read, expert.origin)

    def _thin(self, delta: Tensor, seed: int | torch.Generator) -> Tensor:
        mask = flips(delta, self.drop, seed) if self.select == "random" else heaviest(delta, self.drop)
        return delta * mask / (1 - self.drop if self.rescale else 1)


def flips(delta: Tensor, drop: float, seed: int | torch.Generator) -> Tensor:
    """Draw which entries survive.

    Args:
        delta: ``[*shape]``, for its shape and device.
        drop: Chance that an entry is dropped.
        seed: Seed of a generator, or one that goes on where it is: pieces of a tensor get what the whole one gets.

    Returns:
        Bool ``[*shape]``, the same on every device.
    """
    generator = torch.Generator().manual_seed(seed) if isinstance(seed, int) else seed
    return (torch.rand(delta.shape, generator=generator) >= drop).to(delta.device)


def heaviest(delta: Tensor, drop: float) -> Tensor:
    """Say which entries are not among the smallest; see `Dare`."""
    return top_mask(delta, 1 - drop)
