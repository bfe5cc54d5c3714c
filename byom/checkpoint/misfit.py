"""Sentences for checkpoints that do not fit a backbone: the cause, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from byom.errors import CheckpointError, listed
from byom.storage import foreign
from byom.weights import Weights
from byom.weights.match import RESIZED, is_resized, partitioned, unwrapped, wrapped_names

OLDER = (".gamma", ".beta", ".weight_g", ".weight_v")


def lacking(raw: Weights, base: Weights, lost: Sequence[str], names: Sequence[str], *, found: bool) -> CheckpointError:
    """Say why a checkpoint lacks tensors of the backbone.

    Args:
        raw: The checkpoint.
        base: The backbone's weights.
        lost: What it lacks.
        names: All tensors of the backbone that it should have.
        found: Whether it has any of them.

    Returns:
        The error.
    """
    if any(unwrapped(name) != name for name in base) and all(unwrapped(name) in raw for name in lost):
        return CheckpointError(f"{raw.origin} has the tensors of {base.origin}, but {wrapped_names(base)}")
    if any(name.endswith(OLDER) for name in raw) and not any(name.endswith(OLDER) for name in base):
        return CheckpointError(
            f"{raw.origin} has names of an older version of transformers or torch and lacks {listed(lost)}: open it "
            "with transformers (from_pretrained) and save it again (save_pretrained)"
        )
    known = "" if found else f"; it has, for example, {listed(raw.keys(), 3)}"
    return CheckpointError(
        f"{raw.origin} lacks {len(lost)} of {len(names)} tensors of {base.origin}: {listed(lost)}{known}. "
        f"{_origin(raw) or 'Choose the backbone that it was made from'}"
    )


def misshapen(raw: Weights, base: Weights, pairs: Sequence[tuple[str, str]]) -> CheckpointError:
    """Say why tensors have other shapes than the backbone's.

    Args:
        raw: The checkpoint.
        base: The backbone's weights.
        pairs: Names in the checkpoint and in the backbone, of the tensors that differ.

    Returns:
        The error.
    """
    theirs, ours = pairs[0]
    empty = [name for name, _ in pairs if raw.shape(name) == (0,)]
    if empty:
        return CheckpointError(f"{raw.origin}: {partitioned(empty[0])}")
    shapes = (
        f"{raw.origin}: '{theirs}' has shape {list(raw.shape(theirs))} where the backbone has {list(base.shape(ours))} "
        f"({len(pairs)} such tensors)"
    )
    if all(is_resized(name, raw.shape(name), base.shape(other)) for name, other in pairs):
        return CheckpointError(f"{shapes}: the vocabularies differ in size. {RESIZED}")
    return CheckpointError(f"{shapes}; choose the backbone of the same size")


def strangers(raw: Weights, unknown: Sequence[str]) -> CheckpointError:
    """Say why a checkpoint holds tensors that neither the backbone nor a head has.

    Args:
        raw: The checkpoint.
        unknown: Their names.

    Returns:
        The error.
    """
    return CheckpointError(
        f"{raw.origin} holds tensors that are neither the backbone's nor a head's: {listed(unknown)}; "
        f"{_origin(raw) or 'choose the backbone that it was made from'}"
    )


def _origin(raw: Weights) -> str | None:
    """Say how such a checkpoint comes about, if its names tell."""
    names = raw.keys()
    if any(".lora_A" in name or ".lora_B" in name or ".base_layer." in name for name in names):
        return (
            "It holds an adapter that was not merged into its layers: save it with PEFT's save_pretrained, or call "
            "merge_and_unload and save the model"
        )
    if any("_flat_param" in name for name in names):
        return "It holds the flat parameters of FSDP: save it with StateDictType.FULL_STATE_DICT"
    if foreign.is_shard(Path(raw.origin).name):
        return "It is one of several shards: give their folder"
    return None
