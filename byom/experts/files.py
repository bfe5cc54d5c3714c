"""Experts in files of the user's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from byom.checkpoint.files import BESIDE
from byom.checkpoint.recognise import folder_of
from byom.errors import CheckpointError
from byom.experts.base import Validation, check_family, named, require_place
from byom.experts.checkpoints import Checkpoints
from byom.experts.labels import beside
from byom.storage.contents import content_digest
from byom.storage.place import at_home

if TYPE_CHECKING:
    from byom.data.suite import Task
    from byom.experts.finetune.base import Recipe


@dataclass(frozen=True)
class Files(Checkpoints):
    """A file or folder for each task.

    Args:
        family: Who fine-tuned them, and how: what tables call the checkpoints.
        path_of: Path of a task's checkpoint, with ``{task}`` in it; ``~`` is expanded.
        names: Our name of a task to the one in the path, where they differ.
        heads: ``backbone`` makes heads from the pre-trained model, ``checkpoint`` takes those in the files.
        validation: Whether the experts were trained on the validation examples: seen, unseen or unknown.
        source: Where the checkpoints are described, or how to get them; shown if they are missing.
        caution: What every table of these checkpoints must say, such as test examples that were trained on.

    Raises:
        OptionError: If the path has no ``{task}``, or the family no name.
    """

    family: str
    path_of: str = field(metadata={"signature": False})  # places: a signature has what lies there
    names: Mapping[str, str] = field(default_factory=dict, metadata={"signature": False})
    heads: Literal["backbone", "checkpoint"] = "backbone"
    validation: Validation = "unknown"
    source: str = field(default="", metadata={"signature": False})
    caution: str = field(default="", metadata={"signature": False})

    def __post_init__(self) -> None:
        check_family(self.family, self.validation)
        require_place("experts.path_of", self.path_of, everywhere=True)

    def path(self, task: str) -> Path:
        """Return the file or folder of a task's expert.

        Raises:
            CheckpointError: If it is not there.
        """
        path = at_home(self.path_of.format(task=named(self.names, task)))
        if not path.exists():
            hint = f" ({self.source})" if self.source else ""
            raise CheckpointError(f"the expert of task {task} is not at {path}; set experts.path_of{hint}")
        return path

    def key(self, task: Task, recipe: Recipe, cache: Path | None = None) -> Any:
        """Return the family and the digest of the files: another file at the same place is another expert."""
        return {"family": self.family, "files": self.contents(task, cache), "heads": self.reading}

    def contents(self, task: Task, cache: Path | None = None) -> str | None:
        """Return the digest of the files that are read; see `Experts.contents`."""
        path = folder_of(self.path(task.name))
        folder, names = (path, _read_of(path)) if path.is_dir() else (path.parent, [path.name, *_shards(path)])
        if self.heads == "checkpoint" and path.is_file() and beside(path).is_file():
            names.append(beside(path).name)  # it says which class each row of the classifier is
        return content_digest(folder, names, cache, CheckpointError)


def _read_of(folder: Path) -> list[str]:
    """Return the files of a checkpoint's folder, without what a trainer leaves there besides."""
    files = [f for f in folder.iterdir() if f.is_file() and f.name[0] != "." and not BESIDE.fullmatch(f.stem)]
    return [*(f.name for f in files), *(shard for f in files for shard in _shards(f))]


def _shards(file: Path) -> list[str]:
    """Return the files that an index of shards names."""
    if not file.name.endswith(".index.json"):
        return []
    try:
        names = sorted(set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        return []  # whoever reads the checkpoint says what is wrong with it
    return [name for name in names if isinstance(name, str) and (file.parent / name).is_file()]
