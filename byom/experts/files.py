"""Experts in files of the user's own."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from byom.errors import CheckpointError, OptionError
from byom.experts.base import Validation, check_family, named
from byom.experts.checkpoints import Checkpoints
from byom.storage.tensor_files import digest

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

    Raises:
        OptionError: If the path has no ``{task}``, or the family no name.
    """

    family: str
    path_of: str
    names: Mapping[str, str] = field(default_factory=dict)
    heads: Literal["backbone", "checkpoint"] = "backbone"
    validation: Validation = "unknown"
    source: str = ""

    def __post_init__(self) -> None:
        check_family(self.family, self.validation)
        if "{task}" not in self.path_of:
            raise OptionError(f"experts.path_of={self.path_of!r} must have {{task}} in it")

    def path(self, task: str) -> Path:
        """Return the file or folder of a task's expert.

        Raises:
            CheckpointError: If it is not there.
        """
        path = Path(self.path_of.format(task=named(self.names, task))).expanduser()
        if not path.exists():
            hint = f" ({self.source})" if self.source else ""
            raise CheckpointError(f"the expert of task {task} is not at {path}; set experts.path_of{hint}")
        return path

    def key(self, task: Task, recipe: Recipe) -> Any:
        """Return the family, and sizes and times of the files: another file at the same place is another expert."""
        path = self.path(task.name)
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        state = [[p.name, p.stat().st_size, p.stat().st_mtime_ns] for p in files]
        return {"family": self.family, "files": digest(json.dumps(state)), "heads": self.heads}
