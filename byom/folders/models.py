"""The models of a request: what they share is merged, heads of their own and parts that none has are set apart."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor

from byom.checkpoint.adapters.adapter import Adapter
from byom.checkpoint.files import open_raw
from byom.checkpoint.recognise import fitted, is_head
from byom.errors import CheckpointError, listed
from byom.folders.adapted import whole
from byom.folders.patterns import chosen, matches
from byom.folders.request import Request
from byom.folders.skeleton import body
from byom.folders.source import Source
from byom.folders.vocabulary import Vocabulary, agreed
from byom.weights import Spec, Weights
from byom.weights.match import is_buffer
from byom.weights.ties import groups

CLASSIFIER = re.compile(r"(^|\.)(classifier|score|qa_outputs)\.")
"""Names of heads that each task has anew, unlike those of language models."""


@dataclass(frozen=True)
class Expert:
    """A fine-tuned model.

    Args:
        source: Where it lies.
        weights: What it shares with the others, in the base's names.
        container: What it was read from.
        raw: All of it, under its own names; None for an adapter without a head.
        names: Its own names to the base's, of what it shares.
        head: What is its own, under its own names.
        start: How its names start where the base's do otherwise: what is dropped of the base's, and what comes instead.
        settings: What its configuration says otherwise than the base's, where it has none of its own.
    """

    source: Source
    weights: Weights
    container: str
    raw: Weights | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    head: Mapping[str, Tensor] = field(default_factory=dict)
    start: tuple[str, str] = ("", "")
    settings: Mapping[str, Any] = field(default_factory=dict)

    def whole(self, shared: Weights) -> Weights:
        """Return the model with other values of what is shared, under its own names.

        Args:
            shared: Values in the base's names.
        """
        raw = self.raw
        if raw is None:
            return shared
        specs = {name: Spec(raw.shape(name), shared.dtype(self.names[name])) for name in raw if name in self.names}
        specs |= {name: Spec(raw.shape(name), raw.dtype(name)) for name in raw if name not in self.names}
        ties = {alias: name for alias, name in raw.ties.items() if self._is_one(alias, name, shared)}

        def read(name: str) -> Tensor:
            return shared[self.names[name]] if name in self.names else raw[name]

        return Weights(specs, read, ties=ties, origin=shared.origin)

    def _is_one(self, alias: str, name: str, shared: Weights) -> bool:
        """Say whether two names that this model ties still have one value."""
        places = [self.names[each] for each in (alias, name) if each in self.names]
        return not places or (len(places) == 2 and len({shared.ties.get(place, place) for place in places}) == 1)


@dataclass(frozen=True)
class Models:
    """The models of a request.

    Args:
        source: Where the base lies.
        base: All of the base.
        shared: The part of it that every expert has.
        experts: Name to fine-tuned model.
        vocabulary: How vocabularies of different size were made one.
        notes: What a reader should know.
    """

    source: Source
    base: Weights
    shared: Weights
    experts: Mapping[str, Expert]
    vocabulary: Vocabulary
    notes: tuple[str, ...] = ()

    @property
    def heads(self) -> dict[str, Expert]:
        """The experts with heads of their own, by name."""
        return {name: expert for name, expert in self.experts.items() if expert.head}

    @property
    def finetuned(self) -> dict[str, Weights]:
        """Name to theta_t, of what is shared."""
        return {name: expert.weights for name, expert in self.experts.items()}

    @property
    def completed(self) -> dict[str, Weights]:
        """Name to theta_t with all tensors of the base: what is not shared is the base's."""
        if set(self.shared) == set(self.base):
            return self.finetuned
        return {name: _completed(self.base, weights) for name, weights in self.finetuned.items()}


def models(request: Request) -> Models:
    """Open the models of a request; no tensor is read but adapters' and what tells ties apart.

    Raises:
        CheckpointError: If a model cannot be read, or does not fit the base.
        OptionError: If a pattern of heads means nothing.
    """
    source = Source.of(request.base, "base")
    sources = {name: Source.of(path, f"experts.{name}") for name, path in request.experts.items()}
    if source.is_adapter:
        raise CheckpointError(
            f"base={request.base} is a PEFT adapter, not a model. Give the model that it was trained on as base"
        )
    base, _ = open_raw(source.path)
    opened = {name: open_raw(each.path) for name, each in sources.items() if not each.is_adapter}
    raws = {name: raw for name, (raw, _) in opened.items()}
    base, raws, vocabulary = agreed(request.vocabulary, source, base, sources, raws)
    own = _own_head(base, raws.values(), request.heads)
    lacking = _lacking(base, raws.values(), own)
    shared = base.select(lambda name: name not in own and name not in lacking)
    experts = {
        name: _adapted(each, shared, source.folder)
        if each.is_adapter
        else _expert(each, raws[name], opened[name][1], shared, request.heads)
        for name, each in sources.items()
    }
    if request.heads:
        chosen("heads", request.heads, [*base, *(n for raw in raws.values() for n in raw)])
    notes = [*vocabulary.notes, *_noted(base, own, lacking, experts)]
    return Models(source, base, shared, experts, vocabulary, tuple(notes))


