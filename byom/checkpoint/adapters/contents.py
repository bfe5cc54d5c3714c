"""The tensors of a PEFT LoRA adapter, sorted into factors by module and values that were trained whole."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from byom.checkpoint.adapters.config import INNER, PICKLED, ROOT, SAFE, AdapterConfig
from byom.checkpoint.plain import load, require_dense
from byom.errors import CheckpointError, listed
from byom.functional.tensors import finite
from byom.storage import foreign
from byom.storage import tensor_files as storage
from byom.weights.match import partitioned

FACTOR = re.compile(
    r"(?P<module>.+)\.lora_(?P<side>embedding_A|embedding_B|A|B)"
    r"(?:\.(?!(?:weight|bias)$)[^.]+)?(?:\.(?P<kind>weight|bias))?"  # the adapter's name, where it was left in
)
WRAPPED = re.compile(r"^module\.(?=base_model\.)|(?:^|(?<=\.))_(?:orig_mod|(?:fsdp|checkpoint)_wrapped_module)\.")
"""What wrappers of modules put into names."""
UNUSED = re.compile(r"\.original_module\.|\.lora_velora_embed(\.|$)")
"""Entries that no forward pass reads: weights that a module trained whole replaced, VeLoRA's projections."""

EMBEDDINGS = ("embed_tokens", "lm_head")  # written by PEFT where a vocabulary was resized, unasked
_AGAIN = "Fetch or save the adapter again"
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Factors(NamedTuple):
    """The adapter of one module: ``W + scale * up @ down``.

    Args:
        down: ``[r, *rest of W]`` (A).
        up: ``[out, r]``, followed by ones for a convolution (B).
        bias: ``[out]``, added to the module's bias times the scale; mostly None.
        scale: s.
        embedding: Whether W is a table ``[words, out]``, to which ``scale * (up @ down)ᵀ`` is added.
    """

    down: Tensor
    up: Tensor
    bias: Tensor | None
    scale: float
    embedding: bool

    @property
    def rank(self) -> int:
        """Columns of `up` (r)."""
        return len(self.down)


class Contents(NamedTuple):
    """Contents of an adapter's file.

    Args:
        file: The file.
        layers: Module path to its factors.
        saved: Parameter name to what was trained whole.
        parameters: Number of values in the file.
    """

    file: Path
    layers: Mapping[str, Factors]
    saved: Mapping[str, Tensor]
    parameters: int


def read(folder: Path, config: AdapterConfig) -> Contents:
    """Read and check an adapter's tensors.

    Args:
        folder: What PEFT's ``save_pretrained`` wrote.
        config: Its configuration.

    Raises:
        CheckpointError: If the file is missing, damaged or incomplete, or disagrees with the configuration.
    """
    file, tensors = _stored(folder)
    parts: dict[str, dict[str, Tensor]] = {}
    saved: dict[str, Tensor] = {}
    for key, tensor in sorted(tensors.items()):
        if UNUSED.search(key):
            continue
        _require_finite(file, key, tensor)
        name = WRAPPED.sub("", key)
        module, side = _factor(name.removeprefix(ROOT))
        _put(file, parts.setdefault(module, {}) if side else saved, side or _plain(name), key, tensor)
    layers = _layers(file, parts, config)
    if emptied := [name for name in saved if saved[name].shape == (0,)]:
        raise CheckpointError(f"{file}: {partitioned(emptied[0])}")
    if unknown := [name for name in saved if not _known(name, config, layers)]:
        raise CheckpointError(
            f"{file} holds tensors that are neither LoRA factors nor trained biases nor of modules_to_save: "
            f"{listed(unknown)}. Save the adapter again with a configuration that names them, or leave them out"
        )
    return Contents(file, layers, saved, sum(tensor.numel() for tensor in tensors.values()))


