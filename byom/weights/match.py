"""Checks that models belong together, with the cause where they do not, and what they may differ in."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from byom.errors import CheckpointError, WeightsMismatch, listed
from byom.functional.tensors import wide
from byom.weights.spec import Tensors, W
from byom.weights.ties import together

BUFFERS = (
    "position_ids", "token_type_ids", "attn_mask", "inv_freq", "masked_bias", "relative_position_index",
    "relative_coords_table", "num_batches_tracked", "cos_cached", "sin_cached",
)  # fmt: skip
"""Ends of names of what is computed, not learned."""
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_fpw_module")
"""Parts of names that DistributedDataParallel, torch.compile, FSDP and activation checkpointing put in."""
_WRAPPED = re.compile(rf"(?:^|(?<=\.))(?:{'|'.join(WRAPPERS)})\.")

_TABLES = re.compile(r"embed|wte|shared|lm_head|decoder|word|token|vocab|predictions")
_POSITIONS = re.compile(r"position|pos_embed|wpe")
LOGITS = "logits_bias"
"""End of the names of what is added to the scores of a vocabulary, ``[1, V]`` in BART and its kin."""
RESIZED = (
    "One of them was resized, or has tokens of its own: give both the same rows (in transformers, "
    "model.resize_token_embeddings(rows), then save), or cut the rows that were added"
)
ADAPTER = "Read its folder, with adapter_config.json in it, on its base: byom.Adapter.open(folder).on(base)"
PLAIN = "Load the models without quantisation (transformers: model.dequantize()) and save them in fp16, bf16 or fp32"


def is_buffer(name: str, shape: tuple[int, ...]) -> bool:
    """Say whether a tensor is computed, by its name; GPT-2's causal masks are called as biases are, with 4 axes."""
    return name.endswith(BUFFERS) or (name.endswith("attn.bias") and len(shape) == 4)


def may_be_mask(name: str, shape: tuple[int, ...]) -> bool:
    """Say whether a tensor may be a mask: it is called so, or is no weight and a square for all or for each head."""
    last = name.rpartition(".")[2]
    square = len(shape) > 1 and shape[-1] == shape[-2] and (set(shape[:-2]) <= {1} or "bias" in last)
    return "mask" in last or last.endswith(LOGITS) or (square and not last.endswith("weight"))


def fits(name: str, a: Tensors, b: Tensors) -> bool:
    """Say whether `b` has a tensor of `a` in its shape; a buffer may be missing there, or have another."""
    return name in b and a.shape(name) == b.shape(name)


def unwrapped(name: str) -> str:
    """Return a name without the parts that wrappers of modules put in."""
    return _WRAPPED.sub("", name)


def require_match(a: Tensors, b: Tensors) -> None:
    """Check that two sets of weights have the same names and shapes; buffers that are computed may differ.

    Raises:
        WeightsMismatch: With the names that only one has, or the first shapes that differ.
    """
    ours, theirs = _learned(a), _learned(b)
    missing, extra = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
    if missing or extra:
        raise WeightsMismatch(_names_differ(a, b, missing, extra))
    if shapes := [name for name in ours if a.shape(name) != b.shape(name)]:
        raise WeightsMismatch(_shapes_differ(a, b, shapes))
    for name in ours:
        require_kind(a, name, b, name)


def matched(*models: W) -> tuple[W, ...]:
    """Return models of the same names and shapes with the same ties; see `byom.weights.ties.together`.

    Raises:
        WeightsMismatch: If names, shapes or devices differ.
    """
    for other in models[1:]:
        require_match(models[0], other)
        require_one_place(models[0], other)
    return together(*models)


def require_one_place(a: Tensors, b: Tensors) -> None:
    """Check that each tensor lies on the same device in two sets of weights, as far as that is known without reading.

    Raises:
        WeightsMismatch: Saying which lies where.
    """
    for name in a.mergeable():
        ours, theirs = a.place(name), b.place(name) if name in b else None
        if ours is not None and theirs is not None and ours != theirs:
            raise WeightsMismatch(apart(name, (a.origin, ours), (b.origin, theirs)))


def apart(name: str, one: tuple[str, torch.device], other: tuple[str, torch.device]) -> str:
    """Say that two models have a tensor on different devices, and what to do."""
    return (
        f"'{name}' lies on {one[1]} in {one[0]} and on {other[1]} in {other[0]}; models that are computed with lie on "
        f"one device. Load both onto one, or move one: byom.weights.placed(weights, '{one[1]}')"
    )