def _completed(base: Weights, weights: Weights) -> Weights:
    """Return weights with the tensors that they lack, of the base."""
    owner = {name: weights if name in weights else base for name in base}
    specs = {name: Spec(each.shape(name), each.dtype(name)) for name, each in owner.items()}
    ties = {a: n for a, n in base.ties.items() if a not in weights or weights.ties.get(a) == weights.ties.get(n, n)}
    return Weights(specs, lambda name: owner[name].raw(name), ties=ties, origin=weights.origin)


def _expert(source: Source, raw: Weights, container: str, shared: Weights, heads: Sequence[str]) -> Expert:
    inner = cache(lambda: body(source.folder, raw))

    def is_own(name: str) -> bool:
        return any(matches(pattern, name) for pattern in heads) or not name.startswith(inner())

    found = fitted(raw, container, shared, heads=is_own, own=True)
    kept = {n: raw[n] for n in raw if found.names and n not in found.names and not is_buffer(n, raw.shape(n))}
    return Expert(source, found.weights, found.format, raw, found.names, kept, found.start)


def _adapted(source: Source, shared: Weights, base: Path | None) -> Expert:
    adapter = Adapter.open(source.path)
    weights, head = adapter.on(shared), adapter.heads(shared)
    if not head:
        return Expert(source, weights, "PEFT adapter")
    found = whole(source.path, base, weights, head)
    if found is None:
        raise CheckpointError(
            f"{source.given} has a head of its own ({listed(head)}), and transformers names no model of its task_type "
            "that has it and this base. Load it with PEFT, call merge_and_unload, save it, and give that folder"
        )
    first = next((pair for pair in found.names.items() if pair[0] != pair[1]), ("", ""))
    start = ("", first[0].removesuffix(first[1]))
    return Expert(source, weights, "PEFT adapter", found.weights, found.names, head, start, found.settings)


def _own_head(base: Weights, raws: Collection[Weights], patterns: Sequence[str]) -> set[str]:
    """Return the base's tensors that are a head which not every expert has in the same shape.

    A head that is tied to the input embedding goes with it.
    """
    named = {name for name in base if any(matches(pattern, name) for pattern in patterns)}
    follows = {name for every in groups(base.ties).values() for name in every if not all(map(is_head, every))}
    heads = [name for name in base if is_head(name) and name not in named | follows]
    return named | {name for name in heads if not all(_holds(raw, name, base.shape(name)) for raw in raws)}


def _holds(raw: Weights, name: str, shape: tuple[int, ...]) -> bool:
    """Say whether an expert has a tensor, if under a longer or shorter name, as where a head wraps the base."""
    return any(
        raw.shape(other) == shape and (other == name or other.endswith(f".{name}") or name.endswith(f".{other}"))
        for other in raw
    )


def _lacking(base: Weights, raws: Collection[Weights], own: set[str]) -> set[str]:
    """Return the base's parts that no expert has, as where experts are one tower of a model with two."""
    held = {f"{start}{name}" for raw in raws for start in _starts(base, raw) for name in raw}.intersection(base)
    tied = {name for every in groups(base.ties).values() if held.intersection(every) for name in every}
    known = held | tied | own
    lost = {name for name in base if name not in known and not is_buffer(name, base.shape(name))}
    apart = {name.partition(".")[0] for name in lost} & {name.partition(".")[0] for name in held}
    return set() if not held or apart else lost


def _starts(base: Weights, raw: Weights) -> list[str]:
    """Return what comes before an expert's names in the base: nothing, or the one part that the expert is."""
    if any(name in base for name in raw):
        return [""]
    names = [name for name in raw if not is_head(name) and not is_buffer(name, raw.shape(name))]
    parts = dict.fromkeys(f"{name.partition('.')[0]}." for name in base)
    fit = [part for part in parts if all(_has(base, f"{part}{name}", raw.shape(name)) for name in names)]
    return fit if len(fit) == 1 else []


def _has(base: Weights, name: str, shape: tuple[int, ...]) -> bool:
    return name in base and base.shape(name) == shape


def _noted(base: Weights, own: set[str], lacking: set[str], experts: Mapping[str, Expert]) -> list[str]:
    notes = [f"{name}: {line}" for name, expert in experts.items() for line in _left(expert)]
    if own:
        notes.append(f"not merged, a head that experts lack or have in another shape: {listed(sorted(own))}")
    if lacking:
        parts = sorted({name.partition(".")[0] for name in lacking})
        notes.append(f"not merged, {len(lacking)} tensors that no expert has: all of {listed(parts)}")
    if same := [n for n in base if CLASSIFIER.search(n) and n not in own and n not in lacking]:
        notes.append(f"merged, a head of one shape in all: {listed(same)}; heads=[...] keeps each expert's own")
    return notes


def _left(expert: Expert) -> list[str]:
    return [f"has a head of its own: {listed(sorted(expert.head))}"] if expert.head else []
