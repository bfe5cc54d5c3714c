"""A stream of tensors that need not fit in memory, read in blocks of magnitudes or at single positions."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from byom.errors import CheckpointError
from byom.functional.compiled import kernels, operand, plain

Array = NDArray[Any]

BLOCK = 1 << 17  # elements per block, so that magnitudes and masks stay in the second-level cache


@dataclass(frozen=True)
class Part:
    """One tensor of the stream, read in flat pieces.

    Attributes:
        numel: Number of elements.
        read: Signed floating-point values, flat, at a slice or at ascending int64 positions. It may be
            called many times and must give the same bits each time.
        peek: The same for a few values out of all, where there is a cheaper way to them; None takes `read`.
        pair: The two flat tensors whose difference `read` takes, for kernels; None where it is no such difference.
        device: Where `read` gives values; None where that is not known.
    """

    numel: int
    read: Callable[[slice | Tensor], Tensor]
    peek: Callable[[slice | Tensor], Tensor] | None = None
    pair: Callable[[], tuple[Tensor, Tensor]] | None = None
    device: torch.device | None = None

    @staticmethod
    def of(tensor: Tensor) -> Part:
        """Wrap a tensor of any shape, 0-d and empty included; a non-contiguous one is copied."""
        return Part(tensor.numel(), tensor.detach().reshape(-1).__getitem__, device=tensor.device)


@dataclass(frozen=True)
class Stream:
    """Random access to the magnitudes of the concatenated parts."""

    parts: list[Part]
    ends: list[int]
    numel: int
    buffer: Tensor  # [BLOCK], reused by every read

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return -(-self.numel // len(self.buffer))

    @staticmethod
    def of(parts: Sequence[Part]) -> Stream:
        """Concatenate parts.

        Raises:
            CheckpointError: If one holds values that are not floating-point.
        """
        filled = [part for part in parts if part.numel]
        dtypes = {(part.peek or part.read)(slice(0, 1)).dtype for part in filled}
        if odd := [dtype for dtype in dtypes if not dtype.is_floating_point]:
            raise CheckpointError(f"the stream holds {odd[0]} values; leave tensors that are not float out")
        precision = torch.float64 if torch.float64 in dtypes else torch.float32
        ends = np.cumsum([part.numel for part in filled], dtype=np.int64).tolist()
        return Stream(filled, ends, sum(part.numel for part in filled), torch.empty(BLOCK, dtype=precision))

    def block(self, index: int) -> Array:
        """Magnitudes of one block, valid until the next read."""
        start = done = index * len(self.buffer)
        stop = min(start + len(self.buffer), self.numel)
        while done < stop:
            owner = bisect_right(self.ends, done)
            part, end = self.parts[owner], self.ends[owner]
            size, first = min(stop, end) - done, done - (end - part.numel)
            _magnitudes(part, slice(first, first + size), self.buffer[done - start : done - start + size])
            done += size
        return self.buffer.numpy()[: stop - start]

    def at(self, positions: Array) -> Array:
        """Magnitudes at ascending flat positions."""
        magnitudes = np.empty(len(positions), dtype=self.buffer.numpy().dtype)
        borders = [0, *np.searchsorted(positions, self.ends).tolist()]
        for part, end, low, high in zip(self.parts, self.ends, borders, borders[1:], strict=False):
            if low < high:
                local = torch.from_numpy(positions[low:high] - (end - part.numel))
                magnitudes[low:high] = (part.peek or part.read)(local).to(self.buffer.dtype).abs().cpu().numpy()
        return magnitudes

    def refuse(self) -> None:
        """Raise the error that counts the values which are not finite, and says where the first one is."""
        finite = (np.isfinite(self.block(index)) for index in range(self.blocks))
        bad = [(len(good) - int(good.sum()), int(good.argmin())) for good in finite]
        index = next(index for index, (size, _) in enumerate(bad) if size)
        raise CheckpointError(
            f"{sum(size for size, _ in bad)} of {self.numel} values are NaN or infinite, "
            f"the first at flat position {index * len(self.buffer) + bad[index][1]}; "
            "such a checkpoint cannot be merged: take an earlier one, or train again in a wider dtype"
        )


def _magnitudes(part: Part, at: slice, into: Tensor) -> None:
    found = kernels(0) if part.pair and into.dtype == torch.float32 else None
    if found and part.pair and plain(*(pair := part.pair())):
        left, right = (each[at] for each in pair)
        spare = np.empty(0 if right.dtype == torch.float32 else len(into), dtype=np.float32)
        values = into.numpy()
        found.magnitudes(operand(found, left, values), operand(found, right, spare), values)
    else:
        into.copy_(part.read(at)).abs_()
