"""From a task to encoded examples: drawn by seed, free of leaks, cached and fingerprinted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from byom.data.draw import SPLITS, Draws
from byom.data.suite import Task
from byom.storage.atomic import write_bytes
from byom.storage.signature import describe, signature

FORMAT = 1
CHUNK = 64
PADDED = ("input_ids", "attention_mask", "token_type_ids")


class Encoder(Protocol):
    """The part of a backbone that this module uses."""

    def encoding_for(self, task: Task) -> Any:
        """Describe the encoding in JSON values: tokenizer and length, or resolution and cropping."""
        ...

    def encode(self, inputs: list[Any], task: Task) -> dict[str, Tensor]:
        """Turn N raw inputs into tensors of N rows whose other sizes do not depend on the inputs."""
        ...


@dataclass(frozen=True, eq=False)
class Split:
    """Encoded, labelled examples.

    Args:
        inputs: Name to tensor of N rows: ``pixels`` uint8 [N, 3, H, W], or ``input_ids`` and ``attention_mask``
            [N, L].
        labels: [N], class numbers int64, or numbers float32.
        fingerprint: 16 hexadecimal digits of the SHA-256 of the tensors; computed when left out.
    """

    inputs: dict[str, Tensor]
    labels: Tensor
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if not self.fingerprint:
            object.__setattr__(self, "fingerprint", fingerprint(self.inputs | {"labels": self.labels}))

    def __len__(self) -> int:
        return len(self.labels)

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
                self._trimmed({name: value.index_select(0, index) for name, value in self.inputs.items()}),
                self.labels[index],
                index,
            )

    def _order(self) -> Tensor:
        if "attention_mask" not in self.inputs:
            return torch.arange(len(self))
        return self.inputs["attention_mask"].sum(1).argsort(descending=True, stable=True)

    def _trimmed(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        if "attention_mask" not in inputs:
            return inputs
        used = inputs["attention_mask"].bool().any(0).nonzero().flatten()
        if not len(used):
            return inputs
        columns = slice(int(used[0]), int(used[-1]) + 1)
        return {name: value[:, columns] if name in PADDED else value for name, value in inputs.items()}


def fingerprint(tensors: dict[str, Tensor]) -> str:
    """Return 16 hexadecimal digits of the SHA-256 over names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


class Splits(Mapping[str, Split]):
    """A task's splits, encoded for a backbone when they are asked for.

    The test split is the same for every seed; the others are drawn by `seed` from what is left (`byom.data.draw`).
    What was encoded once is read from ``<cache>/data/<signature>-<split>.safetensors``; a damaged file is made again.

    Args:
        task: The task.
        backbone: What encodes raw inputs.
        seed: Which draw.
        cache: The folder of caches.

    Raises:
        DataError: If data is missing, altered or too small for the task.
    """

    def __init__(self, task: Task, backbone: Encoder, seed: int, cache: Path) -> None:
        self.task, self.backbone, self.seed, self.cache = task, backbone, seed, Path(cache)
        self._signature = _signature(task, backbone, seed, self.cache)
        self.read: dict[str, Split] = {}

    def __getitem__(self, name: str) -> Split:
        if name not in SPLITS:
            raise KeyError(name)
        if name not in self.read:
            self.read[name] = self._split(name)
        return self.read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(SPLITS)

    def __len__(self) -> int:
        return len(SPLITS)

    @cached_property
    def draws(self) -> Draws:
        """The examples of every split."""
        return Draws(self.task, self.task.source.pools(self.cache), self.seed)

    def _split(self, name: str) -> Split:
        path = self.cache / "data" / f"{self._signature}-{name}.safetensors"
        split = _open(path)
        if split is None:
            split = self._encode(name)
            _save(path, split)
        return split

    def _encode(self, name: str) -> Split:
        pool_name, index = self.draws[name]
        pool = self.draws.pools[pool_name]
        chunks = [index[start : start + CHUNK] for start in range(0, max(1, len(index)), CHUNK)]
        encoded = [self.backbone.encode([pool.inputs[i] for i in chunk], self.task) for chunk in chunks]
        inputs = {key: torch.cat([part[key] for part in encoded]) for key in encoded[0]}
        return Split(inputs, torch.tensor([self.task.index(pool.labels[i]) for i in index], dtype=_kind(self.task)))


def load(task: Task, backbone: Encoder, seed: int, cache: Path) -> Splits:
    """Return a task's splits: "train", "validation", "test" and "shots"; see `Splits`."""
    return Splits(task, backbone, seed, cache)


def _kind(task: Task) -> torch.dtype:
    return torch.float32 if task.regression else torch.int64


def _signature(task: Task, backbone: Encoder, seed: int, cache: Path) -> str:
    sizes = [task.train, task.validation, task.test, task.shots]
    data = [describe(task.source), task.source.digest(cache), task.name, task.classes, task.labels]
    later = [task.holdout] if task.holdout != "drawn" else []  # what is added later must not encode old data again
    later += [task.metric] if task.regression else []
    return signature(FORMAT, data, sizes, seed, backbone.encoding_for(task), *later, digits=16)


def _save(path: Path, split: Split) -> None:
    tensors = {f"inputs/{key}": value.contiguous() for key, value in split.inputs.items()} | {"labels": split.labels}
    write_bytes(path, save(tensors, metadata={"fingerprint": split.fingerprint}))


def _open(path: Path) -> Split | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            promised = file.metadata()["fingerprint"]
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            labels = tensors.pop("labels")
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None
    split = Split({name.removeprefix("inputs/"): tensor for name, tensor in tensors.items()}, labels)
    return split if split.fingerprint == promised else None
