"""PEFT LoRA adapters as `byom.weights.lowrank.Adapted` weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from byom.checkpoint.adapters.config import CONFIG, PICKLED, SAFE, AdapterConfig
from byom.checkpoint.adapters.contents import Factors, equal, read
from byom.checkpoint.adapters.misfit import VOCABULARY, misfit
from byom.checkpoint.adapters.site import parameter_rows, shift, site, spelling
from byom.errors import CheckpointError
from byom.functional.tensors import wide
from byom.weights import Weights
from byom.weights.fused import Rows
from byom.weights.lowrank import Adapted, Piece
from byom.weights.match import is_resized

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
    layers: Mapping[str, Factors]
    saved: Mapping[str, Tensor]
    parameters: int

    @classmethod
    def open(cls, path: str | Path, revision: str = "main") -> Adapter:
        """Read an adapter: ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``).

        Args:
            path: The folder that PEFT's ``save_pretrained`` wrote, or the id of one on the hub.
            revision: Commit of a hub id.

        Raises:
            CheckpointError: If it is missing, damaged, cannot be fetched, or is not a low-rank difference.
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
        placed = Placed(self, base)
        return Adapted(base, placed.pieces(), placed.values(), self.origin)

    def replaced(self, base: Weights) -> dict[str, Tensor]:
        """Return what takes the place of parameters of the base, by their names; without what equals the base's."""
        return Placed(self, base).values()

    def heads(self, base: Weights) -> dict[str, Tensor]:
        """Return what was trained whole and is not in the base, by the adapter's names: kept per task, never merged."""
        return Placed(self, base).heads()


