"""PEFT LoRA adapters as `byom.weights.lowrank.Adapted` weights."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from byom.checkpoint.adapters.config import CONFIG, AdapterConfig
from byom.checkpoint.adapters.contents import PICKLED, SAFE, Layer, equal, read
from byom.checkpoint.adapters.site import found, shift, site, spelling
from byom.errors import CheckpointError
from byom.functional.tensors import wide
from byom.weights import Weights
from byom.weights.fused import Rows
from byom.weights.lowrank import Adapted, Piece

T = TypeVar("T")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as PEFT writes it, not yet bound to a base.

    ``W + s B A`` with ``s = alpha / r`` (rsLoRA: ``alpha / sqrt(r)``), where trained biases and whole modules take the
    place of the base's.

    Args:
        origin: Folder or hub id, for messages.
        config: Its settings.
        layers: Module path to its factors.
        saved: Parameter name to a value that was trained whole: a bias, or of ``modules_to_save``.
        parameters: Number of values in the file, heads included.

    References:
        LoRA: Low-Rank Adaptation of Large Language Models, section 4.1. https://arxiv.org/abs/2106.09685
        A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA. https://arxiv.org/abs/2312.03732

    Differences:
        PEFT merges a difference to one module of a tied pair into the tensor that both share, though in training only
        that module computes with it, and differences to both twice, though each computes with one. Here tied modules
        must be adapted alike, and then the difference is added once.
        PEFT (0.21.2) adds the difference of the output projection of `nn.MultiheadAttention`, adapted as one module,
        twice, in training as in merging (huggingface/peft, pull request 3774). It is followed, for that is the model
        that was trained; of later versions such adapters are refused.
    """

    origin: str
    config: AdapterConfig
    layers: Mapping[str, Layer]
    saved: Mapping[str, Tensor]
    parameters: int

    @classmethod
    def open(cls, path: str | Path, revision: str = "main") -> Adapter:
        """Read an adapter: ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``).

        Args:
            path: The folder that PEFT's ``save_pretrained`` wrote, or the id of one on the hub.
            revision: Commit of a hub id.

        Raises:
            CheckpointError: If it is missing, damaged, cannot be fetched, or is no low-rank difference.
        """
        folder = _folder(path, revision)
        config = AdapterConfig.open(folder)
        contents = read(folder, config)
        return cls(str(path), config, contents.layers, contents.saved, contents.parameters)

    @property
    def rank(self) -> int:
        """The largest rank of a module's factors."""
        return max(layer.rank for layer in self.layers.values())

    def on(self, base: Weights) -> Adapted:
        """Bind the adapter to the model that it was trained on.

        Args:
            base: The model. Its names may start differently, and its attention may be fused, as long as one change
                of the names' start places every adapted module.

        Returns:
            The adapted weights, reading the base one parameter at a time.

        Raises:
            CheckpointError: If the adapter was trained on another base.
        """
        moved = self._shift(base)
        return Adapted(base, self._factored(base, moved), self._replaced(base, moved), self.origin)

    def replaced(self, base: Weights) -> dict[str, Tensor]:
        """Return what takes the place of parameters of the base, by their names; without what equals the base's."""
        return self._replaced(base, self._shift(base))

    def heads(self, base: Weights) -> dict[str, Tensor]:
        """Return what was trained whole and the base has not, by the adapter's names: kept per task, never merged."""
        moved = self._shift(base)
        return {name: value for name, value in self.saved.items() if found(moved(name), base) is None}

    def _shift(self, base: Weights) -> Callable[[str], str]:
        spelled = spelling(base)
        placed = shift([spelled(path) for path in self.layers], base, self.origin, self._other)

        def moved(name: str) -> str:
            return placed(spelled(name))

        for name in self.saved:
            if found(moved(name), base) is None and _within(moved(name), base):
                raise CheckpointError(f"{self.origin} holds '{name}', which {base.origin} has not. {self._other}")
        return moved

    @property
    def _other(self) -> str:
        return f"It was trained on another base: its configuration names {self.config.base!r}. Give that one"

    def _factored(self, base: Weights, moved: Callable[[str], str]) -> dict[str, list[Piece]]:
        sites = {path: rows for path in sorted(self.layers) if (rows := site(moved(path), base))}
        turned = self.config.transposed or any(_is_turned(self.layers[p], _shape(r, base)) for p, r in sites.items())
        factored: dict[str, list[Piece]] = {}
        for path, rows in sites.items():
            piece = Piece(rows.start, *self._sides(path, rows, base, turned))
            self._insert(factored.setdefault(rows.name, []), piece, rows.name)
        factored = {name: sorted(pieces, key=lambda piece: piece.start) for name, pieces in factored.items()}
        return self._untied(factored, base, _alike)

    def _sides(self, path: str, rows: Rows, base: Weights, turned: bool) -> tuple[Tensor, Tensor]:
        """Return ``left [m, r]``, the scale folded in, and ``right [r, n]``.

        Factors of a square matrix fit both ways; then `turned` says whether the base stores ``[in, out]``.
        """
        layer, shape = self.layers[path], _shape(rows, base)
        down, up = wide(layer.down).flatten(1), wide(layer.up).flatten(1)
        upright, across = _fits_upright(layer, shape), _fits_across(layer, shape)
        if across and (turned or not upright):
            return down.T * layer.scale, up.T
        if upright:
            return up * layer.scale, down
        raise CheckpointError(
            f"{self.origin}: the factors of '{path}', {tuple(layer.up.shape)} and {tuple(layer.down.shape)}, do not "
            f"fit {shape} of '{rows.name}' in {base.origin}. {self._other}"
        )

    def _insert(self, there: list[Piece], piece: Piece, name: str) -> None:
        for other in there:
            if piece.start < other.start + len(other.left) and other.start < piece.start + len(piece.left):
                raise CheckpointError(f"{self.origin} adapts rows of '{name}' twice. Merge one of the two first")
        there.append(piece)

    def _untied(self, values: Mapping[str, T], base: Weights, alike: Callable[[T, T], bool]) -> dict[str, T]:
        """Return values by canonical names; what is tied must have one value under all of its names."""
        united = {base.ties.get(name, name): value for name, value in values.items()}
        for name in base:
            first = base.ties.get(name, name)
            if first in united and not (name in values and alike(values[name], united[first])):
                other = next(n for n in values if n != name and base.ties.get(n, n) == first)
                raise CheckpointError(
                    f"{self.origin} trained '{other}' and not '{name}' alike, and they are one tensor in "
                    f"{base.origin}. Untie them in the base (clone one before Weights.of)"
                )
        return united

    def _replaced(self, base: Weights, moved: Callable[[str], str]) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for name, value in self._wholes(base, moved):
            rows = found(moved(name), base)
            if rows is None:
                continue
            if value.shape != _shape(rows, base):
                raise CheckpointError(
                    f"{self.origin}: '{name}' has shape {tuple(value.shape)} and '{rows.name}' of {base.origin} "
                    f"{_shape(rows, base)}. {self._other}"
                )
            values[rows.name] = _written(value, rows, values.get(rows.name, base[rows.name]))
        return self._untied({n: v for n, v in values.items() if not equal(v, base[n])}, base, equal)

    def _wholes(self, base: Weights, moved: Callable[[str], str]) -> Iterator[tuple[str, Tensor]]:
        """Give every value that was trained whole; to the bias of a module, the bias of its factors is added."""
        values = dict(self.saved)
        for path, layer in sorted(self.layers.items()):
            if layer.bias is None:
                continue
            name = f"{path}.bias"
            rows = found(moved(name), base)
            if rows is None:
                raise CheckpointError(
                    f"{self.origin} adds to the bias of '{path}' (lora_bias), which has none in {base.origin}. "
                    f"{self._other}"
                )
            bias = values[name] if name in values else base[rows.name][rows.start : rows.start + rows.height]
            values[name] = wide(bias) + wide(layer.bias) * layer.scale
        yield from sorted(values.items())


