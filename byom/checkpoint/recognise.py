"""Checkpoints of any format, read into the names and shapes of a backbone, with nothing lost unnoticed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from byom.checkpoint.adapters.adapter import Adapter
from byom.checkpoint.adapters.config import CONFIG, PICKLED, SAFE
from byom.checkpoint.clip import from_hugging_face
from byom.checkpoint.files import open_raw
from byom.checkpoint.misfit import lacking, misshapen, strangers
from byom.errors import CheckpointError, listed
from byom.weights import Spec, Weights
from byom.weights.match import BUFFERS, is_buffer, partitioned, require_kind, unwrapped
from byom.weights.ties import groups, joined, kept

HEADS = ("classifier.", "pooler.", "score.", "lm_head.", "cls.", "qa_outputs.")
TEXT = (
    "positional_embedding", "text_projection", "logit_scale", "logit_bias", "token_embedding.", "ln_final.",
    "transformer.",
)  # fmt: skip
"""Names of the text tower's remains in the image encoders of the task vectors' code."""
HUGGING_FACE_TEXT = ("text_model.", "text_projection.", "logit_scale")
CLIP_MARK = "pre_layrnorm.weight"
Matches = dict[str, dict[str, str]]
"""Canonical names of a backbone to the names that it ties with them, and those in a file: several where it has them."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in a backbone's names.

    Args:
        weights: The encoder: names, shapes and dtypes of the pre-trained one.
        format: What the checkpoint was.
        extra: Tensors of heads that came with it, under their own names.
        frozen: What is left of a text tower that fine-tuning never touches, in open_clip's names.
        notes: What a reader should know.
        names: Name in the file to the backbone's, of every tensor that is one of the backbone's under one change of
            the names' start; empty for other formats.
        start: That change: what is dropped of the backbone's names, and what takes its place.
    """

    weights: Weights
    format: str
    extra: dict[str, Tensor] = field(default_factory=dict)
    frozen: Weights | None = None
    notes: tuple[str, ...] = ()
    names: Mapping[str, str] = field(default_factory=dict)
    start: tuple[str, str] = ("", "")

    @property
    def conventions(self) -> dict[str, int]:
        """Parameters as they are counted here, and with frozen left-overs, as published counts have them."""
        return {"encoder": self.weights.numel, "with frozen": self.weights.numel + self._left}

    @property
    def _left(self) -> int:
        return self.frozen.numel if self.frozen else 0


def read(path: str | Path, base: Weights) -> Checkpoint:
    """Read a checkpoint, whatever its format, into the names of a backbone.

    Args:
        path: A file or folder: safetensors, a PyTorch state dict, a pickled module (nothing in it is run), shards of
            these, or a PEFT adapter.
        base: The backbone's pre-trained weights.

    Returns:
        The checkpoint; lazy where the format allows it. What the base ties and the file holds twice, differently, is
        not tied in it.

    Raises:
        CheckpointError: If tensors are missing, unknown or of another shape, or the file cannot be read safely.
    """
    path = folder_of(Path(path))
    if (path / CONFIG).is_file():
        adapter = Adapter.open(path)
        return Checkpoint(adapter.on(base), "PEFT adapter", adapter.heads(base))
    return fitted(*open_raw(path), base)


def fitted(
    raw: Weights, container: str, base: Weights, *, heads: Callable[[str], bool] = lambda _: False, own: bool = False
) -> Checkpoint:
    """Give opened weights the names of a backbone; see `read`.

    Args:
        raw: The weights under the names of their file.
        container: What they were read from.
        base: The backbone's pre-trained weights.
        heads: Says which names in the file are a head's, besides those that are called so.
        own: Whether tensors keep the dtype of their file; otherwise they are rounded to the backbone's.
    """
    raw = _unwrapped(raw, base)
    tower = _tower(raw, base)
    return _renamed(raw, base, container, heads, own) if tower is None else _clip(raw, base, tower, container)


def folder_of(path: Path) -> Path:
    """Return the folder of an adapter whose file is given, since its configuration is read with it; else the path."""
    of_adapter = path.name in (SAFE, PICKLED) and (path.parent / CONFIG).is_file()
    return path.parent if of_adapter else path


def _unwrapped(raw: Weights, base: Weights) -> Weights:
    """Return weights without the parts of names that wrappers of modules put in, if the backbone's have none."""
    places = {unwrapped(name): name for name in raw}
    if any(unwrapped(name) != name for name in base) or list(places) == list(places.values()):
        return raw
    if len(places) < len(raw):
        one, other = next((name, places[unwrapped(name)]) for name in raw if places[unwrapped(name)] != name)
        raise CheckpointError(
            f"{raw.origin} holds '{one}' and '{other}', one tensor with and without a wrapper of its module. Keep one"
        )
    ties = {unwrapped(alias): unwrapped(name) for alias, name in raw.ties.items()}
    return Weights(_specs(raw, places), lambda name: raw[places[name]], ties=ties, origin=raw.origin)