def require_kind(a: Tensors, ours: str, b: Tensors, theirs: str) -> None:
    """Refuse a tensor of fractions where the other model has whole or complex numbers; counters and buffers may differ.

    Raises:
        WeightsMismatch: Naming the tensor.
    """
    one, other = _kind(a.dtype(ours)), _kind(b.dtype(theirs))
    shape = a.shape(ours)
    if one != other and shape and not is_buffer(ours, shape):
        raise WeightsMismatch(
            f"'{theirs}' holds {other} in {b.origin} ({b.dtype(theirs)}) and {one} in {a.origin} ({a.dtype(ours)}), as "
            f"when one of them is quantised. {PLAIN}"
        )


def require_alike(name: str, one: tuple[str, Tensor], other: tuple[str, Callable[[], Tensor]]) -> Tensor:
    """Refuse different values of a tensor that has no average: a matrix of whole numbers, or complex numbers.

    Args:
        name: The tensor's name.
        one: What a model is called, and its value.
        other: The same of another model; its value is read if it matters.

    Returns:
        The value.

    Raises:
        CheckpointError: Naming the two models.
    """
    value = one[1]
    if has_no_average(name, tuple(value.shape), value.dtype) and not torch.equal(value, other[1]()):
        raise CheckpointError(_unlike(name, value.dtype, one[0], other[0]))
    return value


def not_finite(origin: str, name: str, tensor: Tensor) -> str:
    """Say which values of a tensor are not finite, and what to do."""
    values = wide(tensor)
    bad = int((~values.isfinite()).sum())
    constant = "; or, if it is a constant such as a mask, leave it out of all models with select(lambda name: ...)"
    return (
        f"{origin}: tensor '{name}' has {bad} of {tensor.numel()} values that are NaN or infinite; merging would "
        f"spread them. Use a checkpoint from before training diverged{'' if values.isnan().any() else constant}"
    )


