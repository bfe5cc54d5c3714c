"""RegMean and Fisher merging beside fusion-bench, given the same statistics.

They agree to rounding

- RegMean: with ``ridge=0`` and Grams whose sum is well conditioned; ours has a small ridge by default;
- Fisher merging: with ``minimal_fisher_weight=0`` and Fishers above our floor: they add it, here it is a floor.

They differ

- in what is captured: their hooks see modules of the type nn.Linear, and padding rows; nn.MultiheadAttention's
  projections call no hook, so their attention weights are averaged. Ours sees the products themselves;
- in a singular sum of Grams: they invert it and fail or return garbage, here what has no input gets the mean;
- in the Fisher itself: theirs squares the gradient of a sum over batch and classes.
"""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from byom.merge.base import Problem
from byom.merge.fisher import FisherMerging
from byom.merge.regmean import RegMean
from byom.statistics.gram import grams
from byom.weights import Weights
from tests.peers.fusion import PEER, there

pytestmark = PEER

COMPARES = {
    "regmean": "equal for the same Grams, with ridge=0 and a sum that is not singular",
    "fisher": "equal for the same Fishers above the floor, which they add, with normalise=none and global",
}
SHAPES = {"fc.weight": (6, 4), "out.weight": (3, 6), "norm.scale": (4,), "table": (5, 3)}


def random(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def experts(tasks):
    return [
        {name: random(*shape, seed=10 * t + i) for i, (name, shape) in enumerate(SHAPES.items())} for t in range(tasks)
    ]


def posed(states, kind, statistics):
    named = {str(t): Weights.of(state) for t, state in enumerate(states)}
    base = Weights.of({name: torch.zeros_like(value) for name, value in states[0].items()})
    return Problem(base, named, {kind: {str(t): Weights.of(s) for t, s in enumerate(statistics)}})


def listed(states):
    return {name: [state[name] for state in states] for name in SHAPES}


def outer(rows):
    return rows.mT @ rows / len(rows)


@pytest.mark.parametrize("off_diagonal", [1.0, 0.9, 0.1, 0.0])
@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_regmean(tasks, off_diagonal):
    states = experts(tasks)
    held = [{n: outer(random(40, SHAPES[n][1], seed=t)) for n in ("fc.weight", "out.weight")} for t in range(tasks)]
    theirs = [{name.removesuffix(".weight"): gram.float() for name, gram in one.items()} for one in held]
    expected = there().merging_with_regmean_weights(
        listed([{n: v.float() for n, v in s.items()} for s in states]), theirs, off_diagonal
    )
    found = RegMean(off_diagonal=off_diagonal, ridge=0.0)(posed(states, "gram", held))
    for name in SHAPES:
        assert_close(found[name].float(), expected[name], rtol=1e-3, atol=1e-4)


def test_regmean_of_matrices_stored_in_x_out():
    states, held = experts(3), [{"fc": outer(random(40, 6, seed=t)).float()} for t in range(3)]
    expected = there().merging_with_regmean_weights(
        {"fc.weight": [state["fc.weight"].float() for state in states]}, held, 0.6, weight_transpose=False
    )
    ours = [{"fc.weight": gram["fc"].unsqueeze(0)} for gram in held]
    found = RegMean(off_diagonal=0.6, ridge=0.0)(posed(states, "gram", ours))["fc.weight"]
    assert_close(found.float(), expected["fc.weight"], rtol=1e-3, atol=1e-4)


def test_their_hooks_miss_attention_and_ours_do_not():
    module = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True).eval()
    kinds = tuple(there().RegMeanAlgorithm._include_module_type)
    called = []
    for name, part in module.named_modules():
        if isinstance(part, kinds):
            part.register_forward_hook(lambda *_, name=name: called.append(f"{name}.weight"))
    x = torch.randn(2, 3, 4)
    with torch.no_grad():
        module(x)
    found = grams(module, [{"src": x}], [name for name, _ in module.named_parameters()])
    assert set(called) == {"linear1.weight", "linear2.weight"}
    assert set(found) == {*called, "self_attn.in_proj_weight", "self_attn.out_proj.weight"}


@pytest.mark.parametrize(("normalise", "theirs"), [("none", False), ("global", True)])
def test_fisher(normalise, theirs):
    states = experts(4)
    fishers = [{n: random(*s, seed=50 + t).square() * 10**t + 0.01 for n, s in SHAPES.items()} for t in range(4)]
    weights = (0.1, 0.5, 0.3, 0.1)
    expected = there().merging_with_fisher_weights(
        listed(states),
        fishers,
        torch.tensor(weights).double(),
        normalize_fisher_weight=theirs,
        minimal_fisher_weight=0.0,
    )
    found = FisherMerging(normalise=normalise, weights=weights)(posed(states, "fisher", fishers))
    for name in SHAPES:
        assert_close(found[name], expected[name], rtol=1e-5, atol=1e-7)


def test_they_add_what_is_a_floor_here():
    states, fishers = [{"w": torch.tensor([v])} for v in (1.0, 0.0)], [{"w": torch.tensor([v])} for v in (3.0, 1.0)]
    expected = there().merging_with_fisher_weights(
        {"w": [s["w"] for s in states]},
        fishers,
        torch.ones(2),
        normalize_fisher_weight=False,
        minimal_fisher_weight=1.0,
    )
    assert_close(expected["w"], torch.tensor([4 / 6]))
    assert_close(FisherMerging(floor=1.0)(posed(states, "fisher", fishers))["w"], torch.tensor([3 / 4]))
