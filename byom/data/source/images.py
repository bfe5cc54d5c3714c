"""Image files: the class is a folder's name, or a column of a table that lists the files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from byom.data.source.base import FileSource, Pool, check_splits
from byom.errors import DataError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"})


class Images(Sequence[Image.Image]):
    """Image files that are opened and decoded one at a time, when asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = list(paths)

    def __len__(self) -> int:
        return len(self._paths)

    def take(self, places: Sequence[int]) -> Images:
        """Return the files at some places."""
        return Images([self._paths[i] for i in places])

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Images(self._paths[index])
        try:
            with Image.open(self._paths[index]) as image:
                image.load()
                return image
        except (OSError, SyntaxError) as error:
            raise DataError(f"the image {self._paths[index]} cannot be decoded; restore or remove it") from error


@dataclass(frozen=True)
class ImageFolder(FileSource):
    """Images sorted into one folder per class.

    Args:
        splits: Glob pattern of each split's images, relative to the root, such as ``train/*/*.jpg``; files that
            do not end like an image are passed over.
        parent: Which folder names the class: 1 is the one that holds the image, 2 the one above it.
    """

    splits: Mapping[str, str]
    parent: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_splits(self.splits)

    def files(self) -> Sequence[str]:
        """Return every split's images."""
        folder = self.root.folder()
        return [path.relative_to(folder).as_posix() for split in self.splits for path in self._images(split)]

    def read(self) -> dict[str, Pool]:
        """Return one pool per split, its images in the order of their paths."""
        return {split: self._pool(self._images(split)) for split in self.splits}

    def _images(self, split: str) -> list[Path]:
        folder, pattern = self.root.folder(), self.splits[split]
        images = (path for path in folder.glob(pattern) if path.suffix.lower() in SUFFIXES)
        files = sorted(images, key=lambda path: path.parts)  # not by the system's rules of case: draws go by the order
        if not files:
            raise DataError(f"no image in {folder} matches {pattern!r} (split {split}); correct `splits` or `root`")
        return files

    def _pool(self, paths: list[Path]) -> Pool:
        return Pool(Images(paths), list(self._labels(paths)))

    def _labels(self, paths: list[Path]) -> Iterator[str]:
        folder = self.root.folder()
        for path in paths:
            above = path.relative_to(folder).parts[:-1]
            if len(above) < self.parent:
                raise DataError(f"{path} lies in no class folder; put one folder per class below {folder}")
            yield above[-self.parent]