def _stored(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    if (folder / SAFE).is_file():
        files = storage.TensorFiles(folder / SAFE)
        return folder / SAFE, {name: files.read(name) for name in files.specs}
    if (folder / PICKLED).is_file():
        return folder / PICKLED, _unpickled(folder / PICKLED)
    raise CheckpointError(
        f"{folder} has neither {SAFE} nor {PICKLED}; give the folder that PEFT's save_pretrained wrote"
    )


def _unpickled(file: Path) -> dict[str, Tensor]:
    try:
        tensors = load(file)
    except Exception as error:  # of any kind, on files that are damaged or made to mislead it
        if why := foreign.cause(file):
            raise CheckpointError(f"{file} {why}") from error
        why = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{file} is damaged or holds more than tensors ({why}). Fetch or save it again"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise CheckpointError(f"{file} holds something else than named tensors. Save the adapter again as {SAFE}")
    require_dense(file, tensors)
    return {str(name): tensor for name, tensor in tensors.items()}


def _factor(name: str) -> tuple[str, str]:
    """Return a factor's module, as PEFT nests it, and ``A``, ``B`` or their kin; no side for other tensors."""
    match = FACTOR.fullmatch(name)
    if not match:
        return "", ""
    side, kind = match["side"], match["kind"]
    fits = {"A": "weight", "B": "weight", "embedding_A": None, "embedding_B": None}[side] == kind
    return (match["module"], side) if fits else (match["module"], "bias") if (side, kind) == ("B", "bias") else ("", "")


def _plain(key: str) -> str:
    """Return the name that a parameter had before PEFT wrapped its module."""
    return re.sub(r"\.modules_to_save(\.default)?(?=\.)", "", key.removeprefix(ROOT).replace(f"{INNER}.", "."))


def _put(file: Path, where: dict[str, Tensor], name: str, key: str, tensor: Tensor) -> None:
    if name in where and not equal(where[name], tensor):  # a trained bias may be written under two names
        raise CheckpointError(
            f"{file}: '{key}' is there twice with different values, once under another adapter's name. "
            "Save one adapter per file"
        )
    where[name] = tensor


def _layers(file: Path, parts: Mapping[str, Mapping[str, Tensor]], config: AdapterConfig) -> dict[str, Factors]:
    layers: dict[str, Factors] = {}
    for module, sides in parts.items():
        path = module.replace(f"{INNER}.", ".")
        if path in layers:
            raise CheckpointError(f"{file} adapts '{path}' twice. Save one adapter per file")
        layers[path] = _layer(f"{file}: '{path}'", sides, config, module)
    if not layers:
        raise CheckpointError(f"{file} holds no LoRA factors (lora_A, lora_B). Give a LoRA adapter")
    return layers


def _layer(where: str, parts: Mapping[str, Tensor], config: AdapterConfig, module: str) -> Factors:
    path, within, _ = module.partition(f"{INNER}.")  # attention as one module names its output projection's rank, too
    embedding = any(side.startswith("embedding") for side in parts)
    names = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    if lost := [name for name in names if name not in parts]:
        raise CheckpointError(f"{where} has no lora_{lost[0]}: the file is incomplete. {_AGAIN}")
    down, up = parts[names[0]], parts[names[1]]
    _require_factors(where, down, up)
    if len(down) != up.shape[1]:
        raise CheckpointError(
            f"{where} has {len(down)} rows in lora_A {tuple(down.shape)} and {up.shape[1]} columns in lora_B "
            f"{tuple(up.shape)}, which must be the same rank (grouped convolutions are not read). {_AGAIN}"
        )
    if len(down) != config.rank_of(path):
        raise CheckpointError(
            f"{where} has rank {len(down)}, and {config.origin} says {config.rank_of(path)} (r, rank_pattern), on "
            "which its scale depends. Take both files from the same adapter"
        )
    # PEFT computes, and so trains, with twice the difference of an output projection within attention as one module
    scale = config.scale_of(path) * (config.doubled(path) if within else 1)
    return Factors(down, up, parts.get("bias"), scale, embedding)


def _require_factors(where: str, down: Tensor, up: Tensor) -> None:
    for factor in (down, up):
        shape = tuple(factor.shape)
        if factor.dtype not in DTYPES:
            raise CheckpointError(f"{where} has factors in {factor.dtype}; save them in fp16, bf16 or fp32")
        if factor.ndim < 2 or not factor.numel():
            raise CheckpointError(
                f"{where} has a factor of shape {shape}, as training with partitioned weights (ZeRO-3, FSDP) leaves "
                "them. Gather the weights before you save the adapter"
            )
    if any(size != 1 for size in up.shape[2:]):
        raise CheckpointError(f"{where} has lora_B of shape {tuple(up.shape)}, which must end in ones. {_AGAIN}")


def _require_finite(file: Path, key: str, tensor: Tensor) -> None:
    if tensor.is_floating_point() and tensor.numel() and not finite(tensor):
        raise CheckpointError(
            f"{file}: tensor '{key}' has values that are NaN or infinite; merging would spread them. "
            "Use an adapter from before training diverged"
        )


def _known(name: str, config: AdapterConfig, layers: Mapping[str, Factors]) -> bool:
    module, _, kind = name.rpartition(".")
    if (kind == "bias" and config.bias != "none") or (kind == "weight" and module in layers):
        return True
    if kind == "weight" and module.rpartition(".")[2] in EMBEDDINGS:
        return True
    return any(path.endswith(config.whole) for path in _above(name))


def _above(name: str) -> Iterator[str]:
    return accumulate(name.split(".")[:-1], lambda path, part: f"{path}.{part}")


def equal(a: Tensor, b: Tensor) -> bool:
    """Say whether two tensors have one shape and, whatever their dtypes, the same values."""
    return a.shape == b.shape and bool((a == b).all())
