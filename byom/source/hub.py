"""Data sets on the Hugging Face hub, or anything else that `datasets.load_dataset` opens."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from byom.errors import DataError, suggest
from byom.signature import signature
from byom.source.base import Pool, Source, check_splits


class Column(Sequence[Any]):
    """One column of a `datasets.Dataset`, decoded one row at a time."""

    def __init__(self, dataset: Any, name: str) -> None:
        self._dataset, self._name = dataset.select_columns([name]), name

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        return self._dataset[index][self._name]


@dataclass(frozen=True)
class Hub(Source):
    """A data set of the hub.

    Args:
        path: Its name on the hub, a local folder, or a builder such as ``parquet``.
        input: The column of images or texts.
        label: The column of labels; class numbers become class names where the data set names them.
        name: The configuration, where there are several.
        revision: A commit, so that the data cannot change unseen; None takes the newest.
        splits: Our split to its split, in the hub's slicing syntax.
        options: Passed on to `datasets.load_dataset`, such as ``data_files``.
    """

    path: str
    input: str = "text"
    label: str = "label"
    name: str | None = None
    revision: str | None = None
    splits: Mapping[str, str] = field(default_factory=lambda: {"train": "train", "test": "test"})
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_splits(self.splits)

    def check(self) -> None:
        """Do nothing: whether the hub answers is known when it is asked."""

    def digest(self, cache: Path | None = None) -> str:
        """Return a digest of the commit, or of the tables themselves where no commit is given."""
        if self.revision and re.fullmatch("[0-9a-f]{40}", self.revision):
            return signature(self, digits=64)
        return signature([self._load(split)._fingerprint for split in self.splits], digits=64)

    def read(self) -> dict[str, Pool]:
        """Return one pool a split, its rows in order."""
        return {split: self._pool(self._load(split)) for split in self.splits}

    def _load(self, split: str) -> Any:
        import datasets

        options = {"name": self.name, "revision": self.revision, **self.options}
        try:
            return datasets.load_dataset(self.path, split=self.splits[split], **options)
        except Exception as error:
            reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
            raise DataError(
                f"the data set {self.path!r} (split {self.splits[split]!r}) cannot be loaded: {reason}. If the hub "
                "cannot be reached, copy the data set to a folder and give that as `path`, or use an offline suite"
            ) from error

    def _pool(self, dataset: Any) -> Pool:
        for column in (self.input, self.label):
            if column not in dataset.column_names:
                raise DataError(f"{self.path} has no column {column!r}; {suggest(column, dataset.column_names)}")
        names = getattr(dataset.features[self.label], "names", None)
        labels = Column(dataset, self.label)[:]
        return Pool(Column(dataset, self.input), [str(names[label] if names else label) for label in labels])
