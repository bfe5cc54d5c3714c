"""Singular value calibration (SVC), after any merge method."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from byom.errors import positive
from byom.functional.linalg import VANISHING, truncated_svd
from byom.merge.base import Group, MergeMethod, Problem
from byom.merge.base.matrices import by_matrix, patterns
from byom.merge.base.method import lazily
from byom.merge.base.wrapper import Wrapper
from byom.merge.task_arithmetic import TaskArithmetic
from byom.weights import Weights


@dataclass(frozen=True)
class SingularValueCalibration(Wrapper):
    """Damp the singular directions of a merged change in which it does more than the tasks' own changes do.

    With ``M = U diag(s) Vᵀ`` the change that `then` makes of a matrix, and ``u_r`` the columns of U: task t does
    ``a_t = u_rᵀ tau_t`` along ``u_r``, of which M does the multiple ``p_t = u_rᵀ M a_tᵀ / ||a_t||²``. Tasks that
    share a direction are added up in it, so M does there what several of them do together. The singular value is
    divided by the mean of ``max(p_t, floor)`` over tasks; what is not a matrix stays as `then` merged it. One task
    merged with scale 1 is unchanged.

    Args:
        then: The method that merges.
        floor: The least multiple (alpha), above 0; it bounds how much a direction is enlarged that M has less of than
            the tasks. None takes ``1 / T``, and 1 only damps, which the paper does for TSV-Merge.
        exclude: Shell-style patterns of parameter names that are not matrices here.

    Raises:
        OptionError: If a hyperparameter is out of range.

    References:
        When Shared Knowledge Hurts: Spectral Over-Accumulation in Model Merging. https://arxiv.org/abs/2602.05536

    Differences:
        The authors' code has a floor of 1 unless told, fusion-bench's configuration one of 0.1; the paper takes
        ``1 / T``. fusion-bench calibrates every matrix, the authors those whose names hold neither ``text_projection``
        nor ``embedding``. They compute in fp32. Where singular values are equal, as after Iso-C, the directions are
        those that LAPACK returns, there and here, and so is what they share. The multiples, and with them where the
        floor acts, grow with the scale of `then`; the authors calibrate the plain sum (``merge.then.scale=1``).
    """

    then: MergeMethod = field(default_factory=TaskArithmetic)
    floor: float | None = None
    exclude: tuple[str, ...] = ("*text_projection*", "*embed*")

    title = "SVC"
    grid: ClassVar = {"floor": (0.125, 0.25, 0.5, 1.0)}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.floor is not None:
            positive("merge.floor", self.floor, "0.125")
        object.__setattr__(self, "exclude", patterns("merge.exclude", self.exclude))

    @property
    def passes(self) -> int:
        """See `PlannedMethod.passes`: the tasks' own changes are read beside what is merged of them."""
        return super().passes + 1

    def __call__(self, problem: Problem) -> Weights:
        """Calibrate lazily; see `MergeMethod.__call__`."""
        self.check(problem)
        problem = problem.settled()
        merged = problem.here(self.then(problem))

        def better(group: Group) -> Tensor:
            value = merged.raw(group.name)
            change = (value - group.pretrained)[None]
            floor = 1 / len(group.experts) if self.floor is None else self.floor

            def of_matrix(both: Tensor) -> Tensor:
                return calibrated(both[0], both[1:], floor)

            found = by_matrix(group.name, torch.cat([change, group.deltas.to(change)]), of_matrix, self.exclude)
            return value if found is None else group.pretrained + found

        return lazily(problem, better, together=True)


def calibrated(change: Tensor, deltas: Tensor, floor: float) -> Tensor:
    """Divide the singular values of a merged change by what it does of the tasks' own; see the class.

    Args:
        change: ``[m, n]`` (M).
        deltas: ``[T, m, n]`` task vectors.
        floor: The least multiple.

    Returns:
        ``[m, n]`` in fp64: ``U diag(s / mean_t max(p_t, floor)) Vᵀ``, without directions that carry nothing.
    """
    left, values, right = truncated_svd(change, min(change.shape))
    exists = values > VANISHING * values[:1]
    left, ours = left[:, exists], values[exists, None] * right[exists]
    multiples = torch.zeros_like(values[exists])
    for delta in deltas:
        theirs = left.mT @ delta.double()
        size = theirs.square().sum(1)
        multiples += torch.where(size > 0, (ours * theirs).sum(1) / size, 0).clamp(min=floor)
    return left / (multiples / len(deltas)) @ ours
