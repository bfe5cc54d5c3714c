"""Repositories of a model or data hub: their files, those of them on this machine, and bringing them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from byom.errors import CheckpointError, DataError

WEIGHTS = ("*.safetensors", "*.json", "*.model", "*.txt")
PICKLED = ("*.bin", "*.pt", "*.pth")

PATIENCE = 60.0
"""Seconds for which a hub that did not answer is not asked for sizes again."""
_silent: dict[str, float] = {}
"""Hub to the time (`time.monotonic`) at which it did not answer."""
_commits: dict[tuple[str, Repository], str] = {}
"""Cache folder and repository to the commit that its revision points to, asked once a process."""


class Repository(NamedTuple):
    """A repository at a revision.

    Args:
        name: ``organisation/name``.
        revision: A branch, tag or commit.
        kind: ``model`` or ``dataset``.
    """

    name: str
    revision: str = "main"
    kind: str = "model"

    def __str__(self) -> str:
        return f"{self.name}@{self.revision}"

    @property
    def pinned(self) -> bool:
        """Whether the revision is a commit, which never points to anything else."""
        return len(self.revision) == 40 and all(c in "0123456789abcdef" for c in self.revision)


class Download(NamedTuple):
    """Something that a run needs and that may have to be fetched.

    Args:
        what: A name for people, such as ``expert mnist``.
        place: The repository or folder that it comes from.
        local: Whether it is on this machine.
        bytes: Its size where it is known: of what is here, or as the hub says.
    """

    what: str
    place: str
    local: bool
    bytes: int | None


def download(what: str, repository: Repository, patterns: Sequence[Sequence[str]]) -> Download:
    """Describe the files of a repository that match the first of some kinds of patterns that any file matches."""
    here = next((kind for kind in patterns if local(repository, kind)), None)
    kinds = [here] if here else patterns
    return Download(
        what, str(repository), here is not None, next((s for k in kinds if (s := size(repository, k))), None)
    )


def local(repository: Repository, patterns: Sequence[str]) -> Path | None:
    """Return the folder of a repository's files if files of that kind are on this machine, else None."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = _snapshot(repository, patterns, offline=True)
    except (LocalEntryNotFoundError, FileNotFoundError):
        return None
    return folder if _held(folder, patterns) else None


def fetch(repository: Repository, patterns: Sequence[str]) -> Path:
    """Bring a repository's files to this machine, if they are not here.

    Args:
        repository: The repository.
        patterns: Shell-style patterns of the files that are needed.

    Returns:
        The folder that holds them.

    Raises:
        CheckpointError: If a model repository cannot be had, or holds no such file.
        DataError: If a data repository cannot.
    """
    from huggingface_hub import constants

    return _fetched(repository, tuple(patterns), constants.HF_HUB_CACHE)


@lru_cache(maxsize=256)
def _fetched(repository: Repository, patterns: tuple[str, ...], cache: str) -> Path:
    """Fetch once a process; a hub is asked what a branch points to whenever this is called."""
    error_type = DataError if repository.kind == "dataset" else CheckpointError
    try:
        folder = local(repository, patterns) if repository.pinned else None
        folder = folder or _snapshot(repository, patterns, offline=False)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        kind = " --repo-type dataset" if repository.kind == "dataset" else ""
        raise error_type(
            f"{repository} cannot be had ({reason}). Check the name and the network; on a machine without one, run "
            f"`hf download {repository.name}{kind}`, or `byom fetch` for an experiment, where there is one and copy "
            "the hub's cache (HF_HOME)"
        ) from error
    if not _held(folder, patterns):
        raise error_type(f"{repository} holds no file that matches {', '.join(patterns)}")
    return folder


def size(repository: Repository, patterns: Sequence[str]) -> int | None:
    """Return the bytes of a repository's files: of those that are here, or as the hub says; None if it is unknown."""
    folder = local(repository, patterns)
    if folder:
        return sum(path.stat().st_size for path in _held(folder, patterns))
    siblings: Any = getattr(_info(repository, files=True), "siblings", None) or ()
    files = [file for file in siblings if _matches(file.rfilename, patterns)]
    return sum(file.size or 0 for file in files) if files else None


def current(repository: Repository) -> str | None:
    """Return the commit that a repository's revision points to: as its hub says now, or else as when it was fetched.

    Args:
        repository: The repository; of a pinned one, no hub is asked.

    Returns:
        The commit; None if the hub cannot be asked and nothing was fetched.
    """
    from huggingface_hub import constants

    if repository.pinned:
        return repository.revision
    key = (constants.HF_HUB_CACHE, repository)
    if key not in _commits:
        found = (None if constants.HF_HUB_OFFLINE else _asked(repository)) or _noted(repository)
        if found is None:
            return None
        _commits[key] = found
    return _commits[key]


def _asked(repository: Repository) -> str | None:
    info = _info(repository)
    return info and info.sha


def _info(repository: Repository, files: bool = False) -> Any:
    """Return what a hub says of a repository; None where it says nothing, and then it is left alone for a while."""
    from huggingface_hub import HfApi, constants

    hub = constants.ENDPOINT
    if time.monotonic() < _silent.get(hub, -PATIENCE) + PATIENCE:
        return None
    try:
        return HfApi().repo_info(
            repository.name, revision=repository.revision, repo_type=repository.kind, files_metadata=files, timeout=10
        )
    except Exception as error:  # whatever keeps the hub from answering, it stays unknown
        if getattr(error, "response", None) is None:  # no answer: each further question would wait for its time-out
            _silent[hub] = time.monotonic()
        return None


def _noted(repository: Repository) -> str | None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return commit(_snapshot(repository, [], offline=True))
    except (LocalEntryNotFoundError, FileNotFoundError):
        return None


def commit(folder: Path) -> str | None:
    """Return the commit that a folder in the hub's cache holds."""
    parts = folder.parts
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts[:-1] else None


def _snapshot(repository: Repository, patterns: Sequence[str], *, offline: bool) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            repository.name,
            revision=repository.revision,
            repo_type=repository.kind,
            allow_patterns=list(patterns),
            local_files_only=offline,
        )
    )


def _held(folder: Path, patterns: Sequence[str]) -> list[Path]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in files if _matches(path.relative_to(folder).as_posix(), patterns)]


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)
