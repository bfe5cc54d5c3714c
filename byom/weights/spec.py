"""What is known of a tensor without reading it, and how it is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from byom.errors import OptionError
from byom.functional.tensors import packed

Reader = Callable[[str], Tensor]
CPU = torch.device("cpu")
Place = Callable[[str], torch.device | None]  # of a canonical name


class Spec(NamedTuple):
    """Shape and dtype of one tensor, known without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


Specs = Mapping[str, Spec]


def retyped(specs: Specs, dtype: torch.dtype) -> dict[str, Spec]:
    """Return what is known of tensors whose floating-point values become of another dtype.

    Raises:
        OptionError: If it is not a floating-point dtype.
    """
    if not dtype.is_floating_point or packed(dtype):
        raise OptionError(f"dtype={dtype} is not a floating-point dtype of weights; use for example torch.bfloat16")
    return {n: Spec(s.shape, dtype if s.dtype.is_floating_point else s.dtype) for n, s in specs.items()}


@dataclass(frozen=True)
class Rounding:
    """A reader that can also give a tensor as it is cast to its declared dtype, with less work than to cast it.

    Args:
        read: Gives a tensor by name, as it was computed.
        cast: Gives the same values cast, or None for a tensor that has to be read and cast.
    """

    read: Reader
    cast: Callable[[str], Tensor | None]

    def __call__(self, name: str) -> Tensor:
        """Return a tensor as it was computed."""
        return self.read(name)


def rounded(read: Reader, name: str) -> Tensor | None:
    """Return a tensor in its declared dtype from a reader that gives it so; None from others."""
    return read.cast(name) if isinstance(read, Rounding) else None


class Files(Protocol):
    """The part of opened files that finding ties needs: where they lie, what they hold, and their own notes of ties."""

    @property
    def path(self) -> Path:
        """The file or folder."""
        ...

    @property
    def specs(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Tensor name to its shape and dtype."""
        ...

    @property
    def ties(self) -> Mapping[str, str]:
        """Alias name to canonical name of tied tensors."""
        ...

    @property
    def read(self) -> Reader:
        """What reads a tensor."""
        ...


class Tensors(Protocol):
    """The part of `Weights` that comparing names, shapes and ties needs."""

    origin: str

    @property
    def ties(self) -> dict[str, str]:
        """Alias name to canonical name of tied tensors."""
        ...

    def tied(self, ties: Mapping[str, str], doubled: Iterable[str] = ()) -> Any:
        """Return the same with other ties."""
        ...

    def merges(self, name: str) -> bool:
        """Say whether a tensor is merged."""
        ...

    def mergeable(self) -> list[str]:
        """Return the canonical names of floating-point tensors."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's dtype."""
        ...

    def raw(self, name: str) -> Tensor:
        """Return a tensor as it was computed, before it is rounded to its dtype."""
        ...

    def place(self, name: str) -> torch.device | None:
        """Return the device on which a tensor is when it is read; None if that is not known."""
        ...

    def __getitem__(self, name: str) -> Tensor: ...

    def __contains__(self, name: object) -> bool: ...

    def __iter__(self) -> Iterator[str]: ...


W = TypeVar("W", bound=Tensors)
