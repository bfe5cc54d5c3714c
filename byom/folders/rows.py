"""Tables with one row per token: which tensors of a model are such, and models whose tables have other rows."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from byom.errors import CheckpointError
from byom.functional.tensors import wide
from byom.weights import Spec, Weights
from byom.weights.match import LOGITS, is_resized
from byom.weights.ties import OUTPUT

INPUT = re.compile(
    r"(^|\.)(embed_tokens|wte|word_embeddings?|tok_embeddings|token_embedding|embed_in|shared|embeddings)\.weight$"
)
INNER = re.compile(
    r"\.\d+\.|dense|(^|[._])transform([._]|$)|norm|(^|[._])ln|(^|[._])rel_|relative|position|(^|[._])wpe|_type|segment",
    re.IGNORECASE,
)
"""Parts of the names of what is no table of tokens, though its width may by chance be that of the vocabulary."""
ALIKE = 0.5
"""Cosine of two models' tables, about their mean rows, from which rows at one place are taken for one token's."""


def rows_of(weights: Weights, origin: str) -> int | None:
    """Return how many rows the input embedding has; None if there is none.

    Raises:
        CheckpointError: If there are several of different size.
    """
    names = [name for name in weights if INPUT.search(name) and not INNER.search(name)]
    found = {weights.shape(name)[0]: name for name in names if len(weights.shape(name)) == 2}
    if len(found) > 1:
        one, other = list(found.values())[:2]
        raise CheckpointError(
            f"{origin} has more than one vocabulary ({one}: {weights.shape(one)[0]} rows, {other}: "
            f"{weights.shape(other)[0]}), so only models of equal sizes can be merged, with vocabulary=strict"
        )
    return next(iter(found), None)


def axis(name: str) -> int:
    """Return the axis of a table along which tokens lie."""
    return -1 if name.endswith(LOGITS) else 0


def tables(weights: Weights, rows: int) -> list[str]:
    """Return the names of the tensors with one row per token: embeddings, output layers and their biases.

    Args:
        weights: The weights.
        rows: The rows of the input embedding.
    """

    def is_table(name: str) -> bool:
        shape = weights.shape(name)
        matrix = len(shape) == 2 or (len(shape) == 1 and name.endswith("bias"))
        named = (is_resized(name, shape, shape) or OUTPUT.search(name)) and not INNER.search(name)
        return bool(named) and matrix and shape[axis(name)] == rows

    found = {weights.ties.get(name, name) for name in weights if is_table(name)}
    return [name for name in weights if weights.ties.get(name, name) in found]


def counterpart(name: str, weights: Weights) -> str | None:
    """Return what a tensor of the base is called in another model, whose names may be longer or shorter."""
    if name in weights:
        return name
    found = [other for other in weights if other.endswith(f".{name}") or name.endswith(f".{other}")]
    return found[0] if len(found) == 1 else None


@dataclass(frozen=True)
class Owners:
    """The rows of a base's table that are not its own: each the mean of what other models have for its token.

    Args:
        models: Name to weights.
        names: Name to each table of the base's to what it is called there.
        rows: Row of the result to the models that have its token, and their rows; none are the mean of the base's rows.
    """

    models: Mapping[str, Weights]
    names: Mapping[str, Mapping[str, str]]
    rows: Mapping[int, Sequence[tuple[str, int]]]

    def values(self, name: str, own: Tensor) -> Tensor:
        """Return the rows, in the order in which they are named, reading one model's table at a time.

        Args:
            name: A table of the base's.
            own: Its values, tokens along the first axis.
        """
        total = wide(own.new_zeros((len(self.rows), *own.shape[1:])))
        count = torch.zeros(len(self.rows), *[1] * (own.dim() - 1))
        for task, weights in self.models.items():
            places = [(n, row) for n, owners in enumerate(self.rows.values()) for of, row in owners if of == task]
            if places and name in self.names[task]:
                here, there = (torch.tensor(each) for each in zip(*places, strict=True))
                total[here] += wide(weights[self.names[task][name]].movedim(axis(name), 0)[there])
                count[here] += 1
        return torch.where(count > 0, total / count.clamp(min=1), wide(own).mean(0)).to(own.dtype)


def grown(base: Weights, names: Sequence[str], rows: int, owners: Owners, ties: Mapping[str, str]) -> Weights:
    """Return the base with the rows of a larger vocabulary.

    Args:
        base: The base.
        names: Its tables.
        rows: The rows that they get.
        owners: Where rows come from that are not the base's own.
        ties: Alias to canonical name of what stays tied.
    """
    held: dict[str, Tensor] = {}  # every expert's table is read with the base's, and with it these rows

    def read(name: str) -> Tensor:
        if name not in names:
            return base[name]
        own = base[name].movedim(axis(name), 0)
        if name not in held:
            held[name] = owners.values(name, own)
        table = own.new_zeros((rows, *own.shape[1:]))
        table[: len(own)] = own
        table[torch.tensor(list(owners.rows))] = held[name]
        return table.movedim(0, axis(name)).contiguous()

    return _resized(base, dict.fromkeys(names, rows), read, ties)


def rowed(model: Weights, base: Weights, names: Mapping[str, str], places: Tensor, ties: Mapping[str, str]) -> Weights:
    """Return a model whose tables have the base's rows, those that it lacks being the base's.

    Args:
        model: The model.
        base: The base with the rows of the result.
        names: The model's tables to what they are called in the base.
        places: ``[R]`` the model's row for each row of the result; -1 where it has none.
        ties: Alias to canonical name of what stays tied.
    """
    here = (places >= 0).nonzero().flatten()
    there = places[here]

    def read(name: str) -> Tensor:
        if name not in names:
            return model[name]
        dtype = torch.promote_types(model.dtype(name), base.dtype(names[name]))
        table = base[names[name]].to(dtype).movedim(axis(name), 0).clone()
        table[here] = model[name].to(dtype).movedim(axis(name), 0)[there]
        return table.movedim(0, axis(name)).contiguous()

    return _resized(model, dict.fromkeys(names, len(places)), read, ties, {n: base.dtype(o) for n, o in names.items()})


def _resized(
    weights: Weights,
    rows: Mapping[str, int],
    read: Callable[[str], Tensor],
    ties: Mapping[str, str],
    types: Mapping[str, torch.dtype] | None = None,
) -> Weights:
    specs = {}
    for name in weights:
        shape, dtype = list(weights.shape(name)), weights.dtype(name)
        if name in rows:
            shape[axis(name)] = rows[name]
            dtype = torch.promote_types(dtype, (types or {}).get(name, dtype))
        specs[name] = Spec(tuple(shape), dtype)
    return Weights(specs, read, ties=ties, origin=weights.origin)


def kept_ties(weights: Weights, names: Mapping[str, str], base: Weights) -> dict[str, str]:
    """Return the ties of a model that may stay: of tables, those that are one tensor of the base too.

    Args:
        weights: The model.
        names: Its tables to what they are called in the base.
        base: The base.
    """

    def one(alias: str, name: str) -> bool:
        if (alias in names) != (name in names):
            return False
        return alias not in names or _canonical(base, names[alias]) == _canonical(base, names[name])

    return {alias: name for alias, name in weights.ties.items() if one(alias, name)}


def are_one(weights: Weights, one: str, other: str) -> bool:
    """Say whether two names are one tensor."""
    return _canonical(weights, one) == _canonical(weights, other)


def _canonical(weights: Weights, name: str) -> str:
    return weights.ties.get(name, name)


def require_same_order(base: Tensor, other: Tensor, origins: tuple[str, str]) -> None:
    """Refuse to match rows by their place where those of two tables differ by more than fine-tuning does.

    Args:
        base: ``[V, n]`` the base's table.
        other: ``[W, n]`` the other's.
        origins: What messages call both.

    Raises:
        CheckpointError: If the rows at one place are not alike.
    """
    count = min(len(base), len(other))
    one, two = (wide(table[:count]) - wide(table[:count]).mean(0) for table in (base, other))
    norms = torch.linalg.vector_norm(one) * torch.linalg.vector_norm(two)
    cosine = float((one * two).sum() / norms) if norms > 0 else 1.0
    if not cosine >= ALIKE:
        raise CheckpointError(
            f"{origins[0]} and {origins[1]} have vocabularies of different size, one of them has no tokenizer, and "
            f"their rows are not alike (cosine {cosine:.2f} about the mean): neither vocabulary begins with the other. "
            "Put the tokenizer's files into both folders"
        )
