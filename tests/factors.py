"""Small merging problems of low-rank changes, posed by their factors and as matrices."""

import torch
from torch.testing import assert_close

from byom.merge.base import Problem
from byom.weights import Weights
from byom.weights.lowrank import Adapted, Piece

SHAPES = {"tall": (12, 5), "wide": (5, 12), "square": (9, 9)}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


def factors(tasks=3, rank=2, shapes=SHAPES):
    """Return task to name to ``(left, right)``; the third task's rank is one higher."""
    ranks = [rank + (t == 2) for t in range(tasks)]
    return {
        str(t): {
            name: (normal(m, r, seed=10 * t + i), normal(r, n, seed=100 + 10 * t + i))
            for i, (name, (m, n)) in enumerate(shapes.items())
        }
        for t, r in enumerate(ranks)
    }


def base(shapes=SHAPES, dtype=torch.float64):
    return Weights.of({name: normal(*shape, seed=7).to(dtype) for name, shape in shapes.items()}, "pre-trained")


def dense(given, zero=None):
    zero = zero or base()
    experts = {t: Weights.of({n: zero[n] + a @ b for n, (a, b) in pairs.items()}, t) for t, pairs in given.items()}
    return Problem(zero, experts)


def thin(given, zero=None):
    zero = zero or base()
    experts = {t: Adapted(zero, {n: [Piece(0, *pair)] for n, pair in pairs.items()}) for t, pairs in given.items()}
    return Problem(zero, experts)


def close(a, b, **tolerances):
    for name in a:
        assert_close(a[name], b[name], **tolerances)
