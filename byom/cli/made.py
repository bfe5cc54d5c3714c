"""Plain objects of resolved configurations: a call of each ``_target_``, innermost first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from hydra.utils import get_object, instantiate

import byom
from byom.cli.tree import explained
from byom.errors import OptionError

HYDRAS_OWN = {"_args_", "_convert_", "_partial_", "_recursive_"}
_SHARED: ContextVar[dict[str, Any] | None] = ContextVar("objects that equal configurations share", default=None)


@contextmanager
def shared() -> Iterator[None]:
    """Let equal parts of configurations be one object within a block.

    The cells of an experiment have most of their parts in common, and a suite of twenty tasks is hundreds of calls.
    What is configured is never changed after it was made, so that sharing it saves time and changes nothing.
    """
    token = _SHARED.set(_SHARED.get() or {})
    try:
        yield
    finally:
        _SHARED.reset(token)


def made(node: Any) -> Any:
    """Build what a resolved configuration configures: a call of each ``_target_``, innermost first.

    Hydra's `instantiate` gives the same and copies every container once per level, which is seconds for a large suite.

    Raises:
        OptionError: If a target cannot be imported or called with these values.
    """
    if isinstance(node, list):
        return [made(value) for value in node]
    if not isinstance(node, dict):
        return node
    if "_target_" not in node:
        return {name: made(value) for name, value in node.items()}
    if (held := _SHARED.get()) is None:
        return _called(node)
    key = repr(node)  # not JSON, where 1 and "1" are one name of a mapping
    if key not in held:
        held[key] = _called(node)
    return held[key]


def _called(node: dict[Any, Any]) -> Any:
    with explained():
        if HYDRAS_OWN & set(node):
            return instantiate(_moved(node), _convert_="all")
        target = get_object(byom.moved(node["_target_"]))
    try:
        return target(**{name: made(value) for name, value in node.items() if name != "_target_"})
    except TypeError as error:
        raise OptionError(f"{node['_target_']} cannot be made of {sorted(node)[1:]}: {error}") from error


def _moved(node: Any) -> Any:
    """Return a configuration in which every ``_target_`` is the present name of what it names."""
    if isinstance(node, list):
        return [_moved(value) for value in node]
    if not isinstance(node, dict):
        return node
    return {k: byom.moved(v) if k == "_target_" else _moved(v) for k, v in node.items()}
