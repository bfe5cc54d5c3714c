"""Tables: a column of texts or of image files, and a column of labels."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from byom.data.source.base import FileSource, Pool, check_splits
from byom.data.source.images import Images
from byom.errors import DataError, suggest

if TYPE_CHECKING:
    from pandas import DataFrame

DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
KINDS = (*DELIMITERS, ".jsonl", ".parquet")


@dataclass(frozen=True)
class TableSource(FileSource):
    """Tables of labelled rows: csv, tsv, tab or jsonl (each also as .gz, .bz2, .xz), and parquet.

    Args:
        splits: The table of each split, relative to the root.
        label: The column of labels: its name, or its number from 0 where the table has no header.
        delimiter: What separates columns, a regular expression if longer than a character; None goes by the
            file's ending.
        header: Whether the first line names the columns.
        skip: How many lines after the header are not data.
        where: Column to the values that are kept, as in ``{category: [fresh, rotten]}``; empty keeps all rows.
    """

    splits: Mapping[str, str]
    label: str | int = "label"
    delimiter: str | None = None
    header: bool = True
    skip: int = 0
    where: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_splits(self.splits)

    def rows(self, split: str, column: str | int) -> tuple[list[str], list[str]]:
        """Return one split's values of `column` and its labels, as strings.

        Raises:
            DataError: If the table cannot be read, lacks a column or has empty cells in it.
        """
        path = self.root.folder() / self.splits[split]
        table: Any = read_table(path, self.delimiter, self.header, self.skip)
        for name, values in self.where.items():
            table = table[_column(path, table, name).astype(str).isin([str(value) for value in values])]
        if table.empty:
            raise DataError(f"the table {path} has no rows that `where` keeps; correct `where` or the file")
        return _strings(path, table, column), _strings(path, table, self.label)


@dataclass(frozen=True)
class Table(TableSource):
    """Texts in a column of a table.

    Args:
        text: The column of texts: its name, or its number from 0 where the table has no header.
    """

    text: str | int = "text"

    def files(self) -> Sequence[str]:
        """Return the tables."""
        return list(self.splits.values())

    def read(self) -> dict[str, Pool]:
        """Return one pool per table, its rows in order."""
        return {split: Pool(*self.rows(split, self.text)) for split in self.splits}


@dataclass(frozen=True)
class ImageTable(TableSource):
    """Image files listed in a column of a table, relative to the table.

    Args:
        image: The column of paths: its name, or its number from 0 where the table has no header.
    """

    image: str | int = "image"

    def files(self) -> Sequence[str]:
        """Return the tables and every image they list."""
        folder = self.root.folder()
        listed = [path.relative_to(folder).as_posix() for split in self.splits for path in self._listed(split)[0]]
        return [*self.splits.values(), *listed]

    def read(self) -> dict[str, Pool]:
        """Return one pool per table, its rows in order."""
        listed = {split: self._listed(split) for split in self.splits}
        return {split: Pool(Images(paths), labels) for split, (paths, labels) in listed.items()}

    def _listed(self, split: str) -> tuple[list[Path], list[str]]:
        names, labels = self.rows(split, self.image)
        above = (self.root.folder() / self.splits[split]).parent
        return [above / name for name in names], labels


def read_table(
    path: Path, delimiter: str | None = None, header: bool = True, skip: int = 0, cells: type = str
) -> DataFrame:
    """Read a table; blank lines of a text file are passed over.

    Args:
        path: A file that ends in one of `KINDS`, or in that and .gz, .bz2 or .xz.
        delimiter: See `TableSource`.
        header: See `TableSource`.
        skip: See `TableSource`.
        cells: What the cells of a csv, tsv or tab file are read as: str, so that nothing is lost, or float.

    Returns:
        A pandas DataFrame.

    Raises:
        DataError: If the file is missing, malformed or of an unknown kind.
    """
    kind = next((suffix.lower() for suffix in reversed(path.suffixes) if suffix.lower() in KINDS), "")
    if not kind:
        raise DataError(f"the table {path} is of an unknown kind; it must end in {', '.join(KINDS)}")
    try:
        return _parse(path, kind, delimiter, header, skip, cells)
    except (OSError, ValueError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise DataError(f"the table {path} cannot be read ({error}); restore it or correct the options") from error


def _parse(path: Path, kind: str, delimiter: str | None, header: bool, skip: int, cells: type) -> DataFrame:
    import pandas

    pd: Any = pandas

    if kind == ".parquet":
        return pd.read_parquet(path)
    if kind == ".jsonl":
        return pd.DataFrame(_json_lines(path), dtype=object)
    return pd.read_csv(
        path,
        sep=delimiter or DELIMITERS[kind],
        header=0 if header else None,
        skiprows=range(int(header), int(header) + skip),
        dtype=cells,
        keep_default_na=False,
    )


def _json_lines(path: Path) -> list[dict[str, Any]]:
    openers = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    with openers.get(path.suffix.lower(), open)(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def _column(path: Path, table: Any, name: str | int) -> Any:
    if name not in table.columns:
        raise DataError(f"the table {path} has no column {name!r}; {suggest(str(name), map(str, table.columns))}")
    return table[name]


def _strings(path: Path, table: Any, name: str | int) -> list[str]:
    column = _column(path, table, name)
    if column.isna().any():
        raise DataError(f"{column.isna().sum()} cells of column {name!r} of {path} are empty; fill or remove them")
    return [str(value) for value in column]
