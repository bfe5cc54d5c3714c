"""`byom convert`: a checkpoint of another format as safetensors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from byom.checkpoint import read
from byom.checkpoint.clip import to_hugging_face
from byom.checkpoint.files import open_raw
from byom.errors import OptionError, suggest
from byom.weights import Weights

NAMES = ("backbone", "huggingface")


def convert(source: Path, target: Path, like: str = "", to: str = "backbone") -> Iterator[str]:
    """Read a checkpoint of any format and write it as safetensors with checksums.

    Args:
        source: The file or folder.
        target: The folder that is written, all or nothing.
        like: An option of ``backbone=`` whose names the result gets; empty keeps the names of the file.
        to: ``backbone`` for the backbone's names, ``huggingface`` for those of transformers' CLIP image tower.

    Yields:
        Lines that say what the checkpoint was.

    Raises:
        OptionError: If an option is unknown.
        CheckpointError: If the checkpoint cannot be read, or does not fit.
    """
    if to not in NAMES:
        raise OptionError(f"to={to}; {suggest(to, NAMES)}")
    if to == "huggingface" and not like:
        raise OptionError("to=huggingface needs like=BACKBONE, for example like=clip_vit_b32")
    if not like:
        raw, container = open_raw(source)
        raw.save(target)
        yield f"{container}: {len(raw)} tensors, {raw.numel:,} parameters, under their own names"
        return
    checkpoint = read(source, pretrained(like))
    written = to_hugging_face(checkpoint.weights) if to == "huggingface" else checkpoint.weights
    written.save(target)
    counts = checkpoint.conventions
    yield f"{checkpoint.format}: {len(written)} tensors, {counts['encoder']:,} parameters"
    if checkpoint.frozen:
        yield f"left out: {len(checkpoint.frozen)} frozen tensors of a text tower ({counts['with frozen']:,} with them)"
    if checkpoint.extra:
        yield f"left out: tensors of a head ({', '.join(sorted(checkpoint.extra))})"
    yield from checkpoint.notes


def pretrained(option: str) -> Weights:
    """Return the pre-trained weights of a backbone option, in the names that experts of it have."""
    from byom import config

    encoder = config.option("backbone", option).load()
    return Weights.of(encoder.state_dict(), origin=f"backbone={option}")
