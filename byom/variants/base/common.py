"""Tensors that several tasks' packed differences hold alike, which are stored and counted once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from byom.errors import CheckpointError
from byom.variants.base.delta import Delta, Parts


def apart(deltas: Mapping[str, Delta]) -> dict[str, Delta]:
    """Leave out of each packed difference what an earlier one holds as well.

    Args:
        deltas: Task name to packed difference, whole.

    Returns:
        Task name to what is stored for it: every tensor is in one of them, the first that has it.
    """
    held: set[tuple[str, str]] = set()
    stored = {}
    for task, delta in deltas.items():
        own = {name: parts for name, parts in delta.parts.items() if (name, delta.common.get(name, "")) not in held}
        stored[task] = replace(delta, parts=own) if len(own) < len(delta.parts) else delta
        held.update(delta.common.items())
    return stored


def together(deltas: Mapping[str, Delta]) -> dict[str, Delta]:
    """Give each packed difference what an earlier one holds for it, which undoes `apart`.

    Args:
        deltas: Task name to packed difference, in the order in which they were taken apart.

    Returns:
        Task name to the whole packed difference.

    Raises:
        CheckpointError: If a tensor is in none of them.
    """
    held: dict[tuple[str, str], Parts] = {}
    whole = {}
    for task, delta in deltas.items():
        held |= {(n, mark): delta.parts[n] for n, mark in delta.common.items() if n in delta.parts}
        if lost := [(name, mark) for name, mark in delta.common.items() if (name, mark) not in held]:
            raise CheckpointError(
                f"'{lost[0][0]}' of '{task}', which it has in common with other tasks ({lost[0][1]}), is in the file "
                "of none before it; make or fetch the bundle again"
            )
        whole[task] = _completed(delta, held) if delta.common else delta
    return whole


def _completed(delta: Delta, held: Mapping[tuple[str, str], Parts]) -> Delta:
    every = {**delta.parts, **{name: held[name, mark] for name, mark in delta.common.items()}}
    return replace(delta, parts={name: every[name] for name in sorted(every)})
