"""Vocabularies of different size or order, made one by their tokenizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from byom.checkpoint.adapters.adapter import Adapter
from byom.errors import CheckpointError, listed
from byom.folders.members import Member, base_of, changed, expert_of, places
from byom.folders.rows import Owners, are_one, axis, counterpart, grown, require_same_order, tables
from byom.folders.source import Source
from byom.folders.words import Words, require_one_order
from byom.storage.tokens import FAST, SETTINGS
from byom.weights import Weights
from byom.weights.match import is_resized

REMEDIES = (
    "vocabulary=base keeps the base's tokens and vocabulary=union has every model's; both match rows by token, with "
    "the tokenizers in the folders"
)


@dataclass(frozen=True)
class Vocabulary:
    """What was done about vocabularies.

    Args:
        notes: What a reader should know.
        words: The tokens of the result and what becomes of the files that state them; None where nothing changes.
    """

    notes: tuple[str, ...] = ()
    words: Words | None = None

    def complete(self, folder: Path, place: Path | None) -> None:
        """Make configuration and tokenizer that were copied into a folder those of the one vocabulary.

        Args:
            folder: The folder.
            place: Where they were copied from; None if from nowhere.

        Raises:
            CheckpointError: If they state tokens that the vocabulary lacks.
        """
        if self.words is not None and place is not None:
            self.words.write(folder, place)


def agreed(
    mode: str, source: Source, base: Weights, sources: Mapping[str, Source], raws: Mapping[str, Weights]
) -> tuple[Weights, dict[str, Weights], Vocabulary]:
    """Give all models the rows of one vocabulary.

    ``strict`` refuses vocabularies that differ. ``base`` keeps the rows of the base: a token that an expert lacks has
    the base's row there, so that its task vector is 0, and tokens that the base lacks are left out. ``union`` has the
    base's tokens under their ids and then those that only experts have, expert by expert in the order of their ids,
    also in rows of the base that belong to no token. The base's row for such a token is the mean over the experts that
    have it; experts that lack it have that row, too.

    Args:
        mode: ``strict``, ``base`` or ``union``.
        source: Where the base lies.
        base: All of it.
        sources: Where experts lie, by name.
        raws: All of each that is no adapter, by name.

    Returns:
        The base, the experts, and what was done. Tables are read and put together when they are asked for.

    Raises:
        OptionError: If models have no vocabulary, and one is chosen.
        CheckpointError: If vocabularies differ and ``strict`` is chosen, or rows cannot be matched.
    """
    first = base_of(source, base, mode)
    if first is None:
        return base, dict(raws), Vocabulary()
    members = [found for name, raw in raws.items() if (found := expert_of(name, sources[name], raw, first, mode))]
    if mode == "strict":
        return base, dict(raws), Vocabulary(tuple(note for member in members for note in _strict(first, member)))
    first, members = first.read(), [member.read() for member in members]
    weights, resized, vocabulary = _base(first, members) if mode == "base" else _union(first, members)
    if weights is not base:
        _require_unadapted(mode, sources, first)
    return weights, dict(raws) | resized, vocabulary


def _strict(base: Member, expert: Member) -> list[str]:
    """Refuse an expert whose vocabulary is not the base's; return notes on tokens that are called otherwise."""
    both = f"{base.given} and {expert.given}"
    differing = [
        (theirs, ours)
        for ours in base.weights
        if (theirs := counterpart(ours, expert.weights))
        and base.weights.shape(ours) != (shape := expert.weights.shape(theirs))
        and is_resized(ours, base.weights.shape(ours), shape)
        and (ours in base.names or theirs in expert.names or theirs in tables(expert.weights, expert.rows))
    ]
    if differing:
        theirs, ours = differing[0]
        raise CheckpointError(
            f"{both} have vocabularies of different size: '{ours}' is {base.weights.shape(ours)} and "
            f"{expert.weights.shape(theirs)}. {REMEDIES}"
        )
    if _same_files(base.source.folder, expert.source.folder):
        return []
    try:
        one, other = base.read(), expert.read()
    except CheckpointError as error:
        return [f"rows of tokens are matched by their place: {error}"]
    if one.tokenizer is None or other.tokenizer is None:
        return []
    return require_one_order(one.ids, other.ids, both, expert.called)


def _same_files(one: Path | None, other: Path | None) -> bool:
    """Say whether two folders have the same tokenizer, or one has none in the usual form."""
    if one is None or other is None:
        return True
    pairs = [(one / name, other / name) for name in (FAST, SETTINGS)]
    return all(a.is_file() and b.is_file() and a.read_bytes() == b.read_bytes() for a, b in pairs)


def _base(base: Member, experts: list[Member]) -> tuple[Weights, dict[str, Weights], Vocabulary]:
    where: dict[str, Tensor] = {}
    notes: list[str] = []
    for expert in experts:
        if base.tokenizer is None or expert.tokenizer is None:
            where[expert.called] = _by_place(base, expert)
            count = min(base.rows, expert.rows)
            notes.append(
                f"{expert.called}: without two tokenizers, its first {count} rows are the base's by their place"
            )
        else:
            where[expert.called] = places(base.rows, base.ids, expert.ids)
            notes += _left(base, expert)
    ids = {} if base.tokenizer is None else base.ids
    resized = changed(base.weights, where, experts, set(ids.values()))
    words = Words.of("base", base, experts, ids, (), base.rows) if resized else None
    return base.weights, resized, Vocabulary(tuple(notes), words)