def has_no_average(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Say whether a tensor holds what models learn in a form that cannot be averaged, so that it must not differ."""
    if dtype.is_complex:
        return True
    return not dtype.is_floating_point and len(shape) > 1 and not is_buffer(name, shape)


def _unlike(name: str, dtype: torch.dtype, one: str, other: str) -> str:
    kind = str(dtype).removeprefix("torch.")
    what = "complex numbers" if dtype.is_complex else "whole numbers, as of a quantised checkpoint,"
    remedy = "Split it into real and imaginary part (torch.view_as_real) in every model" if dtype.is_complex else PLAIN
    return f"{one} and {other} differ in '{name}' ({kind}): {what} cannot be merged, and one would be lost. {remedy}"


def _kind(dtype: torch.dtype) -> str:
    return "complex numbers" if dtype.is_complex else "fractions" if dtype.is_floating_point else "whole numbers"


def _learned(weights: Tensors) -> list[str]:
    return [name for name in weights if not is_buffer(name, weights.shape(name))]


def _names_differ(a: Tensors, b: Tensors, missing: list[str], extra: list[str]) -> str:
    both = f"{a.origin} and {b.origin}"
    for one in (a, b):
        if any(".lora_A." in name for name in one):
            return f"{one.origin} holds the factors of an adapter, not whole weights. {ADAPTER}"
        if any(unwrapped(name) != name for name in one) and _same_unwrapped(missing, extra):
            return f"{both} have the same tensors, but {wrapped_names(one)}"
    if start := _starts(missing, extra):
        rest = listed(sorted(set(_rest(missing, start[0], extra, start[1]))))
        words = [f"'{part}' in {one.origin}" for one, part in ((a, start[0]), (b, start[1])) if part]
        return (
            f"{both} have the same tensors under names that start differently: with {' and with '.join(words)}"
            f"{f' (only one has {rest})' if rest != 'none' else ''}. {_stripping(*start, apart=not set(a) & set(b))}"
        )
    return (
        f"{both} have different tensors: {listed(missing)} only in the first, "
        f"{listed(extra)} only in the second. Merge checkpoints of one architecture, without heads"
    )


def wrapped_names(weights: Tensors) -> str:
    """Say which parts of names a wrapper of the module has put in, and how to remove them."""
    words = sorted({part for name in weights for part in _WRAPPED.findall(name)})
    return (
        f"in {weights.origin} their names have {listed(words)} in them, which a wrapper of the module has put there. "
        f"Remove it: {_renaming(words, weights)}"
    )


def _same_unwrapped(missing: list[str], extra: list[str]) -> bool:
    return {unwrapped(name) for name in missing} == {unwrapped(name) for name in extra}


def _renaming(words: list[str], names: Iterable[str]) -> str:
    steps = ""
    for word in words:
        inside = any(f".{word}" in name for name in names)  # only then: 'module.' ends other words, too
        steps += f".replace({word!r}, '')" if inside else f".removeprefix({word!r})"
    return f"Weights.of({{name{steps}: tensor for name, tensor in weights.state().items()}})"


def _stripping(ours: str, theirs: str, *, apart: bool) -> str:
    """Return how names are changed, of which none (`apart`) or some agree already."""
    added = f"{ours!r} + " if ours and theirs else ""
    removed = theirs or ours
    changed = f"{added}name.removeprefix({removed!r})"
    if not apart:
        changed = f"{changed} if name.startswith({removed!r}) else name"
    read = ", or read it with byom.read_checkpoint(path, base), which finds them" if apart else ""
    return (
        f"Give one the other's names, Weights.of({{{changed}: tensor for name, tensor in weights.state().items()}})"
        f"{read}; leave heads out with select"
    )


def _starts(missing: list[str], extra: list[str]) -> tuple[str, str] | None:
    """Return the starts by which most names of the smaller set become names of the other."""
    least = (min(len(missing), len(extra)) + 1) // 2
    candidates = {pair for name in missing[:8] for pair in _pairs(name, extra)}
    others, best = set(extra), (0, ("", ""))
    for start in sorted(candidates, key=lambda pair: (len(pair[0]) + len(pair[1]), pair)):
        fitting = sum(name.startswith(start[0]) and start[1] + name[len(start[0]) :] in others for name in missing)
        if fitting > best[0]:
            best = (fitting, start)
    return best[1] if best[0] and best[0] >= least else None


def _pairs(name: str, extra: list[str]) -> Iterator[tuple[str, str]]:
    """Yield the starts in which a name may differ from one of the others, behind which two parts or all of it agree."""
    parts = name.split(".")
    for cut in range(len(parts)):
        tail = ".".join(parts[cut:])
        start = name.removesuffix(tail)
        for other in extra:
            if other.endswith(f".{tail}") and (not start or len(parts) - cut > 1):
                yield start, other.removesuffix(tail)
            elif other == tail and start:
                yield start, ""


def _rest(missing: list[str], ours: str, extra: list[str], theirs: str) -> Iterator[str]:
    moved = {theirs + name[len(ours) :] for name in missing if name.startswith(ours)}
    back = {ours + name[len(theirs) :] for name in extra if name.startswith(theirs)}
    yield from (name for name in missing if name not in back)
    yield from (name for name in extra if name not in moved)


def _shapes_differ(a: Tensors, b: Tensors, names: list[str]) -> str:
    if emptied := [(one, name) for name in names for one in (a, b) if one.shape(name) == (0,)]:
        return f"{emptied[0][0].origin}: {partitioned(emptied[0][1])}"
    both = f"{a.origin} and {b.origin}"
    shapes = listed(f"'{name}' {a.shape(name)} and {b.shape(name)}" for name in names)
    if all(is_resized(name, a.shape(name), b.shape(name)) for name in names):
        return f"{both} have vocabularies of different size: {shapes}. {RESIZED}"
    if all(_POSITIONS.search(name) for name in names):
        return f"{both} have different numbers of positions: {shapes}. Merge models of one context length or image size"
    return f"{both} have tensors of different shape: {shapes}. Exclude task heads, and choose a base of the same size"


def is_resized(name: str, a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    """Say whether a table, or what is computed with it, differs in its number of rows alone, as vocabularies do."""
    if name.endswith(LOGITS):
        return len(a) == len(b) > 0 and a[:-1] == b[:-1] and 0 not in (a[-1], b[-1])
    table = _TABLES.search(name) and not _POSITIONS.search(name)
    return bool(table) and len(a) == len(b) > 0 and a[1:] == b[1:] and 0 not in (a[0], b[0])


def partitioned(name: str) -> str:
    """Say why a tensor is empty, and what to do."""
    return (
        f"'{name}' is empty (shape [0]), as ZeRO-3 and FSDP leave what they split. Gather the weights before saving "
        "(stage3_gather_16bit_weights_on_model_save, or zero_to_fp32.py on the run's folder) and save again"
    )
