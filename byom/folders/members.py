"""Models that have a vocabulary, and their tables with the rows of another one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from byom.errors import CheckpointError, OptionError
from byom.folders.rows import are_one, counterpart, kept_ties, rowed, rows_of, tables
from byom.folders.source import Source
from byom.storage.tokens import Tokenizer
from byom.weights import Weights


@dataclass(frozen=True)
class Member:
    """A model with a vocabulary.

    Args:
        called: ``base``, or the expert's name.
        source: Where it lies.
        weights: All of it.
        rows: The rows of its input embedding.
        names: Its tables to what they are called in the base.
        tokenizer: Its tokens; None if its folder has none.
    """

    called: str
    source: Source
    weights: Weights
    rows: int
    names: Mapping[str, str]
    tokenizer: Tokenizer | None = field(default=None, compare=False)

    @property
    def given(self) -> str:
        """How messages call it."""
        return f"{self.called}={self.source.given}"

    @property
    def ids(self) -> dict[str, int]:
        """Token to row, of the tokens that have one."""
        assert self.tokenizer is not None
        return {token: row for token, row in self.tokenizer.ids.items() if row < self.rows}

    @property
    def own(self) -> list[str]:
        """Tables that the base lacks."""
        return [name for name in tables(self.weights, self.rows) if name not in self.names]

    @property
    def every(self) -> dict[str, str]:
        """Names of the expert's tables to the base's, with those that only the expert has for one of them."""
        same = {name: [n for n in self.names if are_one(self.weights, name, n)] for name in self.own}
        return {**self.names, **{name: self.names[others[0]] for name, others in same.items() if others}}

    def read(self) -> Member:
        """Return it with its tokenizer.

        Raises:
            CheckpointError: If that cannot be read.
        """
        return replace(self, tokenizer=Tokenizer.open(self.source.folder))


def base_of(source: Source, base: Weights, mode: str) -> Member | None:
    """Return the base with its tables; None if it has none.

    Raises:
        OptionError: If a joint vocabulary is asked for, and there is none.
        CheckpointError: If a joint vocabulary is asked for, and there are several.
    """
    rows = _rows(base, source, mode)
    if rows is None and mode != "strict":
        raise OptionError(f"vocabulary={mode}: the base has no embedding of tokens; leave vocabulary out")
    return None if rows is None else Member("base", source, base, rows, {name: name for name in tables(base, rows)})


def expert_of(called: str, source: Source, raw: Weights, base: Member, mode: str) -> Member | None:
    """Return an expert with the tables that the base has, too; None if it has no vocabulary.

    Raises:
        CheckpointError: If a joint vocabulary is asked for, and it has several.
    """
    rows = _rows(raw, source, mode)
    if rows is None:
        return None
    theirs = set(tables(raw, rows))
    found = {ours: counterpart(ours, raw) for ours in base.names}
    return Member(called, source, raw, rows, {name: ours for ours, name in found.items() if name in theirs and name})


def _rows(weights: Weights, source: Source, mode: str) -> int | None:
    try:
        return rows_of(weights, source.given)
    except CheckpointError:
        if mode != "strict":
            raise
        return None


def places(rows: int, ids: Mapping[str, int], theirs: Mapping[str, int]) -> Tensor:
    """Return a model's row for each row of the result; -1 where it has none, as where a row belongs to no token.

    Args:
        rows: The rows of the result (R).
        ids: Token to row of the result.
        theirs: Token to row of the model.

    Returns:
        Whole numbers ``[R]``.
    """
    where = torch.full((rows,), -1)
    known = [(row, theirs[token]) for token, row in ids.items() if token in theirs and row < rows]
    if known:
        here, there = zip(*known, strict=True)
        where[torch.tensor(here)] = torch.tensor(there)
    return where


def changed(
    base: Weights, where: Mapping[str, Tensor], experts: Sequence[Member], used: Collection[int]
) -> dict[str, Weights]:
    """Return the experts whose rows lie otherwise than in the result, with the rows of the result.

    Args:
        base: The base with the rows of the result.
        where: Name of each expert to its row for each row of the result ``[R]``; -1 where it has none.
        experts: The experts.
        used: The rows of the result that belong to a token.

    Raises:
        CheckpointError: If an expert has a table that the base lacks.
    """
    found: dict[str, Weights] = {}
    for expert in experts:
        if _is_in_place(expert, where[expert.called], used):
            continue
        names = expert.every
        if own := [name for name in expert.own if name not in names]:
            raise CheckpointError(
                f"{expert.given} has {own[0]}, with a row per token, and the base has none: its rows cannot be those "
                "of another vocabulary. Save the model without that head, or give a base that has one"
            )
        ties = kept_ties(expert.weights, names, base)
        found[expert.called] = rowed(expert.weights, base, names, where[expert.called], ties)
    return found


def _is_in_place(expert: Member, where: Tensor, used: Collection[int]) -> bool:
    """Say whether an expert's rows are those of the result already; rows that no token has are left as they are."""
    if expert.rows != len(where):
        return False
    taken = where >= 0
    theirs = set() if expert.tokenizer is None else set(expert.ids.values())
    lacking = (~taken).nonzero().flatten().tolist()
    return torch.equal(where[taken], torch.arange(len(where))[taken]) and not theirs.union(used).intersection(lacking)
