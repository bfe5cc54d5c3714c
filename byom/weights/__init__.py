"""`Weights`: lazy named tensors with the algebra of a vector space, dense or low-rank."""

from byom.weights.weights import Spec, Weights, require_match

__all__ = ["Spec", "Weights", "require_match"]