def _folder(path: str | Path, revision: str) -> Path:
    if Path(path).is_dir():
        return Path(path)
    if not HUB_ID.fullmatch(str(path)):
        raise CheckpointError(f"{path} is neither a folder nor the id of an adapter on the hub, such as 'name/adapter'")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=[CONFIG, SAFE, PICKLED]))
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise CheckpointError(
            f"{path} is no folder, and the hub gave no such adapter at revision {revision!r}: {reason}. If the hub "
            "cannot be reached, copy the adapter to a folder and give that"
        ) from error


def _fits_upright(layer: Layer, shape: tuple[int, ...]) -> bool:
    return not layer.embedding and shape == (len(layer.up), *layer.down.shape[1:])


def _fits_across(layer: Layer, shape: tuple[int, ...]) -> bool:
    return layer.down.ndim == len(shape) == 2 and shape == (layer.down.shape[1], len(layer.up))


def _is_turned(layer: Layer, shape: tuple[int, ...]) -> bool:
    """Say whether a linear layer's factors show that the base stores its weight as ``[in, out]``."""
    return not layer.embedding and _fits_across(layer, shape) and not _fits_upright(layer, shape)


def _shape(rows: Rows, base: Weights) -> tuple[int, ...]:
    shape = base.shape(rows.name)
    return (rows.height, *shape[1:]) if shape else ()


def _within(name: str, base: Weights) -> bool:
    """Say whether a name belongs to a stack of layers that the base has too, and so should be in the base."""
    stack = re.match(r"(.+?\.)\d+\.", name)
    return stack is not None and any(known.startswith(stack[1]) for known in base)


def _written(value: Tensor, rows: Rows, current: Tensor) -> Tensor:
    """Return a parameter with some of its rows, or all, replaced."""
    if value.shape == current.shape:
        return value
    whole = wide(current).clone()
    whole[rows.start : rows.start + rows.height] = value
    return whole


def _alike(a: Sequence[Piece], b: Sequence[Piece]) -> bool:
    return len(a) == len(b) and all(
        p.start == q.start and equal(p.left, q.left) and equal(p.right, q.right) for p, q in zip(a, b, strict=True)
    )
