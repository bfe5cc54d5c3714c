"""Experts that somebody published on a hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from byom.errors import CheckpointError, OptionError, suggest
from byom.experts.base import Host, Validation, check_family, named, require_place
from byom.experts.checkpoints import Checkpoints
from byom.experts.labels import Rows, beside
from byom.experts.promised import require_digest
from byom.storage import repository as hub
from byom.storage.repository import Download

if TYPE_CHECKING:
    from byom.data.suite import Task
    from byom.experts.finetune.base import Recipe


@dataclass(frozen=True)
class Hub(Checkpoints):
    """A repository for each task, or one repository with a file for each.

    Args:
        family: Who fine-tuned them, and how: what tables call the checkpoints.
        repositories: Task to repository; the entry ``"*"`` is that of all tasks without one, with ``{task}`` in it
            if it differs by task.
        file: The file or folder within the repository, with ``{task}`` in it if it differs by task; empty takes the
            repository's own weights.
        names: Our name of a task to the one in `repositories` and `file`, where they differ.
        revisions: Commit, tag or branch by task; the entry ``"*"`` is that of all others. Give commits for results
            that can be had again.
        sha256: Hash of a task's file, where its authors published one; another file is refused.
        heads: ``backbone`` makes heads from the pre-trained model, ``checkpoint`` takes those in the files.
        validation: Whether the experts were trained on the validation examples: seen, unseen or unknown.
        source: Where the checkpoints are described.
        caution: What every table of these checkpoints must say, such as test examples that were trained on.

    Raises:
        OptionError: If `repositories` is empty, or the family has no name.
    """

    family: str
    repositories: Mapping[str, str]
    file: str = ""
    names: Mapping[str, str] = field(default_factory=dict)
    revisions: Mapping[str, str] = field(default_factory=lambda: {"*": "main"})
    sha256: Mapping[str, str] = field(default_factory=dict, metadata={"signature": False})
    heads: Literal["backbone", "checkpoint"] = "backbone"
    validation: Validation = "unknown"
    source: str = field(default="", metadata={"signature": False})
    caution: str = field(default="", metadata={"signature": False})

    def __post_init__(self) -> None:
        check_family(self.family, self.validation)
        if not self.repositories:
            raise OptionError(
                "experts.repositories is empty; give e.g. \"experts.repositories={*: 'me/model_{task}'}\""
            )

        for task, name in self.repositories.items():
            require_place(f"experts.repositories.{task}", name)
        require_place("experts.file", self.file)

    def repository(self, task: str) -> hub.Repository:
        """Return a task's repository.

        Raises:
            OptionError: If the family has none for it.
        """
        if not {task, "*"} & set(self.repositories):
            raise OptionError(
                f"{self.family} has no expert for task {task}; {suggest(task, self.repositories)}. Cut the suite, or "
                f"add experts.repositories.{task}"
            )
        name = self.repositories.get(task, self.repositories.get("*", ""))
        revision = self.revisions.get(task, self.revisions.get("*", "main"))
        return hub.Repository(name.format(task=named(self.names, task)), revision)

    def path(self, task: str) -> Path:
        """Return the file or folder of a task's expert, fetched if need be.

        Raises:
            CheckpointError: If the repository does not have it, or it is not the file that `sha256` promises.
        """
        folder = self._folder(task)
        path = folder / self._file(task) if self.file else folder
        if not path.exists():
            raise CheckpointError(f"{self.repository(task)} has no {self._file(task)}; correct experts.file")
        if task in self.sha256:
            require_digest(path, self.sha256[task], f"{self.repository(task)} ({task})")
        return path

    def rows(self, host: Host, task: str) -> Rows:
        """Return which row of a task's classifier stands for which class; see `Checkpoints.rows`."""
        path = self.path(task)
        if self.file and not path.is_dir() and not beside(path).is_file():
            place = beside(path).relative_to(self._folder(task)).as_posix()
            with suppress(CheckpointError):  # the repository may have none
                hub.fetch(self.repository(task), (place,))
        return super().rows(host, task)

    def key(self, task: Task, recipe: Recipe, cache: Path | None = None) -> Any:
        """Return the repository at the commit that is used, and the file in it."""
        return {
            "family": self.family,
            "repository": self.repository(task.name).name,
            "commit": hub.commit(self._folder(task.name)),
            "file": self._file(task.name),
            "heads": self.reading,
        }

    def contents(self, task: Task, cache: Path | None = None) -> str | None:
        """Return the commit that is used, where a branch or tag names it; see `Experts.contents`."""
        repository = self.repository(task.name)
        if repository.pinned and self.heads == "backbone":
            return None
        return hub.current(repository)  # with heads: records of them from before rows went by name are other records

    def notes(self, host: Host) -> dict[str, Any]:
        """Return formats, and repository and commit by task."""
        commits = {task: hub.commit(self._folder(task)) for task in host.tasks}
        names = {task: self.repository(task).name for task in host.tasks}
        return super().notes(host) | {"repositories": names, "commits": commits, "source": self.source}

    def downloads(self, tasks: Iterable[Task]) -> Iterator[Download]:
        """Say what would have to be fetched."""
        for task in tasks:
            yield hub.download(f"expert {task.name}", self.repository(task.name), self._patterns(task.name))

    def held(self, task: Task) -> bool:
        """Say whether files of a task's expert are in the hub's cache; see `Experts.held`."""
        return any(hub.local(self.repository(task.name), kind) for kind in self._patterns(task.name))

    def fetch(self, task: Task) -> None:
        """Bring a task's expert to this machine."""
        self._folder(task.name)

    def _file(self, task: str) -> str:
        return self.file.format(task=named(self.names, task))

    def _patterns(self, task: str) -> list[tuple[str, ...]]:
        """Return what to look for, in order: files that execute nothing come first."""
        if self.file:
            return [(self._file(task), f"{self._file(task)}/*")]
        return [hub.WEIGHTS, (*hub.PICKLED, "*.json")]

    def _folder(self, task: str) -> Path:
        """Return the folder of a repository with weights in it."""
        repository, (first, *rest) = self.repository(task), self._patterns(task)
        folder = hub.fetch(repository, first)
        if rest and not list(folder.glob("*.safetensors")):
            folder = hub.fetch(repository, rest[0])
        return folder
