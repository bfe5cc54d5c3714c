"""Sparse patches: the values in which a model differs from another, in the format of weight updates for servers.

One safetensors file holds ``{name}.indices``, flat positions in int32, and ``{name}.values``, the new values at them in
the parameter's own dtype: they are assigned, not added. Parameters that do not differ are left out. The header says
``sparse: True``. It is the form in which reinforcement learning sends changed weights to inference servers (TRL's
delta weight sync, https://github.com/huggingface/trl/pull/5417; vLLM's checkpoint patches,
https://github.com/vllm-project/vllm/pull/50723, take these names, shapes, positions and values).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from byom.errors import CheckpointError, OptionError, WeightsMismatch, listed, whole
from byom.storage import tensor_files as storage
from byom.variants.base.delta import READOUT, Served
from byom.weights import Weights
from byom.weights.match import require_match
from byom.weights.ties import unwritten

INDICES, VALUES = ".indices", ".values"
LARGEST = torch.iinfo(torch.int32).max  # the last position that the format's integers reach
PIECE = 1 << 20  # elements compared at a time
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
WHOLE = "write the model whole instead (Weights.save)"


class Changed(NamedTuple):
    """The entries of one parameter that are to be replaced.

    Args:
        indices: ``[k]`` flat positions, ascending.
        values: ``[k]`` new values.
    """

    indices: Tensor
    values: Tensor


def write_patch(weights: Weights, reference: Weights, file: str | Path, *, model_version: int = 0) -> Path:
    """Write the entries in which a model differs from another, atomically; applying them gives its bits.

    An entry takes 4 bytes and a value; where two thirds of a model in half precision changed, the model is smaller.
    Positions and values of all parameters are in memory until the file is written.

    Args:
        weights: The model that is to be served.
        reference: The model that the patch is applied to.
        file: The file; replaced only when the new one is complete.
        model_version: A number of the caller's, for servers that count updates.

    Returns:
        The file.

    Raises:
        WeightsMismatch: If names, shapes, dtypes or ties differ.
        CheckpointError: If a changed value is NaN, which servers take for "unchanged", a parameter has more places
            than int32 counts, or the file cannot be written.
        OptionError: If `model_version` is no whole number.
    """
    whole("model_version", model_version, 0)
    require_match(weights, reference)
    names = [name for name in reference if name in weights and name not in unwritten(reference.ties)]
    _require_same_form(weights, reference, names)
    changed = {name: each for name, each in _changes(weights, reference, names) if len(each.indices)}
    tensors = {f"{name}{INDICES}": each.indices.to(torch.int32) for name, each in changed.items()}
    tensors |= {f"{name}{VALUES}": each.values for name, each in changed.items()}
    entries = sum(len(each.indices) for each in changed.values())
    places = sum(torch.Size(reference.shape(name)).numel() for name in names)
    header = {
        "sparse": "True",
        "encoding": "raw",
        "model_version": str(model_version),
        "num_changed_params": str(len(changed)),
        "total_changed_elements": str(entries),
        "total_elements": str(places),
        "sparsity": str(1 - entries / max(places, 1)),
    }
    notes = {"format": 1, "patch_of": {name: reference.checksum(name) for name in changed}}
    storage.write_file(Path(file), tensors, notes, header)
    return Path(file)


def write_task_patch(served: Served, task: str, file: str | Path, *, model_version: int = 0) -> Path:
    """Write a task of a bundle as a patch of the bundle's reference, the model that a server holds.

    For example::

        bundle = Bundle.open("bundle")
        write_task_patch(bundle, "cars", "cars.safetensors")

    Args:
        served: The bundle.
        task: One of its tasks.
        file: As in `write_patch`.
        model_version: As in `write_patch`.

    Returns:
        The file.

    Raises:
        OptionError: If the bundle does not have the task, or keeps something of it outside the weights.
        CheckpointError: As in `write_patch`.
    """
    weights = served.weights(task)
    if READOUT in served.deltas[task].parts:
        raise OptionError(
            f"{served.deltas[task].variant.title} keeps a part of '{task}' between features and head, which is no "
            "weight of the model, so a patch would leave it out; serve the bundle with byom"
        )
    return write_patch(weights, served.reference, file, model_version=model_version)


def read_patch(file: str | Path, reference: Weights) -> Weights:
    """Return a model with a patch applied, lazily.

    Args:
        file: What `write_patch` wrote, or another file of the format.
        reference: The model that it was taken to; if the file says which that was, others are refused when a changed
            tensor is read.

    Returns:
        The reference with the patch's values at its positions, in the reference's names, dtypes and ties.

    Raises:
        CheckpointError: If the file is damaged or of another format, or does not fit the reference.
    """
    file = Path(file)
    files = storage.TensorFiles(file)
    names = _names(file, files, storage.read_header(file))
    stored = {held: name for name, held in _held(reference).items()}
    if unknown := [name for name in names if name not in stored]:
        raise CheckpointError(
            f"{file} changes {listed(unknown)}, which {reference.origin} does not have; apply it to the model that it "
            "was taken to"
        )
    patched = {stored[name]: name for name in names}
    for canonical, name in patched.items():
        _require_fit(file, files, name, reference.shape(canonical), reference.dtype(canonical))
    sums = storage.read_notes(file).get("patch_of", {})

    def read(canonical: str) -> Tensor:
        value = reference[canonical]
        if (name := patched.get(canonical)) is None:
            return value
        if isinstance(sums, Mapping) and sums.get(name, reference.checksum(canonical)) != reference.checksum(canonical):
            raise CheckpointError(
                f"{file} was taken to another model: its '{name}' is not that of {reference.origin}; apply it to the "
                "model that it was taken to, or make it again"
            )
        changed = value.clone(memory_format=torch.contiguous_format).reshape(-1)
        changed[files.read(f"{name}{INDICES}").long()] = files.read(f"{name}{VALUES}")
        return changed.reshape(value.shape)

    return reference.derived(read, f"{reference.origin} + {file}")


def _held(reference: Weights) -> dict[str, str]:
    """Return canonical name to the name under which files hold the tensor."""
    left = unwritten(reference.ties)
    return {reference.ties.get(name, name): name for name in reference if name not in left}


def _require_same_form(weights: Weights, reference: Weights, names: list[str]) -> None:
    """Refuse dtypes and ties that a patch cannot change."""
    other = [name for name in names if weights.dtype(name) != reference.dtype(name)]
    if other:
        ours, theirs = (str(each.dtype(other[0])).removeprefix("torch.") for each in (weights, reference))
        raise WeightsMismatch(
            f"'{other[0]}' is {ours} in {weights.origin} and {theirs} in {reference.origin}, and a patch keeps the "
            f"dtype of what it changes; write it for weights.to(torch.{theirs}), which rounds, or widen the reference"
        )
    apart = {a: n for a, n in reference.ties.items() if weights.ties.get(a, a) != weights.ties.get(n, n)}
    for alias, name in apart.items():
        if not torch.equal(weights[alias], weights[name]):
            raise WeightsMismatch(
                f"'{alias}' and '{name}' are one tensor in {reference.origin} and two in {weights.origin}, which a "
                f"patch cannot tell apart; {WHOLE}"
            )


def _changes(weights: Weights, reference: Weights, names: list[str]) -> Iterator[tuple[str, Changed]]:
    """Yield the changed entries of every parameter, one parameter in memory at a time."""
    for name in names:
        if (places := torch.Size(reference.shape(name)).numel()) > LARGEST + 1:
            raise CheckpointError(
                f"'{name}' has {places:,} places, and the positions of a patch are int32, which end at {LARGEST:,}; "
                f"{WHOLE}"
            )
    for name in names:
        changed = difference(weights[name], reference[name])
        if changed.values.is_floating_point() and bool(changed.values.isnan().any()):
            raise CheckpointError(
                f"{weights.origin}: '{name}' has NaN where it differs, which servers take for unchanged; mend the model"
            )
        yield name, changed


def difference(target: Tensor, reference: Tensor) -> Changed:
    """Return the entries whose bits differ, so that 0 and -0 are two values.

    Args:
        target: ``[*shape]``.
        reference: ``[*shape]`` of the same dtype.
    """
    flat, before = (each.detach().cpu().contiguous().reshape(-1) for each in (target, reference))
    kind = BITS[flat.dtype.itemsize]
    found = [
        start + (flat[start : start + PIECE].view(kind) != before[start : start + PIECE].view(kind)).nonzero().view(-1)
        for start in range(0, flat.numel(), PIECE)
    ]
    indices = torch.cat([torch.empty(0, dtype=torch.int64), *found])
    return Changed(indices, flat[indices])


def _names(file: Path, files: storage.TensorFiles, header: Mapping[str, str]) -> list[str]:
    """Return the parameters that a patch changes, refusing other files."""
    encoding = header.get("encoding", "raw")
    if header.get("sparse", "").lower() != "true" or encoding != "raw":
        why = (
            f"its positions are encoded as {encoding}" if encoding != "raw" else "its header does not say sparse: True"
        )
        raise CheckpointError(f"{file} is no sparse patch that is read here: {why}; write it with positions in int32")
    names = sorted(key.removesuffix(INDICES) for key in files.specs if key.endswith(INDICES))
    names = [name for name in names if f"{name}{VALUES}" in files.specs]
    known = {f"{name}{end}" for name in names for end in (INDICES, VALUES)}
    if odd := sorted(set(files.specs) - known):
        raise CheckpointError(
            f"{file} holds {listed(odd)}, which are no positions and values of a parameter; make or fetch it again"
        )
    return names


def _require_fit(file: Path, files: storage.TensorFiles, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Refuse positions and values that do not fit a parameter."""
    (count, kind), (held, stored) = (files.specs[f"{name}{end}"] for end in (INDICES, VALUES))
    if len(count) != 1 or count != held or kind not in (torch.int32, torch.int64):
        raise CheckpointError(
            f"{file}: '{name}' has {kind} positions of shape {count} and values of shape {held}; both must be flat and "
            "of one length, and positions int32 or int64. Make or fetch it again"
        )
    if stored != dtype:
        raise CheckpointError(
            f"{file}: the values of '{name}' are {stored} and the model's {dtype}; apply the patch to the model in "
            f"{stored}, for example Weights.open(...).to({stored})"
        )
    places, indices = torch.Size(shape).numel(), files.read(f"{name}{INDICES}").long()
    ordered = indices.sort().values
    if len(ordered) and (int(ordered[0]) < 0 or int(ordered[-1]) >= places or bool((ordered.diff() == 0).any())):
        raise CheckpointError(
            f"{file}: the positions of '{name}' are not different places of its {places}; make or fetch it again"
        )
