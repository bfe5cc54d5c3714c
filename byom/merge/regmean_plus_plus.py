"""RegMean++: regression mean on the merged model's own inputs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from byom.errors import whole
from byom.functional.deltas import total
from byom.merge.base import Group, PlannedMethod, Problem
from byom.merge.base.needs import Needs
from byom.merge.regmean import regression_mean, require_options


class Stage(NamedTuple):
    """Parameters that are merged together."""

    matrices: list[str]  # that have a Gram
    parameters: list[str]  # all of them


@dataclass(frozen=True)
class RegMeanPlusPlus(PlannedMethod):
    """RegMean layer by layer, each layer's inputs coming from the layers that are merged already.

    First everything is averaged. Then, for one layer after the other in the order of a forward pass, every task's
    inputs pass through the merged layers before it and the task's own version of the layer, which gives its Grams;
    its matrices get the regression mean ``W = sum_t W_t G~_t (sum_t G~_t)^-1`` (see `byom.merge.regmean.RegMean`) and
    are merged for the layers after it.
    Everything that is not a linear map keeps the mean; `fallbacks` names it.

    A layer is what shares a name up to its first number, such as ``blocks.3.``; matrices without a number are
    layers of their own. The whole merged model is held in memory while it is planned. One pass over the examples of
    every task per layer.

    Args:
        off_diagonal: Factor on the off-diagonal entries of the Grams (alpha), in [0, 1].
        examples: Training examples of each task that are looked at (N).
        ridge: Pull towards the mean, relative to the mean diagonal of the summed Grams; at least 0.

    Raises:
        OptionError: If a hyperparameter is out of range.

    References:
        RegMean++: Enhancing Effectiveness and Generalization of Regression Mean for Model Merging, section 4.
        https://arxiv.org/abs/2508.03121

    Differences:
        The authors search off_diagonal in 1.0, 0.95, ..., 0.1; `grid` is coarser. They cache activations between
        layers; here every layer is a new pass from the input. fusion-bench keeps CLIP's last normalisation
        pre-trained; here it is averaged.
    """

    off_diagonal: float = 0.95
    examples: int = 256
    ridge: float = 1e-6

    title = "RegMean++"
    grid: ClassVar = {"off_diagonal": (0.1, 0.3, 0.5, 0.7, 0.9, 0.95, 1.0)}

    def __post_init__(self) -> None:
        require_options(self.off_diagonal, self.ridge)
        whole("merge.examples", self.examples, 1)

    @property
    def needs(self) -> Needs:
        """Training inputs, no label."""
        return Needs(inputs=frozenset({"train"}))

    def simpler(self, problem: Problem) -> list[str]:
        """Name the parameters that are averaged because no forward pass uses them as a linear map."""
        used = {name for group in problem.inputs().order() for name in group}
        return [name for name in problem.pretrained.mergeable() if name not in used]

    def plan(self, problem: Problem) -> dict[str, Tensor]:
        """Merge all matrices, one layer after the other."""
        names = problem.pretrained.mergeable()
        merged = {name: _mean(problem.group(name)) for name in names}
        done: dict[str, Tensor] = {}
        stages = layers(problem.inputs().order(), names)
        for layer in tqdm(stages, desc="RegMean++", unit="layer", leave=False, mininterval=1):
            grams = {task: self._grams(problem, task, merged, layer) for task in problem.tasks}
            for name in layer.matrices:
                if all(name in by_name for by_name in grams.values()):
                    by_task = torch.stack([grams[task].pop(name) for task in problem.tasks])
                    done[name] = merged[name] = self._merged(problem.group(name), by_task)
        return done

    def merge(self, group: Group, plan: dict[str, Tensor]) -> Tensor:
        """Return the planned matrix, or the mean."""
        return plan[group.name] if group.name in plan else _mean(group)

    def _merged(self, group: Group, grams: Tensor) -> Tensor:
        return group.pretrained + regression_mean(group.name, group.deltas, grams, self.off_diagonal, self.ridge)

    def _grams(self, problem: Problem, task: str, merged: dict[str, Tensor], layer: Stage) -> dict[str, Tensor]:
        """Grams of a layer of the task's model whose other layers are the merged ones."""
        base = problem.pretrained
        state = merged | {name: problem.finetuned[task][name] for name in layer.parameters}
        state = {name: tensor.to(base.dtype(name)) for name, tensor in state.items()}
        state |= {alias: state[name] for alias, name in base.ties.items() if name in state}
        return problem.inputs().grams(state, task, "train", self.examples, layer.matrices)


def layers(order: Sequence[Sequence[str]], names: Collection[str]) -> list[Stage]:
    """Gather matrices and the parameters around them into layers.

    Args:
        order: Groups of matrices in the order of a forward pass.
        names: All parameters.

    Returns:
        Layers in the order in which a forward pass first reaches them.
    """
    matrices: dict[str, list[str]] = {}
    for group in order:
        for name in group:
            if name in names:
                matrices.setdefault(_prefix(name) or group[0], []).append(name)
    return [
        Stage(members, sorted({*members, *(name for name in names if _prefix(name) == key)}))
        for key, members in matrices.items()
    ]


def _prefix(name: str) -> str:
    """A name up to its first number, or nothing."""
    parts = name.split(".")
    return next((".".join(parts[: i + 1]) for i, part in enumerate(parts) if part.isdigit()), "")


def _mean(group: Group) -> Tensor:
    return group.pretrained + total(group.deltas) / len(group.experts)
