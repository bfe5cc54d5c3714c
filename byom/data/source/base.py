"""Sources of labelled examples: pools of raw inputs with class-name labels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from byom.data.source.root import Folder, Root
from byom.errors import DataError, OptionError, suggest
from byom.storage.repository import Download

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Pool:
    """Labelled raw examples.

    Args:
        inputs: N PIL images (decoded when asked for, any mode) or N strings.
        labels: N labels as the data names them.
    """

    inputs: Sequence[Any]
    labels: Sequence[str]

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.labels):
            raise DataError(
                f"{len(self.inputs)} inputs but {len(self.labels)} labels; the files do not belong together"
            )

    def __len__(self) -> int:
        return len(self.labels)


class Source(ABC):
    """A place that labelled examples come from."""

    @final
    def pools(self, cache: Path | None = None) -> dict[str, Pool]:
        """Return the official pools, verified before they are read.

        Args:
            cache: Where verifications are remembered; None verifies every time.

        Returns:
            "train", and "validation" and "test" where the data has official ones.

        Raises:
            DataError: If data is missing, altered or malformed.
        """
        self.digest(cache)
        return self.read()

    def downloads(self, what: str) -> Iterator[Download]:
        """Say what would have to be fetched from a hub; nothing where the data is on this machine.

        Args:
            what: What a list of downloads calls the data.
        """
        yield from ()

    def here(self) -> bool:
        """Return whether `digest` fetches nothing."""
        return True

    def fetch(self) -> None:  # noqa: B027 - most kinds need none
        """Bring the data to this machine; nothing where it is there."""

    @abstractmethod
    def check(self) -> None:
        """Raise DataError if the data is plainly not there; reads nothing."""

    @abstractmethod
    def digest(self, cache: Path | None = None) -> str:
        """Return a digest that changes with the data; see `Root.digest`."""

    def contents(self, cache: Path | None = None) -> str | None:
        """Return what tells the data from other data under the same options; None where the options tell it.

        Args:
            cache: See `pools`.

        Raises:
            DataError: If data is missing.
        """
        return self.digest(cache)

    @abstractmethod
    def read(self) -> dict[str, Pool]:
        """Read the pools without verification; use `pools`."""


@dataclass(frozen=True)
class FileSource(Source):
    """A source that reads files below a root.

    Args:
        root: The user's own folder, or a `Package`.
    """

    root: Root

    def __post_init__(self) -> None:
        if isinstance(self.root, str | Path):
            object.__setattr__(self, "root", Folder(str(self.root)))

    @abstractmethod
    def files(self) -> Sequence[str]:
        """Return the files that are read, relative to the root, with forward slashes."""

    @final
    def check(self) -> None:
        """Raise DataError if the root is not there."""
        self.root.folder()

    @final
    def digest(self, cache: Path | None = None) -> str:
        """Return the content digest of the files that are read, checked against the root's promise."""
        return self.root.digest(self.files(), cache)

    @final
    def contents(self, cache: Path | None = None) -> str | None:
        """Return the content digest, or None where the root promises one; see `Source.contents`."""
        return None if self.root.sha256 else self.digest(cache)


def check_splits(splits: Mapping[str, Any]) -> None:
    """Raise OptionError unless the keys of `splits` are splits and "train" is among them."""
    unknown = [key for key in splits if key not in SPLITS]
    if unknown:
        raise OptionError(f"there is no split {unknown[0]!r}; {suggest(unknown[0], SPLITS)}")
    if "train" not in splits:
        raise OptionError(f"a source needs a train split; it has {', '.join(splits) or 'none'}")