def _left(base: Member, expert: Member) -> list[str]:
    ours, theirs, task = base.ids, expert.ids, expert.called
    left = sorted(theirs.keys() - ours.keys(), key=theirs.__getitem__)
    lacked = sorted(ours.keys() - theirs.keys(), key=ours.__getitem__)
    notes = [f"{task}: {len(left)} tokens are left out, which the base lacks: {listed(left)}"] if left else []
    return [
        *notes,
        *([f"{task}: lacks {len(lacked)} tokens, whose rows are the base's: {listed(lacked)}"] if lacked else []),
    ]


def _by_place(base: Member, expert: Member) -> Tensor:
    if base.rows != expert.rows:
        theirs, ours = next(iter(expert.names.items()))
        require_same_order(
            base.weights[ours].movedim(axis(ours), 0),
            expert.weights[theirs].movedim(axis(ours), 0),
            (base.given, expert.given),
        )
    where = torch.arange(base.rows)
    where[expert.rows :] = -1
    return where


def _union(base: Member, experts: list[Member]) -> tuple[Weights, dict[str, Weights], Vocabulary]:
    if base.tokenizer is None:
        raise CheckpointError(
            f"vocabulary=union: {base.given} has no tokenizer beside its weights, which tells the tokens of its rows. "
            "Put its files there, or use vocabulary=base"
        )
    notes = [f"{e.called}: has no tokenizer, and is taken to have the base's" for e in experts if e.tokenizer is None]
    held = {expert.called: _tokens(base, expert) for expert in experts}
    start = max(base.tokenizer.ids.values(), default=-1) + 1
    ids, new = dict(base.tokenizer.ids), []
    for expert in experts:
        more = sorted(held[expert.called].keys() - ids.keys(), key=held[expert.called].__getitem__)
        ids |= {token: start + len(new) + number for number, token in enumerate(more)}
        added = {} if expert.tokenizer is None else expert.tokenizer.added
        new += [(token, added.get(token)) for token in more]
        notes += _told(expert.called, more, [token for token in more if token not in added])
    rows = max(base.rows, start + len(new))
    owners = {
        row: [(task, theirs[token]) for task, theirs in held.items() if token in theirs]
        for token, row in ids.items()
        if row >= min(start, base.rows)
    }
    owners |= {row: [] for row in range(base.rows, rows) if row not in owners}
    weights = _grown(base, experts, rows, owners) if owners else base.weights
    where = {task: places(rows, ids, theirs) for task, theirs in held.items()}
    resized = changed(weights, where, experts, set(ids.values()))
    untied = set(base.weights.ties) > set(weights.ties)
    words = Words.of("union", base, experts, ids, tuple(new), rows, untied=untied) if owners or resized else None
    return weights, resized, Vocabulary(tuple(notes), words)


def _tokens(base: Member, expert: Member) -> dict[str, int]:
    if expert.tokenizer is not None:
        return expert.ids
    if expert.rows != base.rows:
        raise CheckpointError(
            f"vocabulary=union: {expert.given} has {expert.rows} rows, the base {base.rows}, and no tokenizer beside "
            "its weights, which tells their tokens. Put its files there, or use vocabulary=base"
        )
    return base.ids


def _told(task: str, new: list[str], pieces: list[str]) -> list[str]:
    notes = [f"{task}: adds {len(new)} tokens: {listed(new)}"] if new else []
    if pieces:
        notes.append(
            f"{task}: {len(pieces)} of them are pieces of its own segmentation ({listed(pieces)}); the joint tokenizer "
            "finds them only where a text has them letter by letter, so it may segment texts otherwise"
        )
    return notes


def _grown(base: Member, experts: list[Member], rows: int, owners: Mapping[int, list[tuple[str, int]]]) -> Weights:
    names = {expert.called: {ours: theirs for theirs, ours in expert.names.items()} for expert in experts}

    def stays(alias: str, name: str) -> bool:
        if alias not in base.names:
            return True
        pairs = [(e.weights, names[e.called].get(alias), names[e.called].get(name)) for e in experts]
        return all(are_one(weights, one, other) for weights, one, other in pairs if one and other)

    ties = {alias: name for alias, name in base.weights.ties.items() if stays(alias, name)}
    held = Owners({expert.called: expert.weights for expert in experts}, names, owners)
    return grown(base.weights, list(base.names), rows, held, ties)


def _require_unadapted(mode: str, sources: Mapping[str, Source], base: Member) -> None:
    """Refuse adapters of tables whose rows are others than those that they were trained on."""
    modules = {name.rpartition(".")[0] for name in base.names}
    for task, source in sources.items():
        if not source.is_adapter:
            continue
        adapter = Adapter.open(source.path)
        if head := sorted(adapter.heads(base.weights)):
            raise CheckpointError(
                f"vocabulary={mode}: the adapter {task}={source.given} has a head of its own ({head[0]}), and its "
                "model would need the larger one. Merge it into its own base first (peft: merge_and_unload, then "
                "save_pretrained)"
            )
        paths = [*adapter.layers, *(name.rpartition(".")[0] for name in adapter.saved)]
        if adapted := [path for path in paths if any(path.endswith(m) or m.endswith(path) for m in modules)]:
            raise CheckpointError(
                f"vocabulary={mode}: the adapter {task}={source.given} adapts {adapted[0]}, whose rows are others than "
                "it was trained on. Merge it into its own base first (peft: merge_and_unload, then save_pretrained)"
            )
