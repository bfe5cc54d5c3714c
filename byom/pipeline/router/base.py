"""Routers guess the task of each example, so that packed differences serve inputs of unknown origin."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from byom.errors import OptionError
from byom.merge.base import Problem
from byom.merge.base.needs import Needs
from byom.variants.base.delta import Served


class Routing(ABC):
    """A fitted router."""

    router: LearnedRouter
    """Its options, which say whether examples are routed one by one and whose head answers."""

    @abstractmethod
    def shares(self, task: str, split: str) -> Tensor:
        """Return how much each task's model should serve each example: ``[N, T]``, rows sum to 1.

        Args:
            task: Where the examples come from; used to find them, never to route them.
            split: ``validation`` or ``test``.
        """

    @property
    @abstractmethod
    def stored(self) -> tuple[Tensor, ...]:
        """Tensors that have to be stored to route."""

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Tensors by name of which `LearnedRouter.restored` makes what routes, without data or models.

        Raises:
            OptionError: If this kind cannot be stored.
        """
        raise OptionError(f"{type(self.router).__name__} cannot be stored; use router=knn, router=mlp or router=oracle")


class Router(ABC):
    """A frozen dataclass that says how tasks are told apart."""

    title: ClassVar[str]
    """Name in tables, appended to a row's; empty where the task is known."""
    needs: ClassVar[Needs]
    routes: ClassVar[bool] = True
    """True where tasks have to be told apart, False where they are known."""

    @abstractmethod
    def fit(self, problem: Problem, served: Served) -> Routing | None:
        """Learn to tell tasks apart; None where they are known.

        Args:
            problem: The models, and a probe of the tasks' inputs.
            served: The shared models and packed differences that serve the tasks.
        """


@dataclass(frozen=True)
class LearnedRouter(Router):
    """Fields that every router with something to learn shares.

    Args:
        mix: ``sample`` sends each example to the model of its likeliest task. ``batch`` averages the shares over a
            batch and mixes the task models by them, as published evaluations do; the examples of a batch come
            from one data set, so their mean gives the task away, and tables flag it.
        batch_size: Examples per batch, for ``mix=batch``.
        heads: ``routed`` uses the head of the task an example was sent to, so that a wrong guess is a wrong answer;
            ``given`` uses the data set's own head, as published evaluations do.

    Raises:
        OptionError: If a value is out of range.
    """

    mix: Literal["sample", "batch"] = "sample"
    batch_size: int = 256
    heads: Literal["routed", "given"] = "routed"

    needs = Needs(inputs=frozenset({"train"}))
    features: ClassVar[Literal["pretrained", "reference"]] = "reference"
    """The model whose features it reads: theta_0, or the one that differences are taken to."""

    def restored(self, tensors: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor]:
        """Make what maps features ``[N, D]`` to shares ``[N, T]`` of what `Routing.tensors` returned.

        Raises:
            OptionError: If this kind cannot be stored.
        """
        raise OptionError(f"{type(self).__name__} cannot be stored; use router=knn, router=mlp or router=oracle")

    def __post_init__(self) -> None:
        if self.mix not in ("sample", "batch"):
            raise OptionError(f"router.mix={self.mix} is not known; use sample or batch")
        if self.heads not in ("routed", "given"):
            raise OptionError(f"router.heads={self.heads} is not known; use routed or given")
        if self.batch_size < 1:
            raise OptionError(f"router.batch_size={self.batch_size} must be 1 or more")


def labelled_by_task(features: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack the features of all tasks and number them by task.

    Args:
        features: ``[N_t, D]`` for each task.

    Returns:
        ``[N, D]`` and int64 ``[N]``.
    """
    labels = [torch.full((len(rows),), place) for place, rows in enumerate(features)]
    return torch.cat(features), torch.cat(labels)
