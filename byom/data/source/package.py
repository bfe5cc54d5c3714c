"""Data inside an installed distribution, found by its metadata and never imported."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from email.parser import HeaderParser
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from byom.data.source.root import Root, promised_digest
from byom.errors import DataError, OptionError


class PackageMissing(DataError):
    """A data package is not installed."""


@dataclass(frozen=True)
class Package(Root):
    """A folder inside an installed distribution; no code of it is run.

    Args:
        name: The distribution's name, as pip knows it.
        version: The one version that is accepted; None accepts any and leaves it to `sha256` to tell.
        inner: The folder inside the distribution, relative to where it is installed.
        sha256: The content digest of the files that are read (`content_digest`); empty accepts any.
    """

    name: str
    version: str | None = None
    inner: str = "."
    sha256: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.version, str | None):
            raise OptionError(f"version {self.version} of {self.name} is a number; quote it: '{self.version}'")

    def folder(self) -> Path:
        """Return the folder.

        Raises:
            PackageMissing: If the distribution is not installed.
            DataError: If it has another version.
        """
        try:
            package = distribution(self.name)
        except PackageNotFoundError as error:
            raise PackageMissing(f"the data package {self.name} is not installed; run: {self._install()}") from error
        if self.version is not None and (version := _version(package)) != self.version:
            raise DataError(
                f"the data package {self.name} has version {version}, but {self.version} is needed; "
                f"run: {self._install()}"
            )
        return Path(str(package.locate_file(self.inner)))

    def digest(self, files: Iterable[str], cache: Path | None = None) -> str:
        """Return the content digest of `files`.

        Raises:
            DataError: If it is not `sha256`, so that a file was altered, lost or added.
        """
        return promised_digest(self.folder(), files, cache, self.sha256, f"run: {self._install()} --force-reinstall")

    def _install(self) -> str:
        return (
            f"pip install {self.name}" if self.version is None else f"pip install --no-deps {self.name}=={self.version}"
        )


def _version(package: Distribution) -> str | None:
    """Return the version; `Distribution.version` parses the description too, which is most of its time."""
    headers, _, _ = (package.read_text("METADATA") or "").partition("\n\n")
    return HeaderParser().parsestr(headers)["Version"] or package.version
