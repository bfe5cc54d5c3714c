"""Encoded, labelled examples, in memory or in a mapped file, and their fingerprint."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from byom.storage.atomic import write_bytes
from byom.storage.contents import remembered

PADDED = ("input_ids", "attention_mask", "token_type_ids")
LABELS, INPUTS = "labels", "inputs/"
LARGE = 1 << 24
"""Bytes from which a file's fingerprint is remembered, and not computed whenever it is opened."""


class Split:
    """Encoded, labelled examples.

    Args:
        inputs: Name to tensor of N rows: ``pixels`` uint8 [N, 3, H, W], or ``input_ids`` and ``attention_mask``
            [N, L]. Those of a cached split lie in a mapped file, and take memory where they are copied alone.
        labels: [N], class numbers int64, or numbers float32.
        fingerprint: 16 hexadecimal digits of the SHA-256 of the tensors; computed when it is asked for if left out.
    """

    def __init__(self, inputs: dict[str, Tensor], labels: Tensor, fingerprint: str = "") -> None:
        self._inputs, self.labels = inputs, labels
        self._known = fingerprint

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Name to tensor of N rows."""
        return self._inputs

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits of the SHA-256 of the tensors, or what was given for them."""
        return self._known or fingerprint(self.inputs | {LABELS: self.labels})

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, places: Tensor) -> Split:
        """Return the examples at some places, int64 ``[M]``; inputs are copied batch by batch, as `batches` gives them.

        The fingerprint stays that of the whole.
        """
        return _Part(self, places)

    def batches(self, size: int, order: Tensor | None = None) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
        """Yield every example once, in batches; padding that no example of a batch needs is cut off.

        Args:
            size: Examples in a batch; the last one may be smaller.
            order: int64 [M], which examples and in which order. None takes all: images as they are, texts from
                long to short, which spares padding.

        Yields:
            Inputs, labels int64 [B], and index int64 [B]: the examples' places in the split, so that
            ``hits[index] = ...`` restores the original order.
        """
        for index in (self._order() if order is None else order).split(size):
            yield (
                self._trimmed(self._rows(index)),
                self.labels[index],
                index,
            )

    def _rows(self, index: Tensor) -> dict[str, Tensor]:
        return {name: value.index_select(0, index) for name, value in self.inputs.items()}

    def _lengths(self) -> Tensor | None:
        """Return how many tokens each text has; None of images."""
        mask = self.inputs.get("attention_mask")
        return None if mask is None else mask.sum(1)

    def _order(self) -> Tensor:
        lengths = self._lengths()
        return torch.arange(len(self)) if lengths is None else lengths.argsort(descending=True, stable=True)

    def _trimmed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if "attention_mask" not in inputs:
            return inputs
        used = inputs["attention_mask"].bool().any(0).nonzero().flatten()
        if not len(used):
            return inputs
        columns = slice(int(used[0]), int(used[-1]) + 1)
        return {name: value[:, columns] if name in PADDED else value for name, value in inputs.items()}


class _Part(Split):
    """Some examples of a split; see `Split.at`."""

    def __init__(self, whole: Split, places: Tensor) -> None:
        super().__init__({}, whole.labels[places])
        self._whole, self._places = whole, places

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Name to tensor of M rows, copied from the whole."""
        return self._rows(torch.arange(len(self)))

    @cached_property
    def fingerprint(self) -> str:
        """That of the whole."""
        return self._whole.fingerprint

    def _rows(self, index: Tensor) -> dict[str, Tensor]:
        return self._whole._rows(self._places[index])

    def _lengths(self) -> Tensor | None:
        lengths = self._whole._lengths()
        return None if lengths is None else lengths[self._places]


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """Return 16 hexadecimal digits of the SHA-256 over names, types, shapes and bytes; nothing is copied."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the fingerprint of the tensors of a file."""
    return fingerprint({name.removeprefix(INPUTS): tensor for name, tensor in tensors.items()})


def save_split(path: Path, split: Split) -> None:
    """Write a small split as one file, from memory."""
    tensors = {f"{INPUTS}{key}": value.contiguous() for key, value in split.inputs.items()} | {LABELS: split.labels}
    write_bytes(path, save(tensors, metadata={"fingerprint": split.fingerprint}))


def open_split(path: Path, cache: Path | None = None) -> Split | None:
    """Return the split in a file, which stays mapped; None if it is missing or damaged.

    Args:
        path: The file.
        cache: Where the fingerprint of a large file that did not change is remembered; None computes it.
    """
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            promised = file.metadata()["fingerprint"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        memory = cache if path.stat().st_size >= LARGE and os.access(path.parent, os.W_OK) else None
        found = remembered(path.parent, [path.name], memory, lambda: digest_of(tensors), digits=16)
        labels = tensors.pop(LABELS)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None
    split = Split({name.removeprefix(INPUTS): tensor for name, tensor in tensors.items()}, labels, promised)
    return split if found == promised else None
