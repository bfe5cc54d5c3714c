"""The idx format that MNIST came in: a file of images and a file of labels, gzipped."""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from byom.data.source.base import FileSource, Pool, check_splits
from byom.data.source.pixels import Arrays
from byom.errors import DataError, OptionError

UNSIGNED_BYTES = 8


@dataclass(frozen=True)
class Idx(FileSource):
    """Grey images in idx files.

    Args:
        splits: The image file and the label file of each split, relative to the root; gzipped or not.
    """

    splits: Mapping[str, Sequence[str]]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_splits(self.splits)
        for split, pair in self.splits.items():
            if isinstance(pair, str) or len(pair) != 2:
                raise OptionError(f"split {split} of an idx source is [images, labels], not {pair!r}")

    def files(self) -> Sequence[str]:
        """Return the image files and the label files."""
        return [name for pair in self.splits.values() for name in pair]

    def read(self) -> dict[str, Pool]:
        """Return one pool per split, its images in order."""
        folder = self.root.folder()
        return {split: _pool(folder / pair[0], folder / pair[1]) for split, pair in self.splits.items()}


def _pool(images: Path, labels: Path) -> Pool:
    return Pool(Arrays(read_idx(images, axes=3)), [str(label) for label in read_idx(labels, axes=1).tolist()])


def read_idx(path: Path, axes: int) -> np.ndarray:
    """Read an idx file of unsigned bytes.

    Args:
        path: The file, gzipped if it ends in .gz.
        axes: How many axes it must have.

    Returns:
        An array of uint8.

    Raises:
        DataError: If it is missing, cut short or of another kind.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        zeros, kind, count = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{axes}I", content, 4)
        if (zeros, kind, count) != (0, UNSIGNED_BYTES, axes):
            raise ValueError(f"it holds type {kind} with {count} axes, not bytes with {axes}")
        return np.frombuffer(content, np.uint8, offset=4 + 4 * axes).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise DataError(f"the idx file {path} cannot be read ({error}); restore it") from error