class Placed:
    """An adapter on the base that it was trained on.

    Args:
        adapter: The adapter.
        base: The model.

    Attributes:
        names: Name in the adapter, of an adapted module or of a parameter, to its name in the base. A head's name leads
            to no parameter.

    Raises:
        CheckpointError: If the adapter was trained on another base.
    """

    def __init__(self, adapter: Adapter, base: Weights) -> None:
        self.adapter, self.base = adapter, base
        self._remedy = f"It was trained on another base: its configuration names {adapter.config.base!r}. Give that one"
        spelled = spelling(base)
        moved = shift([spelled(path) for path in adapter.layers], base, adapter.origin, self._remedy)
        biases = [f"{path}.bias" for path in adapter.layers]
        self.names = {name: moved(spelled(name)) for name in (*adapter.layers, *biases, *adapter.saved)}
        for name in adapter.saved:
            if parameter_rows(self.names[name], base) is None and _within(self.names[name], base):
                raise CheckpointError(
                    f"{adapter.origin} holds '{name}', which {base.origin} does not have. {self._remedy}"
                )

    def pieces(self) -> dict[str, list[Piece]]:
        """Return the low-rank differences of the base's parameters, by canonical name and in the order of their rows.

        Raises:
            CheckpointError: If factors do not fit a parameter, adapt its rows twice, or adapt tied ones differently.
        """
        layers, base = self.adapter.layers, self.base
        sites = {path: rows for path in sorted(layers) if (rows := site(self.names[path], base))}
        turned = self.adapter.config.transposed or any(_is_turned(layers[p], _shape(r, base)) for p, r in sites.items())
        pieces: dict[str, list[Piece]] = {}
        for path, rows in sites.items():
            piece, others = Piece(rows.start, *self._sides(path, rows, turned)), pieces.setdefault(rows.name, [])
            if any(p.start < piece.start + rows.height and piece.start < p.start + len(p.left) for p in others):
                raise CheckpointError(
                    f"{self.adapter.origin} adapts rows of '{rows.name}' twice. Merge one of the two first"
                )
            others.append(piece)
        return self._untied({name: sorted(each, key=lambda piece: piece.start) for name, each in pieces.items()})

    def values(self) -> dict[str, Tensor]:
        """Return what was trained whole, by canonical names of the base; without what equals the base's.

        Raises:
            CheckpointError: If a value does not fit its parameter, or tied parameters have different ones.
        """
        values: dict[str, Tensor] = {}
        for name, value in sorted({**self.adapter.saved, **self._biases()}.items()):
            rows = parameter_rows(self.names[name], self.base)
            if rows is None:
                continue
            if (shape := tuple(value.shape)) != _shape(rows, self.base):
                raise CheckpointError(
                    misfit(self.adapter.origin, name, shape, self.base.origin, _shape(rows, self.base), self._remedy)
                )
            values[rows.name] = _written(value, rows, values.get(rows.name, self.base[rows.name]))
        return self._untied({name: value for name, value in values.items() if not equal(value, self.base[name])})

    def heads(self) -> dict[str, Tensor]:
        """Return what was trained whole and is not in the base, by the adapter's names."""
        saved = self.adapter.saved
        return {name: value for name, value in saved.items() if parameter_rows(self.names[name], self.base) is None}

    def _biases(self) -> dict[str, Tensor]:
        """Return the biases of modules whose factors have one: the trained or the base's, plus that of the factors."""
        biases: dict[str, Tensor] = {}
        for path, factors in sorted(self.adapter.layers.items()):
            if factors.bias is None:
                continue
            name = f"{path}.bias"
            rows = parameter_rows(self.names[name], self.base)
            if rows is None:
                raise CheckpointError(
                    f"{self.adapter.origin} adds to the bias of '{path}' (lora_bias), which has none in "
                    f"{self.base.origin}. {self._remedy}"
                )
            saved = self.adapter.saved.get(name)
            bias = self.base[rows.name][rows.start : rows.start + rows.height] if saved is None else saved
            biases[name] = wide(bias) + wide(factors.bias) * factors.scale
        return biases

    def _sides(self, path: str, rows: Rows, turned: bool) -> tuple[Tensor, Tensor]:
        """Return ``left [m, r]``, the scale folded in, and ``right [r, n]``.

        Factors of a square matrix fit both ways; then `turned` says whether the base stores ``[in, out]``.
        """
        factors, shape = self.adapter.layers[path], _shape(rows, self.base)
        down, up = wide(factors.down).flatten(1), wide(factors.up).flatten(1)
        upright, across = _fits_upright(factors, shape), _fits_across(factors, shape)
        if across and (turned or not upright):
            return down.T * factors.scale, up.T
        if upright:
            return up * factors.scale, down
        product = (len(factors.up), *factors.down.shape[1:])[:: -1 if factors.embedding else 1]
        resized = is_resized(rows.name, product, shape) or is_resized(rows.name, product[::-1], shape)
        raise CheckpointError(
            f"{self.adapter.origin}: the factors of '{path}', {tuple(factors.up.shape)} and "
            f"{tuple(factors.down.shape)}, do not fit {shape} of '{rows.name}' in {self.base.origin}. "
            f"{VOCABULARY if resized else self._remedy}"
        )

    def _untied(self, values: Mapping[str, T]) -> dict[str, T]:
        """Return values by canonical names; what is tied must have one value under all of its names."""
        base = self.base
        united = {base.ties.get(name, name): value for name, value in values.items()}
        for name in base:
            first = base.ties.get(name, name)
            if first in united and not (name in values and _alike(values[name], united[first])):
                other = next(n for n in values if n != name and base.ties.get(n, n) == first)
                raise CheckpointError(
                    f"{self.adapter.origin} trained '{other}' and not '{name}' alike, and they are one tensor in "
                    f"{base.origin}. Untie them in the base (base.untied()), or save it with tie_word_embeddings=False"
                )
        return united


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
            f"{path} is not a folder, and the hub gave no such adapter at revision {revision!r}: {reason}. If the hub "
            "cannot be reached, copy the adapter to a folder and give that"
        ) from error


def _fits_upright(factors: Factors, shape: tuple[int, ...]) -> bool:
    return not factors.embedding and shape == (len(factors.up), *factors.down.shape[1:])


def _fits_across(factors: Factors, shape: tuple[int, ...]) -> bool:
    return factors.down.ndim == len(shape) == 2 and shape == (factors.down.shape[1], len(factors.up))


def _is_turned(factors: Factors, shape: tuple[int, ...]) -> bool:
    """Say whether a linear layer's factors show that the base stores its weight as ``[in, out]``."""
    return not factors.embedding and _fits_across(factors, shape) and not _fits_upright(factors, shape)


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


def _alike(a: Any, b: Any) -> bool:
    """Say whether two tensors, or two lists of pieces, are equal."""
    if isinstance(a, Tensor):
        return equal(a, b)
    return a == b if isinstance(a, int) else len(a) == len(b) and all(map(_alike, a, b))
