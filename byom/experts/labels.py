"""Rows of a classifier that came with a checkpoint: the class of the task that each of them stands for."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from byom.checkpoint.files import BESIDE
from byom.errors import CheckpointError, listed
from byom.storage.foreign import PICKLES

if TYPE_CHECKING:
    from byom.data.suite import Task

CONFIG = "config.json"
GENERIC = re.compile(r"(?:label|class)?[\s_-]*(\d+)", re.IGNORECASE)
"""Names that transformers gives classes which nobody named, and mere numbers."""
WHOLE_MODELS = ("model", "pytorch_model", "adapter_model")
SHOWN = 12


class Rows(NamedTuple):
    """The rows of a classifier, in the order of the task's classes.

    Args:
        order: For each class of the task, the classifier's row; None leaves them as they are.
        how: How they were told apart, for the record.
        assumed: Whether nothing names them, so that their order is taken on trust.
    """

    order: tuple[int, ...] | None
    how: str
    assumed: bool = False


def beside(path: Path) -> Path:
    """Return where the configuration of a checkpoint lies if it has one: in its folder, or in that of its file."""
    return (path if path.is_dir() else path.parent) / CONFIG


def rows(task: Task, path: Path) -> Rows:
    """Say which row of a checkpoint's classifier stands for which class of a task, by the names in its configuration.

    Args:
        task: The task.
        path: The checkpoint's file or folder.

    Returns:
        The rows. Names are compared without case, spaces, underscores and hyphens; a class may be called as the task
        calls it or as the data does.

    Raises:
        CheckpointError: If the names are not those of the task's classes, or contradict one another.
    """
    if task.regression:
        return Rows(None, "one number, no classes")
    file = beside(path)
    names = _names(file) if file.is_file() else None
    if names is None:
        return Rows(None, f"in the task's order: no {CONFIG} names them", True)
    if (order := _matched(task, names)) is not None:
        return Rows(order, f"by the names in {CONFIG}")
    if _generic(names):
        return Rows(None, f"in the task's order: {CONFIG} calls them {listed(names, 3)}", True)
    if not _own(path):
        return Rows(None, f"in the task's order: {CONFIG} names classes of another task", True)
    raise _refused(task, file, names)


def _own(path: Path) -> bool:
    """Say whether the configuration in a checkpoint's folder can only be that of this checkpoint."""
    if path.is_dir() or path.stem in WHOLE_MODELS:
        return True
    kinds = (*PICKLES, ".safetensors")
    weights = [f for f in path.parent.iterdir() if f.suffix in kinds and not BESIDE.fullmatch(f.stem)]
    return len(weights) < 2


def _names(file: Path) -> list[str] | None:
    """Return the names of a classifier's rows in their order; None where the configuration has none.

    Raises:
        CheckpointError: If it is damaged, or says two different things.
    """
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON ({error}); fetch or save the checkpoint again") from error
    found = settings if isinstance(settings, dict) else {}
    by_row, by_name = _listing(file, found.get("id2label")), _inverse(file, found.get("label2id"))
    if by_row and by_name and by_row != by_name and not _generic(by_row) and not _generic(by_name):
        raise CheckpointError(
            f"{file} contradicts itself: its rows are {listed(by_row, SHOWN)} by id2label and "
            f"{listed(by_name, SHOWN)} by label2id; correct the one that the model was not trained with"
        )
    return by_name if by_name and (not by_row or _generic(by_row)) else by_row


def _listing(file: Path, value: Any) -> list[str] | None:
    if isinstance(value, list):
        value = dict(enumerate(value))
    if not isinstance(value, Mapping) or not value:
        return None
    try:
        numbered = {int(row): str(name) for row, name in value.items()}
    except ValueError:
        numbered = {}
    if sorted(numbered) != list(range(len(value))):
        raise CheckpointError(f"{file} numbers its classes {listed(map(str, value), SHOWN)}, not 0, 1, ...; correct it")
    return [numbered[row] for row in sorted(numbered)]


def _inverse(file: Path, value: Any) -> list[str] | None:
    if not isinstance(value, Mapping) or not value:
        return None
    inverse = {str(row): name for name, row in value.items()}
    if len(inverse) < len(value):
        raise CheckpointError(f"{file} gives two classes of label2id one row; correct it")
    return _listing(file, inverse)


def _generic(names: Sequence[str]) -> bool:
    """Say whether names are numbers alone, counted up from 0 or 1."""
    matches = [GENERIC.fullmatch(name.strip()) for name in names]
    numbers = [int(match[1]) for match in matches if match]
    return len(numbers) == len(names) and numbers in (list(range(len(names))), list(range(1, len(names) + 1)))


def _normal(name: str) -> str:
    return re.sub(r"[\s_-]+", "", unicodedata.normalize("NFKC", name).casefold())


def _matched(task: Task, names: Sequence[str]) -> tuple[int, ...] | None:
    """Return each class's row if every row is one class and every class one row."""
    known = {name: place for place, name in enumerate(task.classes)}
    exact = {**{label: known[name] for label, name in task.labels.items()}, **known}
    loose: dict[str, set[int]] = {}
    for name, place in exact.items():
        loose.setdefault(_normal(name), set()).add(place)
    places = [exact.get(name, _only(loose.get(_normal(name), set()))) for name in names]
    if sorted(places, key=str) != sorted(range(len(task.classes)), key=str):
        return None
    return tuple(places.index(place) for place in range(len(task.classes)))


def _only(places: set[int]) -> int | None:
    return next(iter(places)) if len(places) == 1 else None


def _refused(task: Task, file: Path, names: Sequence[str]) -> CheckpointError:
    known = {_normal(name) for name in (*task.classes, *task.labels)}
    odd = [name for name in names if _normal(name) not in known]
    why = f" ({listed(odd, SHOWN)} cannot be matched)" if odd else ""
    return CheckpointError(
        f"{file} names the rows of the classifier {listed(names, SHOWN)}, and task {task.name} has the classes "
        f"{listed(task.classes, SHOWN)}{why}; give the checkpoint of this task, correct id2label there if its names "
        "are wrong, or set experts.heads=backbone"
    )
