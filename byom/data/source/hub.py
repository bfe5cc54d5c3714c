"""Data sets on the Hugging Face hub, or anything else that `datasets.load_dataset` opens."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Any

from byom.data.source.base import Pool, Source, check_splits
from byom.errors import DataError, suggest
from byom.storage import repository as hub
from byom.storage.contents import content_digest, stamped
from byom.storage.repository import Download
from byom.storage.signature import signature

NOTES = ("README.md", "*.json")
FILES = ("*.parquet", "*.arrow", "*.tar", "*.csv", "*.jsonl", *NOTES)


class Column(Sequence[Any]):
    """One column of a `datasets.Dataset`, or several as rows of texts, decoded one row at a time."""

    def __init__(self, dataset: Any, name: str | Sequence[str]) -> None:
        names = [name] if isinstance(name, str) else list(name)
        self._dataset, self._name = dataset.select_columns(names), name

    def __len__(self) -> int:
        return len(self._dataset)

    def take(self, places: Sequence[int]) -> Column | None:
        """Return the rows at some places; None where the table lies in memory, and would travel with them."""
        return Column(self._dataset.select(places), self._name) if self._dataset.cache_files else None

    def __getitem__(self, index: Any) -> Any:
        row = self._dataset[index]
        return row[self._name] if isinstance(self._name, str) else {name: str(row[name]) for name in self._name}


@dataclass(frozen=True)
class Hub(Source):
    """A data set of the hub.

    Args:
        path: Its name on the hub, a local folder, or a builder such as ``parquet``.
        input: The column of images or texts, or several columns of texts: inputs are then rows, column to text.
        label: The column of labels; class numbers become class names where the data set names them.
        name: The configuration, where there are several.
        revision: A commit, so that the data cannot change unseen; None takes the newest.
        numbers: Whether class numbers stay numbers (``"0"``), so that nothing depends on how the hub spells classes.
        splits: Our split to its split, in the hub's slicing syntax.
        options: Passed on to `datasets.load_dataset`, such as ``data_files``.
    """

    path: str
    input: str | Sequence[str] = "text"
    label: str = "label"
    name: str | None = None
    revision: str | None = None
    numbers: bool = False
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_splits(self.splits)
        if not isinstance(self.input, str):
            object.__setattr__(self, "input", tuple(self.input))

    def downloads(self, what: str) -> Iterator[Download]:
        """Say what would have to be fetched."""
        if self._remote:
            yield hub.download(what, self._repository, [self._patterns])

    def here(self) -> bool:
        """Return whether the commit is given, or the one that its branch points to is on this machine."""
        if not self._remote or self._repository.pinned:
            return True
        commit = hub.current(self._repository)
        return commit is not None and hub.local(self._repository._replace(revision=commit), self._patterns) is not None

    def fetch(self) -> None:
        """Bring the data to this machine, and prepare it."""
        if self._remote:
            for split in self.splits:
                self._load(split)

    def check(self) -> None:
        """Do nothing: whether the hub answers is known when it is asked."""

    def digest(self, cache: Path | None = None) -> str:
        """Return a digest of the commit, of local files, or of the tables themselves where there are neither."""
        if self.revision and re.fullmatch("[0-9a-f]{40}", self.revision):
            return signature(self, digits=64)
        if self._remote and (commit := hub.commit(self._folder())):
            return signature(self, commit, digits=64)
        if files := self._files():
            return signature(self, content_digest(Path(), files, cache), digits=64)
        return signature([self._load(split)._fingerprint for split in self.splits], digits=64)

    def contents(self, cache: Path | None = None) -> str | None:
        """Return the commit that is used or the digest of local files; None where a commit is given."""
        if self._remote:
            return None if self._repository.pinned else hub.current(self._repository)
        return self.digest(cache)

    def read(self) -> dict[str, Pool]:
        """Return one pool per split, its rows in order."""
        return {split: self._pool(self._load(split)) for split in self.splits}

    def _load(self, split: str) -> Any:
        import datasets.config

        path = str(self._folder()) if self._remote else self.path
        options = {"name": self.name, **({} if self._remote else {"revision": self.revision}), **self.options}
        if files := self._files():  # its own cache goes by names and times alone, which a copy over a file may keep
            tables = Path(options.get("cache_dir") or datasets.config.HF_DATASETS_CACHE)
            options["cache_dir"] = str(tables / "byom" / stamped(Path(), files)[:16])
        try:
            return datasets.load_dataset(path, split=self.splits[split], **options)
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise DataError(
                f"the data set {self.path!r} (split {self.splits[split]!r}) cannot be loaded: {reason}. If the hub "
                "cannot be reached, copy the data set to a folder and give that as `path`, or use an offline suite"
            ) from error

    def _files(self) -> list[str]:
        """Return the local files that are read: those of the folder, or those that the builder is given."""
        if self._remote:
            return []
        folders = [folder for folder in (self.path, self.options.get("data_dir")) if folder and Path(folder).is_dir()]
        patterns = [f"{Path(folder).as_posix()}/**/*" for folder in folders]
        patterns += [] if Path(self.path).is_dir() else _leaves(self.options.get("data_files"))
        found = {Path(file).as_posix() for pattern in patterns for file in glob(pattern, recursive=True)}  # noqa: PTH207 - follows links
        return sorted(file for file in found if Path(file).is_file())

    @property
    def _remote(self) -> bool:
        """True where the path is a name on the hub; it may be a folder or a builder such as ``parquet``."""
        return "/" in self.path and not Path(self.path).exists()

    @property
    def _repository(self) -> hub.Repository:
        return hub.Repository(self.path, self.revision or "main", "dataset")

    @property
    def _patterns(self) -> tuple[str, ...]:
        """Return what is fetched: the files of one configuration where there are several."""
        return (f"{self.name}/*", *NOTES) if self.name else FILES

    def _folder(self) -> Path:
        return hub.fetch(self._repository, self._patterns)

    def _pool(self, dataset: Any) -> Pool:
        columns = [self.input] if isinstance(self.input, str) else self.input
        for column in (*columns, self.label):
            if column not in dataset.column_names:
                raise DataError(f"{self.path} has no column {column!r}; {suggest(column, dataset.column_names)}")
        names = None if self.numbers else getattr(dataset.features[self.label], "names", None)
        labels = dataset.select_columns([self.label])[:][self.label]
        values = (int(label) if self.numbers else label for label in labels)
        return Pool(Column(dataset, self.input), [str(names[label] if names else label) for label in values])


def _leaves(value: Any) -> list[str]:
    """Return the texts in nested containers: ``data_files`` may be a pattern, several, or several by split."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, str | Path):
        return [str(value)]
    return [leaf for each in value or () for leaf in _leaves(each)]
