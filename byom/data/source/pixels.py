"""Images written as numbers: one row per image, one column per pixel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from byom.data.source.base import FileSource, Pool, check_splits
from byom.data.source.table import read_table
from byom.errors import DataError

ROWS = 1024
"""Rows of a table that are looked at together: they are numbers of 8 bytes."""


class Arrays(Sequence[Image.Image]):
    """Grey images kept as one array.

    Args:
        pixels: [N, H, W] uint8.
    """

    def __init__(self, pixels: np.ndarray) -> None:
        self._pixels = pixels

    def __len__(self) -> int:
        return len(self._pixels)

    def take(self, places: Sequence[int]) -> Arrays:
        """Return the images at some places."""
        return Arrays(self._pixels[np.asarray(places, np.int64)])

    def __getitem__(self, index: Any) -> Any:
        chosen = self._pixels[index]
        return Arrays(chosen) if isinstance(index, slice) else Image.fromarray(chosen)


@dataclass(frozen=True)
class Pixels(FileSource):
    """A csv file of grey values, one image per row, with the label in one of the columns.

    Args:
        splits: The table of each split, relative to the root.
        height: Pixels.
        width: Pixels.
        label: Number of the label's column; -1 is the last.
        white: The value that stands for white; it becomes 255.
        header: Whether the first line names the columns.
    """

    splits: Mapping[str, str]
    height: int
    width: int
    label: int = -1
    white: int = 255
    header: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_splits(self.splits)

    def files(self) -> Sequence[str]:
        """Return the tables."""
        return list(self.splits.values())

    def read(self) -> dict[str, Pool]:
        """Return one pool per table, its rows in order."""
        return {split: self._pool(name) for split, name in self.splits.items()}

    def _pool(self, name: str) -> Pool:
        path = self.root.folder() / name
        table = read_table(path, header=self.header, cells=float).to_numpy()
        if table.shape[1] != self.height * self.width + 1:
            raise DataError(
                f"{path} has {table.shape[1]} columns, but {self.height} x {self.width} pixels and a label "
                f"make {self.height * self.width + 1}; correct `height` and `width`"
            )
        pixels = np.empty((len(table), self.height, self.width), np.uint8)
        for start in range(0, len(table), ROWS):
            values = np.delete(table[start : start + ROWS], self.label, axis=1)
            if values.min() < 0 or values.max() > self.white:
                raise DataError(f"{path} has grey values outside 0 ... {self.white}; correct `white`")
            grey = (values * (255 / self.white)).round().astype(np.uint8)
            pixels[start : start + ROWS] = grey.reshape(-1, self.height, self.width)
        labels = [str(int(value)) for value in table[:, self.label]]
        return Pool(Arrays(pixels), labels)
