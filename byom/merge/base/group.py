"""One parameter in every model, and merging it piece by piece."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from byom.functional.tensors import wide, widened

BLOCK = 1 << 18  # elements of one parameter merged at a time: bounds temporaries, and stays near the caches
FAR_BLOCK = 1 << 24  # the same on an accelerator, whose kernels take longer to start than to run on less


@dataclass(frozen=True)
class Group:
    """One parameter in every model.

    Args:
        name: The parameter's name.
        pretrained: ``[*shape]``.
        experts: One ``[*shape]`` tensor per task, in the problem's task order.
        statistics: Statistic name to ``[T, ...]``.
        dtype: What the merged values are going to be rounded to, which `blockwise` may do piece by piece; None keeps
            them as they are computed.
    """

    name: str
    pretrained: Tensor
    experts: tuple[Tensor, ...]
    statistics: Mapping[str, Tensor] = field(default_factory=dict)
    dtype: torch.dtype | None = None

    @property
    def precision(self) -> torch.dtype:
        """The type of the fine-tuned values in arithmetic: fp32, or fp64 if any of them is."""
        return reduce(torch.promote_types, [widened(expert.dtype) for expert in self.experts])

    @property
    def finetuned(self) -> Tensor:
        """The fine-tuned values ``[T, *shape]`` in fp32 (fp64 for fp64 models)."""
        shape, device = self.pretrained.shape, self.pretrained.device
        stacked = torch.empty(len(self.experts), *shape, dtype=self.precision, device=device)
        for row, expert in zip(stacked.unbind(0), self.experts, strict=True):
            row.copy_(expert)  # widened on the way, with no copy in between
        return stacked

    @property
    def deltas(self) -> Tensor:
        """The task vectors ``[T, *shape]``, both sides cast to fp32 (fp64 for fp64 models) before subtracting."""
        stacked = self.finetuned
        return stacked.sub_(wide(self.pretrained))

    def total(self, weights: Sequence[float] = ()) -> Tensor:
        """Sum the fine-tuned values over tasks, one after the other, holding one task's beside the sum.

        Args:
            weights: One per task; empty weighs each 1.

        Returns:
            ``[*shape]``, the bits of `byom.functional.deltas.total` of the stack.
        """
        return self._sum(None, weights)

    def moved(self, scale: float, weights: Sequence[float] = ()) -> Tensor:
        """Return ``theta_0 + scale * sum_t w_t tau_t``, holding the task vector of one task at a time.

        Args:
            scale: Any real number (lambda).
            weights: One per task (w); empty weighs each 1.

        Returns:
            ``[*shape]``, the bits that the stack of task vectors gives.
        """
        base = wide(self.pretrained)
        change = self._sum(base, weights).mul_(scale)
        return change.add_(base) if change.dtype == base.dtype else base + change

    def _sum(self, origin: Tensor | None, weights: Sequence[float]) -> Tensor:
        whole, spare = None, None
        for expert, weight in zip(self.experts, weights or [None] * len(self.experts), strict=True):
            row = torch.empty_like(self.pretrained, dtype=self.precision) if spare is None else spare
            if origin is not None and expert.dtype == row.dtype == origin.dtype:
                torch.sub(expert, origin, out=row)
            else:
                row.copy_(expert)
                row = row if origin is None else row.sub_(origin)
            row = row if weight is None else row.mul_(weight)
            if whole is None:
                whole = row
            else:
                whole, spare = whole.add_(row), row
        assert whole is not None, "a problem has at least one task"
        return whole

    def blocks(self, size: int | None = None) -> Iterator[tuple[int, Group]]:
        """Yield ``(offset, group)`` for flat pieces of at most `size` elements; views, nothing is copied.

        Statistics of the parameter's shape are cut with it, others are left out.

        Args:
            size: Elements of a piece; None takes `BLOCK`, or `FAR_BLOCK` on an accelerator.
        """
        size, shape = size or _block(self.pretrained), self.pretrained.shape
        flat = [tensor.reshape(-1) for tensor in (self.pretrained, *self.experts)]
        fitting = {kind: rows for kind, rows in self.statistics.items() if rows.shape[1:] == shape}
        rows = {kind: rows.reshape(len(rows), flat[0].numel()) for kind, rows in fitting.items()}
        for start in range(0, flat[0].numel(), size):
            piece = [tensor[start : start + size] for tensor in flat]
            cut = {kind: tensor[:, start : start + size] for kind, tensor in rows.items()}
            yield start, Group(self.name, piece[0], tuple(piece[1:]), cut)


def _block(tensor: Tensor) -> int:
    return BLOCK if tensor.device.type == "cpu" else FAR_BLOCK


def blockwise(group: Group, merge: Any, *, final: bool = False) -> Tensor:
    """Merge a parameter piece by piece.

    Args:
        group: The parameter in every model.
        merge: Function of (flat offset, flat piece) that returns the merged piece.
        final: Whether these are the merged values with which no one computes further. Then each piece is rounded to
            ``group.dtype``, if there is one, while it is in the caches.

    Returns:
        ``[*shape]`` merged values.
    """
    dtype = (group.dtype if final else None) or widened(group.pretrained.dtype)
    merged = torch.empty(group.pretrained.numel(), dtype=dtype, device=group.pretrained.device)
    for start, piece in group.blocks():
        merged[start : start + piece.pretrained.numel()] = merge(start, piece)
    return merged.reshape(group.pretrained.shape)


def rowwise(group: Group, merge: Callable[[Group], Tensor]) -> Tensor:
    """Merge a parameter by pieces of whole rows along its last axis, about `BLOCK` elements each.

    Args:
        group: The parameter in every model, not 0-dim.
        merge: Function of a piece ``[rows, width]``, without statistics.

    Returns:
        ``[*shape]`` merged values.
    """
    shape = group.pretrained.shape
    merged = torch.empty(shape, dtype=widened(group.pretrained.dtype), device=group.pretrained.device)
    if not merged.numel():
        return merged
    models = [tensor.reshape(-1, shape[-1]) for tensor in (group.pretrained, *group.experts)]
    rows, step = merged.reshape(-1, shape[-1]), max(1, _block(group.pretrained) // shape[-1])
    for start in range(0, len(rows), step):
        pretrained, *experts = (model[start : start + step] for model in models)
        rows[start : start + step] = merge(Group(group.name, pretrained, tuple(experts)))
    return merged
