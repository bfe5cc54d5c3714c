"""`Weights`: lazy named tensors with the algebra of a vector space, dense or low-rank."""

from byom.weights.match import matched, require_match
from byom.weights.placed import placed
from byom.weights.spec import Spec
from byom.weights.weights import Weights

__all__ = ["Spec", "Weights", "matched", "placed", "require_match"]
