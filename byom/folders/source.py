"""Where models come from: folders and files of this machine, and repositories of the hub."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from byom.checkpoint.adapters.config import CONFIG as ADAPTER
from byom.checkpoint.recognise import folder_of
from byom.errors import CheckpointError, OptionError
from byom.storage import foreign
from byom.storage import repository as hub
from byom.storage.folder import PYTORCH, SAFETENSORS, indexed
from byom.storage.place import at_home

HUB = "hf://"
BESIDE = ("*.json", "*.model", "*.txt", "*.jinja", "*.py", "*.md", "*.tiktoken")
"""Files of a repository that belong to a model besides its weights."""
ENDS = (".safetensors", *foreign.PICKLES)


@dataclass(frozen=True)
class Source:
    """A model on this machine.

    Args:
        given: How it was given: a path, or ``hf://organisation/name@revision``.
        path: The file or folder.
    """

    given: str
    path: Path

    @classmethod
    def of(cls, given: str, option: str) -> Source:
        """Find a model, fetching it from the hub if it is not on this machine.

        Args:
            given: A path, or ``hf://organisation/name[/folder][@revision]``.
            option: The option that gives it, for messages.

        Raises:
            OptionError: If it is no path and no address.
            CheckpointError: If there is no such file or repository.
        """
        if not given.strip():
            raise OptionError(f"{option} is empty; give a folder, a file, or {HUB}ORGANISATION/NAME")
        if given.startswith(HUB):
            return cls(given, _fetched(given, option))
        path = folder_of(at_home(given))
        if not path.exists():
            of_hub = re.fullmatch(r"(?:https?://huggingface\.co/)?([\w.-]+/[\w.-]+)/?", given)
            hint = f", or {HUB}{of_hub[1]} for a repository of the hub" if of_hub else ""
            raise CheckpointError(f"{option}: {foreign.missing(path)}{hint}")
        return cls(given, path)

    @property
    def folder(self) -> Path | None:
        """The folder with what lies beside the weights; None for a file, whose neighbours may be anyone's."""
        return self.path if self.path.is_dir() else None

    @property
    def is_adapter(self) -> bool:
        """Whether it is a PEFT adapter."""
        return (self.path / ADAPTER).is_file()

    @property
    def commit(self) -> str:
        """The commit of a repository of the hub; empty for what was given as a path."""
        parts = self.path.parts
        place = parts.index("snapshots") if self.given.startswith(HUB) and "snapshots" in parts else None
        return "" if place is None else parts[place + 1]

    @cached_property
    def files(self) -> list[Path]:
        """The files of weights."""
        if self.path.is_file():
            return [self.path]
        for names in (SAFETENSORS, PYTORCH):
            if (self.path / names.index_file).is_file():
                return sorted({self.path / shard for shard in indexed(self.path, names).values()})
            if (self.path / names.single_file).is_file():
                return [self.path / names.single_file]
        found = sorted(file for file in self.path.iterdir() if file.suffix in ENDS)
        return [file for file in found if file.suffix == ".safetensors"] or found

    @property
    def nbytes(self) -> int:
        """Bytes of the files of weights."""
        return sum(file.stat().st_size for file in self.files)

    def sha256(self) -> str:
        """Return the SHA-256 of the file of weights; of several, that of their digests in the order of their names."""
        digests = [_sha256(file) for file in self.files]
        return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _sha256(file: Path) -> str:
    blob = file.resolve().name
    if len(blob) == 64 and all(c in "0123456789abcdef" for c in blob):  # the hub's cache names large files by it
        return blob
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _fetched(given: str, option: str) -> Path:
    address, _, revision = given.removeprefix(HUB).partition("@")
    owner, _, rest = address.partition("/")
    name, _, inner = rest.partition("/")
    if not owner or not name:
        raise OptionError(f"{option}={given} is no repository; write {HUB}ORGANISATION/NAME, or .../NAME@REVISION")
    repository = hub.Repository(f"{owner}/{name}", revision or "main")
    start = f"{inner}/" if inner else ""
    beside = [start + pattern for pattern in BESIDE]
    folder = next(_with_weights(repository, beside, start)) / inner
    if not folder.exists():
        raise CheckpointError(f"{option}: {repository} has no folder {inner}")
    return folder


def _with_weights(repository: hub.Repository, beside: list[str], start: str) -> Iterator[Path]:
    """Yield the folder of a repository with its safetensors, or with PyTorch's own files if it has no others."""
    for kinds in (["*.safetensors"], list(hub.PICKLED)):
        patterns = [start + kind for kind in kinds]
        folder = hub.fetch(repository, [*patterns, *beside])
        if any(found for pattern in patterns for found in folder.glob(pattern)):
            yield folder
    raise CheckpointError(f"{repository} holds no weights ({start or 'its first folder'}); name the folder that does")
