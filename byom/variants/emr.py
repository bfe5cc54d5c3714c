"""EMR-Merging: elect a unified task vector, mask it for each task, and rescale."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from byom.errors import WeightsMismatch, one_of
from byom.functional.deltas import agreeing, elect_sign
from byom.functional.tensors import wide
from byom.merge.base import Problem, blockwise
from byom.merge.base.running import is_running
from byom.variants.base import WHOLE, Delta, Parts, Served, Shared, Variant, bits
from byom.variants.base.delta import own
from byom.weights import Weights, matched


@dataclass(frozen=True)
class ElectMaskRescale(Variant):
    """Share one vector of the largest agreeing changes; each task masks what disagrees and rescales the rest.

    ``tau_uni = s * max over t with sgn(tau_t) = s of |tau_t|`` where ``s`` is the sign of ``sum_t tau_t``, -1 where
    that is 0; ``M_t = [tau_t * tau_uni > 0]``; ``lambda_t = sum |tau_t| / sum |M_t * tau_uni|``, 1 where M_t is
    empty. Inference uses ``theta_0 + lambda_t * M_t * tau_uni``.

    Two models are shared: theta_0, and tau_uni in fp32 (`Served.base`), so that the sum is formed in fp32 whatever
    the dtype of the models and one task alone gets its own weights up to rounding. The merge method plays no part.

    Args:
        rescale: ``global`` sums over all parameters; ``tensor_mean_sum`` adds the means of the tensors, so that a
            bias weighs as much as a matrix.

    Raises:
        OptionError: If `rescale` is not known.

    References:
        EMR-Merging: Tuning-Free High-Performance Model Merging, section 3.2. https://arxiv.org/abs/2405.17461

    Differences:
        The paper's ratio is ``global``; the authors' code for 8 tasks, and fusion-bench after it, add means of
        tensors, and their code for 30 tasks sums globally. Where the task vectors cancel the paper's sign is 0 and
        their code elects -1; so does this.
    """

    rescale: Literal["global", "tensor_mean_sum"] = "global"

    title = "EMR-Merging"
    stores = "one bit per parameter and one scale; a second shared model holds the unified task vector"
    on = "pretrained"
    shares_base = True

    def __post_init__(self) -> None:
        one_of("byom.rescale", self.rescale, ("global", "tensor_mean_sum"))

    def serve(self, problem: Problem, reference: Weights) -> Served:
        """Mask and rescale every task in one pass over the models; see `Variant.serve`."""
        tied, reference = matched(problem.pretrained, problem.here(reference))
        if tied is not problem.pretrained:
            raise WeightsMismatch(
                f"{problem.pretrained.origin} and {reference.origin} tie different tensors; give the merged model of "
                "these experts as it is"
            )
        packed: dict[str, dict[str, Parts]] = {task: {} for task in problem.tasks}
        sizes = dict.fromkeys(packed, torch.zeros(2, dtype=torch.float64))
        for name in problem.pretrained.mergeable():
            if is_running(name):
                before = Shared(problem.pretrained[name])
                kept = {task: own(expert.read_finite(name), before) for task, expert in problem.finetuned.items()}
                packed = {task: parts | ({name: kept[task]} if kept[task] else {}) for task, parts in packed.items()}
                continue
            for task, (mask, size) in zip(packed, self._masked(problem, name), strict=True):
                sizes[task] = sizes[task] + size.cpu()
                packed[task] |= {name: {"mask": bits.pack(mask)}} if mask.any() else {}
        deltas = {task: self._delta(parts, _ratio(*sizes[task]), reference) for task, parts in packed.items()}
        return Served(problem.back(reference), deltas, problem.back(unified(problem)))

    def _delta(self, masks: dict[str, Parts], scale: Tensor, reference: Weights) -> Delta:
        return Delta(self, masks | {WHOLE: {"scale": scale}}, {name: reference.shape(name) for name in masks})

    def _masked(self, problem: Problem, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield every task's mask of one parameter, and the sizes of its task vector and of what the mask keeps."""
        group = problem.group(name)
        shared = blockwise(group, lambda _, piece: unify(piece.deltas))
        share = 1 / max(1, shared.numel()) if self.rescale == "tensor_mean_sum" else 1.0
        for expert in group.experts:
            delta = wide(expert) - wide(group.pretrained)
            mask = delta * shared.sign() > 0
            yield mask, share * torch.stack([_size(delta), _size(shared * mask)])

    def unpack(self, parts: Parts, shared: Shared) -> Tensor:
        """Add the masked and rescaled unified task vector to theta_0."""
        assert shared.base is not None  # Delta.apply has seen to it
        mask = bits.unpack(parts["mask"], shared.base.numel()).reshape(shared.base.shape)
        return (wide(shared.reference) + parts["scale"] * (shared.base * mask)).to(shared.reference.dtype)


def unify(deltas: Tensor) -> Tensor:
    """Elect a sign per coordinate and take the largest change that has it.

    Args:
        deltas: ``[T, *shape]`` task vectors.

    Returns:
        ``[*shape]`` (tau_uni); 0 where no task has the elected sign.
    """
    sign = elect_sign(deltas, -1.0)
    return sign * agreeing(deltas, sign).abs().amax(0)


def unified(problem: Problem) -> Weights:
    """Return the unified task vector as weights in fp32 (fp64 for fp64 models), made when a tensor is read."""
    base = problem.pretrained

    def read(name: str) -> Tensor:
        if not base.merges(name):
            return base[name]
        return blockwise(problem.group(name), lambda _, piece: unify(piece.deltas))

    return (base - base).derived(read, "the unified task vector")


def _size(values: Tensor) -> Tensor:
    return values.abs().sum(dtype=torch.float64)


def _ratio(whole: Tensor, part: Tensor) -> Tensor:
    return (whole / part if part > 0 else torch.ones(())).to(torch.float32)