def _tower(raw: Weights, base: Weights) -> str | None:
    """Return what the names of an open_clip image tower start with, if `raw` is one of transformers."""
    if not any(name.endswith(CLIP_MARK) for name in raw):
        return None
    mark = "conv1.weight"
    return next((name.removesuffix(mark) for name in base if name.endswith(mark)), None)


def _clip(raw: Weights, base: Weights, tower: str, container: str) -> Checkpoint:
    weights, borrowed, used = from_hugging_face(raw, base, tower)
    left = [name for name in raw if name not in used and not name.endswith(BUFFERS)]
    text = [name for name in left if name.startswith(HUGGING_FACE_TEXT)]
    heads = [name for name in left if name not in text and name.startswith(HEADS)]
    if unknown := [name for name in left if name not in text and name not in heads]:
        raise CheckpointError(f"{raw.origin} holds tensors that no CLIP image tower has: {listed(unknown)}")
    notes = [f"{name} is the pre-trained model's: the checkpoint has none" for name in borrowed]
    if text:
        notes.append(f"left out: {len(text)} tensors of the text tower; zero-shot heads come from the pre-trained one")
    return Checkpoint(
        weights, f"Hugging Face CLIP ({container})", {name: raw[name] for name in heads}, notes=tuple(notes)
    )


def _renamed(raw: Weights, base: Weights, container: str, is_own: Callable[[str], bool], own: bool) -> Checkpoint:
    matches, (dropped, start) = _places(raw, base)
    places = {name: every[kept(every)] for name, every in matches.items()}
    if wrong := [n for n, theirs in places.items() if raw.shape(theirs) != base.shape(n)]:
        raise misshapen(raw, base, [(places[name], name) for name in wrong])
    for name, theirs in places.items():
        require_kind(base, name, raw, theirs)
    apart, before = _apart(raw, places, matches), base.ties
    used = {theirs for every in matches.values() for theirs in every.values()}
    used |= {name for name in raw for theirs in used if raw.ties.get(name, name) == raw.ties.get(theirs, theirs)}
    left = [name for name in raw if name not in used]
    frozen = [name for name in left if _is_text(name.removeprefix(start), base)]
    heads = [name for name in left if name not in frozen and (is_head(name) or is_own(name))]
    if emptied := [name for name in heads if raw.shape(name) == (0,)]:
        raise CheckpointError(f"{raw.origin}: {partitioned(emptied[0])}")
    known = {*frozen, *heads}
    if unknown := [n for n in left if n not in known and not is_buffer(n, raw.shape(n))]:
        raise strangers(raw, unknown)
    if apart:
        base = base.tied(joined([name for name in every if name not in apart] for every in groups(base.ties).values()))
        places |= {name: places[first] for name, first in before.items() if first in places} | apart
    view = base.derived(lambda name: raw[places[name]] if name in places else base[name], raw.origin)
    return Checkpoint(
        _retyped(view, raw, places) if own else view,
        f"{'ImageEncoder, ' if frozen else ''}{container}",
        {name.removeprefix(start) if name.startswith(start) else name: raw[name] for name in heads},
        _named(raw, {name.removeprefix(start): name for name in frozen}) if frozen else None,
        names={theirs: name for every in matches.values() for name, theirs in every.items()},
        start=(dropped, start),
    )


