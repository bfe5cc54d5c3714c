"""Whether two sets of weights belong to one architecture."""

from __future__ import annotations

from typing import TYPE_CHECKING

from byom.errors import WeightsMismatch, listed

if TYPE_CHECKING:
    from byom.weights.weights import Weights


def require_match(a: Weights, b: Weights) -> None:
    """Check that two sets of weights have the same names, shapes and ties.

    Raises:
        WeightsMismatch: With the names that only one has, or the first shapes or ties that differ.
    """
    missing, extra = sorted(set(a) - set(b)), sorted(set(b) - set(a))
    if missing or extra:
        raise WeightsMismatch(
            f"{a.origin} and {b.origin} have different tensors: {listed(missing)} only in the first, "
            f"{listed(extra)} only in the second. Merge checkpoints of one architecture, without heads"
        )
    shapes = [f"'{n}' {a.shape(n)} and {b.shape(n)}" for n in a if a.shape(n) != b.shape(n)]
    if shapes:
        raise WeightsMismatch(
            f"{a.origin} and {b.origin} have tensors of different shape: {listed(shapes)}. "
            "Exclude task heads and resized vocabularies before merging"
        )
    ties = [f"'{n}' and '{a.ties.get(n) or b.ties[n]}'" for n in a if a.ties.get(n) != b.ties.get(n)]
    if ties:  # one of two values would be lost without a word
        raise WeightsMismatch(
            f"{a.origin} and {b.origin} tie different tensors: {listed(ties)} are one tensor in one of them only. "
            "Tie them in both, or clone one of them before Weights.of"
        )
