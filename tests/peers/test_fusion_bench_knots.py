"""KnOTS beside fusion-bench, which has the shared basis and the coordinates, and no merging in them.

They agree in both up to the signs of the directions. They differ

- in the threshold: 1e-4 whatever the scale there, 1e-6 of the largest singular value here;
- in the shared side: outputs there, outputs or inputs here.
"""

import pytest
import torch
from torch.testing import assert_close

from byom.merge.base import Problem
from byom.merge.knots import KnowledgeOrientationThroughSvd
from byom.merge.ties import Ties
from byom.weights import Weights
from tests.peers.fusion import PEER, there

pytestmark = PEER

COMPARES = {"knots": "equal coordinates up to signs, and TIES in them"}
SHAPES = [(9, 4), (4, 9), (12, 12)]


def deltas(shape, rank=2, tasks=3):
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(tasks, side, rank, generator=generator, dtype=torch.float64) for side in shape)
    return left @ right.mT


def posed(changes):
    zero = Weights.of({"w": torch.zeros_like(changes[0])})
    return Problem(zero, {str(t): Weights.of({"w": change}) for t, change in enumerate(changes)})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_basis_and_the_coordinates(shape):
    changes = deltas(shape)
    theirs, values, blocks = there().subspace_alignment(list(changes))
    ours = KnowledgeOrientationThroughSvd().plan(posed(changes)).bases["w"]
    signs = (ours * theirs).sum(0)
    assert_close(signs.abs(), torch.ones(len(values), dtype=torch.float64))
    for change, block in zip(changes, blocks, strict=True):
        assert_close(ours.T @ change, signs[:, None] * values[:, None] * block)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ties_in_their_coordinates(shape):
    changes = deltas(shape)
    theirs, values, blocks = there().subspace_alignment(list(changes))
    coordinates = posed(torch.stack([values[:, None] * block for block in blocks]))
    merged = KnowledgeOrientationThroughSvd(Ties(0.4), scale=0.6)(posed(changes))["w"]
    assert_close(merged, 0.6 * theirs @ Ties(0.4)(coordinates)["w"])


def test_small_changes_vanish_there_and_not_here():
    changes = 1e-6 * deltas((9, 4))
    assert not len(there().subspace_alignment(list(changes))[1])
    assert KnowledgeOrientationThroughSvd().plan(posed(changes)).bases["w"].shape == (9, 6)
