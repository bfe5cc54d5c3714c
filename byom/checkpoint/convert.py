"""`byom convert`: a checkpoint of another format as safetensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from byom.checkpoint import Checkpoint, read
from byom.checkpoint.adapters.config import CONFIG
from byom.checkpoint.clip import hugging_face_names, to_hugging_face
from byom.checkpoint.files import open_raw
from byom.errors import OptionError, one_of, suggest
from byom.weights import Spec, Weights

NAMES = ("safetensors", "openclip", "huggingface")
TOWER = "visual."
DTYPES = {
    "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "float64": torch.float64,
}  # fmt: skip


def convert(
    source: Path, target: Path, base: Weights | None = None, to: str = "safetensors", dtype: str = ""
) -> Iterator[str]:
    """Read a checkpoint of any format and write it as safetensors with checksums.

    Args:
        source: The file or folder.
        target: The folder that is written, all or nothing.
        base: A model whose names and shapes the result has; None keeps the names of the file.
        to: ``safetensors`` writes what experts of the backbone hold; ``openclip`` writes an image tower of open_clip
            together with the text left-overs that came with it; ``huggingface`` writes it as transformers'
            `CLIPVisionModelWithProjection` names it.
        dtype: What floating-point tensors are written in, one of `DTYPES`; empty keeps theirs.

    Yields:
        Lines that say what the checkpoint was.

    Raises:
        OptionError: If an option is unknown, or a backbone is needed.
        CheckpointError: If the checkpoint cannot be read, or does not fit.
    """
    if to not in NAMES:
        raise OptionError(f"to={to}; {suggest(to, NAMES)}")
    written = DTYPES[one_of("dtype", dtype, DTYPES)] if dtype else None
    if base is not None:
        yield from _as(source, target, base, to, written)
        return
    if to != "safetensors" or (source / CONFIG).is_file():
        what = f"to={to}" if to != "safetensors" else f"{source}, an adapter,"
        raise OptionError(f"{what} needs like=BACKBONE, for example like=clip_vit_b32")
    raw, container = open_raw(source)
    raw.save(target, dtype=written)
    yield f"{container}: {_size(raw)}, under their own names"


def _as(source: Path, target: Path, base: Weights, to: str, dtype: torch.dtype | None) -> Iterator[str]:
    if to != "safetensors" and not all(hugging_face_names(name.removeprefix(TOWER)) for name in base):
        raise OptionError(f"to={to} is for image towers of open_clip, which {base.origin} is not")
    checkpoint = read(source, base)
    written = _written(checkpoint, to)
    written.save(target, dtype=dtype)
    yield f"{checkpoint.format}: {_size(written)}"
    if checkpoint.frozen:
        counts, done = checkpoint.conventions, "kept" if to == "openclip" else "left out"
        yield f"{done}: {len(checkpoint.frozen)} frozen tensors of a text tower ({counts['with frozen']:,} with them)"
    if checkpoint.extra:
        yield f"left out: tensors of a head ({', '.join(sorted(checkpoint.extra))})"
    yield from checkpoint.notes


def _size(weights: Weights) -> str:
    return f"{len(weights)} tensors, {weights.numel:,} parameters"


def _written(checkpoint: Checkpoint, to: str) -> Weights:
    if to == "huggingface":
        return to_hugging_face(checkpoint.weights, TOWER)
    if to == "openclip" and checkpoint.frozen:
        return _joined(checkpoint.weights, checkpoint.frozen)
    return checkpoint.weights


def _joined(*parts: Weights) -> Weights:
    owner = {name: part for part in parts for name in part}
    specs = {name: Spec(part.shape(name), part.dtype(name)) for name, part in owner.items()}
    return Weights(specs, lambda name: owner[name][name], origin=parts[0].origin)
