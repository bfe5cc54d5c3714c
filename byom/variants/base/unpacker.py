"""How a stored difference is put back: the half of a variant that it needs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

from byom.errors import CheckpointError
from byom.functional.heads import Readout

Parts = dict[str, Tensor]  # what is stored for one parameter: part name -> dense tensor


class Entries(NamedTuple):
    """The entries of one parameter that a task assigns; all others are the reference's."""

    positions: Tensor  # int64 [k], flat, strictly ascending
    values: Tensor  # [k], in the dtype in which they are stored


class Shared(NamedTuple):
    """One parameter of the models that all tasks share."""

    reference: Tensor  # [*shape], what differences are taken to
    base: Tensor | None = None  # [*shape], of the second shared model where a variant stores two


@dataclass(frozen=True)
class Unpacker(ABC):
    """The half of a variant that a stored difference needs: how it is put back, and onto which shared models."""

    on: ClassVar[Literal["merged", "pretrained"]]
    """The model that differences are taken to: the merged one, or the pre-trained one, with no part for merging."""
    shares_reference: ClassVar[bool] = True
    """True if that model has to be stored alongside the packed differences."""
    shares_base: ClassVar[bool] = False
    """True if a task's weights are put together from two shared models; the second is theta_0 unless it says so."""
    title: ClassVar[str]
    """Name in tables."""
    joined: ClassVar[bool] = False
    """True if a difference is stored in one piece (`byom.variants.base.joined`), not as a tensor for each part."""

    @abstractmethod
    def unpack(self, parts: Parts, shared: Shared) -> Tensor:
        """Put a packed difference back.

        Args:
            parts: What is stored for one parameter, and what is stored under `WHOLE`.
            shared: The parameter in the shared models; not modified.

        Returns:
            ``[*shape]`` values for the task, in the reference's dtype.
        """

    def expand(self, parts: Parts, read: Callable[[], Tensor]) -> Parts:
        """Return the parts that were packed, of stored ones that take fewer bytes; see `PackingVariant.shrink`.

        Args:
            parts: What is stored for one parameter.
            read: Returns the parameter in the reference.

        Returns:
            What `unpack` and `entries` are given; the parts themselves unless the variant shrinks them.
        """
        return parts

    def entries(self, parts: Parts, numel: int) -> Entries | None:
        """Return which entries `unpack` assigns, so that a live model can be changed at these alone.

        Args:
            parts: What `unpack` is given.
            numel: Number of entries of the parameter.

        Returns:
            Positions and values; None where any entry may change, which is also what variants have that say nothing.
        """
        return None

    def readout(self, parts: Parts, head: Readout) -> Readout:
        """Return a task's head with what is stored under `READOUT`; variants that store nothing there have none."""
        raise CheckpointError(f"{self.title} stores nothing for heads, but {sorted(parts)} came with its difference")
