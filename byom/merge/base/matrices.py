"""Parameters that the methods for matrices treat as matrices: all with two axes, but for those named, and experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from byom.errors import OptionError
from byom.functional.tensors import of_all_experts, packs_experts


def patterns(name: str, given: Iterable[str]) -> tuple[str, ...]:
    """Check parameter-name patterns.

    Args:
        name: The option's name, for the message.
        given: Shell-style patterns such as ``*text_projection*``.

    Returns:
        The patterns as a tuple, so that what holds them stays hashable.

    Raises:
        OptionError: If it is one string, or holds something that is not a string.
    """
    if isinstance(given, str) or not all(isinstance(pattern, str) for pattern in given):
        raise OptionError(f"{name}={given} is not a list of patterns; write {name}=['*text_projection*']")
    return tuple(given)


def is_matrix(name: str, shape: Sequence[int], exclude: Sequence[str] = ()) -> bool:
    """Say whether the methods for matrices treat a parameter as one.

    Args:
        name: The parameter's name.
        shape: Its shape.
        exclude: Shell-style patterns (`fnmatch.fnmatchcase`) of names that are not.

    Returns:
        Whether it has two axes, both longer than 1, its name matches no pattern, and it is not the biases of several
        experts in one tensor.
    """
    if name.endswith("bias") and of_all_experts(name):
        return False
    return len(shape) == 2 and min(shape) > 1 and not any(fnmatchcase(name, pattern) for pattern in exclude)


def is_stack(name: str, shape: Sequence[int], exclude: Sequence[str] = ()) -> bool:
    """Say whether a parameter packs one matrix for each expert of a mixture; see `packs_experts`.

    Args:
        name: The parameter's name.
        shape: Its shape.
        exclude: As in `is_matrix`.

    Returns:
        Whether every slice along the first axis is a matrix of its own.
    """
    return packs_experts(name, shape) and is_matrix(name, shape[1:], exclude)


def by_matrix(
    name: str, deltas: Tensor, change: Callable[[Tensor], Tensor], exclude: Sequence[str] = ()
) -> Tensor | None:
    """Merge what is a matrix, and what packs several of them one by one.

    Args:
        name: The parameter's name.
        deltas: ``[T, *shape]``.
        change: Merges ``[T, m, n]`` into ``[m, n]``.
        exclude: As in `is_matrix`.

    Returns:
        ``[*shape]``, or None for what is neither.
    """
    if is_matrix(name, deltas.shape[1:], exclude):
        return change(deltas)
    if is_stack(name, deltas.shape[1:], exclude):
        return torch.stack([change(each) for each in deltas.unbind(1)])
    return None
