"""The folder a source reads from, and the digest that says whether its files are still the same."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from byom.errors import DataError
from byom.storage.contents import content_digest
from byom.storage.place import at_home

__all__ = ["Folder", "Root", "content_digest", "promised_digest"]


class Root(ABC):
    """A folder with data in it, wherever it came from."""

    sha256: str = ""
    """The content digest that its files must have; empty where nothing was promised."""

    @abstractmethod
    def folder(self) -> Path:
        """Return the folder.

        Raises:
            DataError: If it is not there; the message names the remedy.
        """

    @abstractmethod
    def digest(self, files: Iterable[str], cache: Path | None = None) -> str:
        """Return the content digest of `files` and check it against what was promised, if anything was.

        Args:
            files: Paths relative to the folder, with forward slashes.
            cache: Where the digest of unchanged files is remembered; None computes it every time.

        Returns:
            64 hexadecimal digits.

        Raises:
            DataError: If a file is missing or not the one that was promised.
        """


@dataclass(frozen=True)
class Folder(Root):
    """A folder of the user's own; a result's signature covers what is in it, not where it lies.

    Args:
        path: The folder; ``~`` is expanded.
    """

    path: str = field(metadata={"signature": False})

    def folder(self) -> Path:
        """Return the folder, or raise DataError if it does not exist."""
        folder = at_home(self.path)
        if not folder.is_dir():
            raise DataError(f"the data folder {folder} does not exist; set `root` to the folder that holds the data")
        return folder

    def digest(self, files: Iterable[str], cache: Path | None = None) -> str:
        """Return the content digest of `files`; see `Root.digest`."""
        return content_digest(self.folder(), files, cache)


def promised_digest(folder: Path, files: Iterable[str], cache: Path | None, sha256: str, remedy: str) -> str:
    """Return the content digest of `files`, which must be `sha256` unless that is empty.

    Raises:
        DataError: If it is another one, so that a file was altered, lost or added; the message ends with `remedy`.
    """
    digest = content_digest(folder, files, cache)
    if sha256 and digest != sha256:
        raise DataError(
            f"the data files in {folder} are not the published ones "
            f"(sha256 {digest[:16]}, expected {sha256[:16]}); {remedy}"
        )
    return digest