def _retyped(view: Weights, raw: Weights, places: Mapping[str, str]) -> Weights:
    """Return a view whose tensors have the dtypes of the file."""
    types = {name: raw.dtype(places[name]) if name in places else view.dtype(name) for name in view}
    specs = {name: Spec(view.shape(name), dtype) for name, dtype in types.items()}
    return Weights(specs, view.raw, ties=view.ties, origin=view.origin)


def _named(raw: Weights, places: Mapping[str, str]) -> Weights:
    return Weights(_specs(raw, places), lambda name: raw[places[name]], origin=raw.origin)


def _specs(raw: Weights, places: Mapping[str, str]) -> dict[str, Spec]:
    return {name: Spec(raw.shape(theirs), raw.dtype(theirs)) for name, theirs in places.items()}


def _places(raw: Weights, base: Weights) -> tuple[Matches, tuple[str, str]]:
    """Return where every tensor of the backbone is, by one change of the names' start; and that change.

    A buffer that is computed may be missing, or have another shape: then it is the backbone's.
    """
    candidates = [(_matched(raw, base, *shift), shift) for shift in _shifts(raw, base)]
    nothing: tuple[Matches, tuple[str, str]] = ({}, ("", ""))
    places, shift = max(candidates, key=lambda found: (len(found[0]), -len(found[1][1])), default=nothing)
    names = [name for name in base.mergeable() if not is_buffer(name, base.shape(name))]
    if lost := [name for name in names if name not in places]:
        raise lacking(raw, base, lost, names, found=bool(places))
    buffers = {name: every for name, every in places.items() if is_buffer(name, base.shape(name))}
    odd = {n for n, every in buffers.items() if raw.shape(every[kept(every)]) != base.shape(n)}
    return {name: every for name, every in places.items() if name not in odd}, shift


def _shifts(raw: Weights, base: Weights) -> set[tuple[str, str]]:
    """Return the changes of start under which some names could agree."""
    ours = {"", *(f"{name.split('.')[0]}." for name in base)}
    shifts = {(dropped, "") for dropped in ours}
    for name in base.mergeable()[:8]:
        for dropped in ours:
            tail = name.removeprefix(dropped)
            shifts |= {(dropped, theirs.removesuffix(tail)) for theirs in raw if theirs.endswith(f".{tail}")}
    return shifts


def _matched(raw: Weights, base: Weights, dropped: str, added: str) -> Matches:
    every = {name: [name] for name in base.canonical()} | groups(base.ties)
    matches: Matches = {}
    for canonical, names in every.items():
        theirs = {name: added + name.removeprefix(dropped) for name in names if name.startswith(dropped)}
        if present := {name: other for name, other in theirs.items() if other in raw}:
            matches[canonical] = present
    return matches


def _apart(raw: Weights, places: Mapping[str, str], matches: Matches) -> dict[str, str]:
    """Return names that the backbone ties and the file gives a value of their own, to their names in the file."""
    return {
        name: theirs
        for canonical, every in matches.items()
        for name, theirs in every.items()
        if theirs != places[canonical] and not torch.equal(raw[theirs], raw[places[canonical]])
    }


def _is_text(name: str, base: Weights) -> bool:
    return any(each.endswith("visual.proj") or ".resblocks." in each for each in base) and name.startswith(TEXT)


def is_head(name: str) -> bool:
    """Say whether a tensor belongs to a head, by its name."""
    return any(part in f".{name}" for part in (f".{head}" for head in HEADS))


def same_left_overs(checkpoints: Iterable[tuple[str, Checkpoint]]) -> Weights | None:
    """Return the frozen tensors that all checkpoints of a set share, so that they are stored once.

    Args:
        checkpoints: Task and checkpoint.

    Returns:
        The left-overs of any of them; None if none has any.

    Raises:
        CheckpointError: If two differ, so that they are not frozen after all.
    """
    first: tuple[str, Weights] | None = None
    for task, checkpoint in checkpoints:
        if checkpoint.frozen is None:
            continue
        first = first or (task, checkpoint.frozen)
        if checkpoint.frozen.fingerprint() != first[1].fingerprint():
            raise CheckpointError(
                f"the text tower's tensors of {task} differ from those of {first[0]}, so they were trained; "
                "the image encoder alone does not hold these models"
            )
    return first[1] if first else None
