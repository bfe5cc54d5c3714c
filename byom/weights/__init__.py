"""`Weights`: lazy named tensors with the algebra of a vector space, dense or low-rank."""

from byom.weights.match import require_match
from byom.weights.weights import Spec, Weights

__all__ = ["Spec", "Weights", "require_match"]
