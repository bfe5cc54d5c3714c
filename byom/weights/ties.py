"""Tied tensors: one tensor under several names, in one model or in several that are compared or merged."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch

from byom.storage.declared import declared
from byom.weights.spec import Files, Tensors, W

T = TypeVar("T")
MOST = 4
"""Tensors of one shape among which equal ones are looked for: more are layers, and reading them all takes long."""
SHARED = re.compile(r"(^|\.)shared\.")
OUTPUT = re.compile(
    r"(^|[._])(heads?|cls|predictions?|pred_layer|projector|projection|proj_out|out_proj|embed_out|lm_loss|mlm_score"
    r"|output)(?=[._]|$)"
)
INPUT = re.compile(r"(^|[._])(wte|\w*emb\w*|tok\w*)(?=[._]|$)")


def kept(names: Iterable[str]) -> str:
    """Return the one of several tied names under which files hold the tensor: the input embedding's.

    It is the name that transformers keeps of those its classes tie.

    Args:
        names: Names of one tensor, at least one.
    """
    return min(names, key=_rank)


def _rank(name: str) -> tuple[int, int, str]:
    if SHARED.search(name):
        kind = 0
    elif OUTPUT.search(name):
        kind = 3
    else:
        kind = 1 if INPUT.search(name) else 2
    return kind, name.count("."), name


def groups(ties: Mapping[str, str]) -> dict[str, list[str]]:
    """Return canonical name to all names of a tensor, for tensors with several."""
    every: dict[str, list[str]] = {}
    for alias, name in sorted(ties.items()):
        every.setdefault(name, [name]).append(alias)
    return every


def unwritten(ties: Mapping[str, str], doubled: Collection[str] = ()) -> dict[str, str]:
    """Return the names that files leave out, each to the one under which they hold the tensor.

    Args:
        ties: Alias to canonical name.
        doubled: Tied names that files hold each.
    """
    left: dict[str, str] = {}
    for every in groups(ties).values():
        own = [name for name in every if name in doubled] or [kept(every)]
        left |= {name: kept(own) for name in every if name not in own}
    return left


def joined(every: Iterable[Sequence[str]]) -> dict[str, str]:
    """Return alias to the alphabetically first name, for groups of names of one tensor each."""
    return {alias: first for first, *aliases in map(sorted, filter(None, every)) for alias in aliases}


class FileTies(NamedTuple):
    """Ties of the tensors in files.

    Args:
        ties: Alias to canonical name, names that the files do not hold included.
        stored: Name that the files do not hold to the one under which they hold the tensor.
        doubled: Tied names that the files hold each.
    """

    ties: dict[str, str]
    stored: dict[str, str]
    doubled: frozenset[str]

    def renamed(self, read: Callable[[str], T]) -> Callable[[str], T]:
        """Return what reads by any name what the files hold under one of them."""
        return lambda name: read(self.stored.get(name, name))


def file_ties(file: Files) -> FileTies:
    """Return which names are one tensor, from byom's notes in files and from the configuration beside them.

    Tensors that the configuration ties and the files hold differently are two: they were trained apart.

    Args:
        file: The files.
    """
    folder = file.path if file.path.is_dir() else file.path.parent
    noted = groups(file.ties)
    known = {name for every in noted.values() for name in every}
    said = [group for group in declared(folder, file.specs) if not known & set(group)]
    every = [*noted.values(), *(_truly_one(file, group) for group in said)]
    held = {tuple(group): [name for name in group if name in file.specs] for group in every}
    stored = {name: kept(own) for group, own in held.items() for name in group if name not in file.specs}
    return FileTies(joined(every), stored, frozenset(n for own in held.values() if len(own) > 1 for n in own))


def _truly_one(file: Files, group: Sequence[str]) -> list[str]:
    """Return which names that are declared one tensor are one: all that files do not hold differently."""
    first = kept(name for name in group if name in file.specs)
    return [name for name in group if name not in file.specs or _same(file, first, name)]


def _same(file: Files, a: str, b: str) -> bool:
    return a == b or (file.specs[a] == file.specs[b] and torch.equal(file.read(a), file.read(b)))


def common(models: Sequence[Tensors]) -> dict[str, str]:
    """Return the ties that all models have: alias to the alphabetically first of the names.

    Args:
        models: Weights of the same names.
    """
    tied = sorted({name for model in models for pair in model.ties.items() for name in pair})
    first: dict[tuple[str, ...], str] = {}
    places = {name: tuple(model.ties.get(name, name) for model in models) for name in tied}
    return {name: first[at] for name, at in places.items() if first.setdefault(at, name) != name}


def together(*models: W) -> tuple[W, ...]:
    """Return models that tie the same tensors: what one of them holds as two is two in all, and no value is lost.

    Args:
        models: Weights of the same names.

    Returns:
        The models; the same objects where nothing had to be untied.
    """
    ties = common(models)
    return tuple(model if model.ties == ties else model.tied(ties) for model in models)


def united(base: W, *others: W) -> tuple[W, ...]:
    """Return models that tie the same tensors, copies that are equal in all of them included.

    Args:
        base: Weights.
        others: Further weights of the same names.
    """
    base, *rest = together(base, *others)
    if not (found := copies(base, rest)):
        return base, *rest
    names = {name for pair in found.items() for name in pair}
    every = groups(base.ties)
    for alias, name in found.items():
        every[name] = [*every.pop(name, [name]), *every.pop(alias, [alias])]
    return tuple(model.tied(joined(every.values()), doubled=names) for model in (base, *rest))


def copies(base: Tensors, others: Iterable[Tensors]) -> dict[str, str]:
    """Find tensors that are equal in every model, as a tied one is that was written twice: alias to first name.

    Constant tensors, which zeros and ones at a start of training are, do not count, nor does what layers repeat.

    Args:
        base: Weights.
        others: Further weights of the same names.
    """
    shapes: dict[object, list[str]] = {}
    for name in base.mergeable():
        shapes.setdefault((base.shape(name), base.dtype(name)), []).append(name)
    models = [base, *others]
    found: dict[str, str] = {}
    for names in (each for each in shapes.values() if 1 < len(each) <= MOST):
        for place, name in enumerate(names):
            earlier = (n for n in names[:place] if n not in found)
            match = next((n for n in earlier if all(_equal(model, n, name) for model in models)), None)
            if match and not _constant(base, name):
                found[name] = match
    return found


def _equal(weights: Tensors, a: str, b: str) -> bool:
    left, right = weights[a], weights[b]
    return torch.equal(left.reshape(-1)[:64], right.reshape(-1)[:64]) and torch.equal(left, right)


def _constant(weights: Tensors, name: str) -> bool:
    flat = weights[name].reshape(-1)
    return bool((flat == flat[:1]).all())
