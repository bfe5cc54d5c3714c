"""The place where a stream of values, ranked by magnitude, is cut."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Cut:
    """The place where a stream is cut so that exactly `count` entries survive.

    Attributes:
        threshold: Magnitude of the smallest survivor; infinite if none survives, 0 if all do.
        last: Flat index, in the concatenated stream, of the last survivor that equals `threshold`.
        count: Number of survivors.
    """

    threshold: float
    last: int
    count: int

    def mask(self, values: Tensor, offset: int = 0) -> Tensor:
        """Say which entries survive.

        Args:
            values: A contiguous stretch of the stream, any shape and device.
            offset: Flat index in the stream of the first element of `values`.

        Returns:
            Bool, of the shape of `values`: above the threshold, or equal to it at a flat index up to `last`.
        """
        sizes = values.detach().reshape(-1).to(_precision(values.dtype, self.threshold)).abs()
        ties = min(max(self.last + 1 - offset, 0), sizes.numel())
        survivors = torch.empty(sizes.shape, dtype=torch.bool, device=sizes.device)
        torch.ge(sizes[:ties], self.threshold, out=survivors[:ties])
        torch.gt(sizes[ties:], self.threshold, out=survivors[ties:])
        return survivors.reshape(values.shape)


def _precision(dtype: torch.dtype, threshold: float = 0.0) -> torch.dtype:
    """The dtype magnitudes compare in; a threshold from an fp64 part needs fp64 for fp32 values too."""
    exact = torch.tensor(threshold, dtype=torch.float32).item() == threshold
    return torch.float32 if exact and dtype != torch.float64 else torch.float64
