"""Places of an adapter's modules in a base whose names start differently."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from byom.checkpoint.clip import open_clip_name
from byom.errors import CheckpointError, listed
from byom.weights import Weights
from byom.weights.fused import PARTS, Rows, located


class Shift(NamedTuple):
    """A change of the start of names.

    Args:
        dropped: What an adapter's names start with and the base's do not, for example ``bert.``.
        added: What takes its place, for example ``model.``.
    """

    dropped: str
    added: str

    def __call__(self, name: str) -> str:
        """Return an adapter's name as the base has it; one that starts otherwise stays as it is."""
        return self.added + name.removeprefix(self.dropped) if name.startswith(self.dropped) else name


def spelling(base: Weights) -> Callable[[str], str]:
    """Return how a name of transformers' CLIP image tower is spelt in a base; any other name stays as it is."""
    if any(".resblocks." in name for name in base):
        return open_clip_name
    return lambda name: name


def site(path: str, base: Weights) -> Rows | None:
    """Find the matrix of an adapted module, attention as one module (`nn.MultiheadAttention`) included."""
    fused = f"{path}.in_proj_weight"
    return Rows(fused, 0, base.shape(fused)[0]) if fused in base else located(path, base)


def parameter_rows(name: str, base: Weights) -> Rows | None:
    """Find a parameter by its name, in fused attention if need be."""
    if name in base:
        return Rows(name, 0, next(iter(base.shape(name)), 1))
    module, _, kind = name.rpartition(".")
    return located(module, base, kind) if kind in ("weight", "bias") else None


def shift(paths: Sequence[str], base: Weights, origin: str, remedy: str) -> Shift:
    """Find the one change of the names' start that places every module in the base.

    Names that fit as they are stay. Otherwise as little as possible is dropped.

    Args:
        paths: Paths of the adapted modules.
        base: The model.
        origin: What the adapter is called in messages.
        remedy: What to do if its modules are not in the base.

    Raises:
        CheckpointError: If no change fits, or more than one.
    """
    paths = sorted(paths)
    for dropped in _starts(paths):
        shifts = [Shift(dropped, added) for added in _additions(paths[0].removeprefix(dropped), base)]
        fits = [each for each in shifts if all(site(each(path), base) for path in paths)]
        if Shift("", "") in fits:
            return Shift("", "")
        if len(fits) > 1:
            where = listed(repr(each(paths[0])) for each in fits)
            raise CheckpointError(
                f"{origin}: '{paths[0]}' may be any of {where} in {base.origin}. Give the part of the model that was "
                "adapted as the base (Weights.select), or rename its parameters"
            )
        if fits:
            return fits[0]
    lost = [path for path in paths if not site(path, base)]
    raise CheckpointError(f"{origin} adapts modules that {base.origin} does not have: {listed(lost)}. {remedy}")


def _starts(paths: Sequence[str]) -> Iterator[str]:
    """Give what may be dropped: what all paths start with, but not the name and number of a stack of layers.

    Only a number in front of the whole path may go, where another follows (``0.auto_model.layer.3``).
    """
    yield ""
    start, split = "", [path.split(".") for path in paths]
    outer = all(any(part.isdigit() for part in parts[1:]) for parts in split)
    for depth, parts in enumerate(zip(*(parts[:-1] for parts in split), strict=False)):
        numbered = parts[0].isdigit() and (depth or not outer)
        if len(set(parts)) > 1 or numbered or any(path[depth + 1].isdigit() for path in split):
            return
        start += f"{parts[0]}."
        yield start


def _additions(path: str, base: Weights) -> list[str]:
    """Return what the base's names have before a module's path."""
    stem, _, last = path.rpartition(".")
    ends = [f"{path}.weight", f"{path}.in_proj_weight"]
    if last in PARTS and stem:
        ends += [f"{stem}.in_proj_weight", f"{stem}.weight"]
    starts = {name.removesuffix(end) for name in base for end in ends if name == end or name.endswith(f".{end}")}
    return sorted(starts)
