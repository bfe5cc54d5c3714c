"""Agreement of several sets of weights in names and shapes."""

from __future__ import annotations

from byom.errors import WeightsMismatch, listed
from byom.weights.spec import Tensors, W
from byom.weights.ties import together


def matched(*models: W) -> tuple[W, ...]:
    """Return models of the same names and shapes with the same ties; see `byom.weights.ties.together`.

    Raises:
        WeightsMismatch: If names or shapes differ.
    """
    for other in models[1:]:
        require_match(models[0], other)
    return together(*models)


def require_match(a: Tensors, b: Tensors) -> None:
    """Check that two sets of weights have the same names and shapes.

    Raises:
        WeightsMismatch: With the names that only one has, or the first shapes that differ.
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
