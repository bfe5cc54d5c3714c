"""From a task to encoded examples: drawn by seed, free of leaks, cached and fingerprinted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from byom.draw import draw
from byom.signature import describe, signature
from byom.source.base import Pool
from byom.source.root import write_atomically
from byom.suite import Task

FORMAT = 1
CHUNK = 64
PADDED = ("input_ids", "attention_mask", "token_type_ids")


class Encoder(Protocol):
    """What this module asks of a backbone."""

    @property
    def encoding(self) -> Any:
        """Describe the encoding in JSON values: tokenizer and length, or resolution and cropping."""
        ...

    def encode(self, inputs: list[Any]) -> dict[str, Tensor]:
        """Turn N raw inputs into tensors of N rows whose other sizes do not depend on the inputs."""
        ...


@dataclass(frozen=True, eq=False)
class Split:
    """Encoded, labelled examples.

    Args:
        inputs: Name to tensor of N rows: ``pixels`` uint8 [N, 3, H, W], or ``input_ids`` and ``attention_mask``
            [N, L].
        labels: int64 [N], class numbers.
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
                self._trimmed({name: value[index] for name, value in self.inputs.items()}),
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


def load(task: Task, backbone: Encoder, seed: int, cache: Path) -> dict[str, Split]:
    """Return a task's splits, encoded for a backbone.

    The test split is the same for every seed; the others are drawn by `seed` from what is left (`byom.draw`).
    What was encoded once is read from ``<cache>/data/<signature>.safetensors``; a damaged file is made anew.

    Args:
        task: The task.
        backbone: What encodes raw inputs.
        seed: Which draw.
        cache: The folder of caches.

    Returns:
        "train", "validation", "test" and "shots" (`task.shots` examples of each class, in the order of the classes).

    Raises:
        DataError: If data is missing, altered or too small for the task.
    """
    key = _signature(task, backbone, seed, cache)
    path = Path(cache) / "data" / f"{key}.safetensors"
    splits = _open(path)
    if splits is None:
        splits = _encode(task, backbone, seed, cache)
        _save(path, splits)
    return splits


def _signature(task: Task, backbone: Encoder, seed: int, cache: Path) -> str:
    sizes = [task.train, task.validation, task.test, task.shots]
    data = [describe(task.source), task.source.digest(cache), task.name, task.classes, task.labels]
    return signature(FORMAT, data, sizes, seed, backbone.encoding, digits=16)


def _encode(task: Task, backbone: Encoder, seed: int, cache: Path) -> dict[str, Split]:
    pools = task.source.pools(cache)
    chosen = draw(task, pools, seed)
    return {name: _split(task, pools[pool], index, backbone) for name, (pool, index) in chosen.items()}


def _split(task: Task, pool: Pool, index: Sequence[int], backbone: Encoder) -> Split:
    chunks = [index[start : start + CHUNK] for start in range(0, len(index), CHUNK)]
    encoded = [backbone.encode([pool.inputs[i] for i in chunk]) for chunk in chunks]
    inputs = {name: torch.cat([part[name] for part in encoded]) for name in encoded[0]}
    return Split(inputs, torch.tensor([task.index(pool.labels[i]) for i in index]))


def _save(path: Path, splits: dict[str, Split]) -> None:
    tensors = {f"{name}/inputs/{key}": value for name, split in splits.items() for key, value in split.inputs.items()}
    tensors |= {f"{name}/labels": split.labels for name, split in splits.items()}
    prints = {name: split.fingerprint for name, split in splits.items()}
    content = save({k: v.contiguous() for k, v in tensors.items()}, metadata={"fingerprints": json.dumps(prints)})
    write_atomically(path, content)


def _open(path: Path) -> dict[str, Split] | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            prints = json.loads(file.metadata()["fingerprints"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None
    if any(f"{name}/labels" not in tensors for name in prints):
        return None
    splits = {name: _unpack(name, tensors) for name in prints}
    return splits if all(split.fingerprint == prints[name] for name, split in splits.items()) else None


def _unpack(name: str, tensors: dict[str, Tensor]) -> Split:
    prefix = f"{name}/inputs/"
    inputs = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    return Split(inputs, tensors[f"{name}/labels"])
