"""LiNeS: factors by depth, the norm that alpha keeps, and what is in no block."""

import pytest
import torch
from torch.testing import assert_close

from byom.errors import OptionError
from byom.merge.base import Problem
from byom.merge.lines import LayerIncreasingNetworkScaling, depths
from byom.merge.task_arithmetic import TaskArithmetic
from byom.merge.ties import Ties
from byom.weights import Weights

NAMES = ["embed.weight", "blocks.0.weight", "blocks.1.weight", "blocks.2.weight", "head.bias"]
DEPTHS = {"blocks.0.weight": 0.0, "blocks.1.weight": 0.5, "blocks.2.weight": 1.0}


def states(tasks):
    generator = torch.Generator().manual_seed(0)
    return [{n: torch.randn(4, 3, generator=generator, dtype=torch.float64) for n in NAMES} for _ in range(tasks + 1)]


def posed(base, *experts):
    return Problem(Weights.of(base), {str(t): Weights.of(state) for t, state in enumerate(experts)})


def test_depths():
    assert depths(NAMES) == DEPTHS
    assert depths(["a.7.b", "c.0.d", "e"]) == {"a.7.b": 1.0, "c.0.d": 0.0}
    assert depths(["a.0.b", "c"]) == {"a.0.b": 0.0}
    assert depths(["blocks.10.mlp.2.weight", "blocks.5.x"]) == {"blocks.10.mlp.2.weight": 1.0, "blocks.5.x": 0.5}


@pytest.mark.parametrize("then", [TaskArithmetic(0.3), Ties(0.5)], ids=lambda method: method.title)
def test_a_block_is_scaled_by_its_depth(then):
    base, *experts = states(3)
    plain = then(posed(base, *experts))
    scaled = LayerIncreasingNetworkScaling(then, alpha=0.4, beta=0.8)(posed(base, *experts))
    for name in NAMES:
        factor = 0.4 + 0.8 * DEPTHS.get(name, 0.0)
        assert_close(scaled[name], base[name] + factor * (plain[name] - base[name]))


def test_alpha_keeps_the_norm_of_the_average():
    base, *experts = states(3)
    summed = {n: sum(e[n] - base[n] for e in experts) for n in NAMES}
    average = {n: base[n] + summed[n] / 3 for n in NAMES}
    for scale in (0.3, 1.0):  # what sums alone is brought to the average, whatever its scale
        merged = LayerIncreasingNetworkScaling(TaskArithmetic(scale), beta=0.0)(posed(base, *experts))
        assert all(torch.allclose(merged[n], average[n]) for n in NAMES)
    ties = Ties(0.5)(posed(base, *experts))
    merged = LayerIncreasingNetworkScaling(Ties(0.5), beta=0.0)(posed(base, *experts))
    alpha = sum(summed[n].abs().sum() for n in NAMES) / sum((ties[n] - base[n]).abs().sum() for n in NAMES) / 3
    assert all(torch.allclose(merged[n], base[n] + alpha * (ties[n] - base[n])) for n in NAMES)


def test_golden():
    base = {name: torch.zeros(1) for name in NAMES}
    one, two = ({name: torch.tensor([value]) for name in NAMES} for value in (1.0, 3.0))
    merged = LayerIncreasingNetworkScaling(TaskArithmetic(1.0), beta=0.25)(posed(base, one, two))  # alpha 4 / 4 / 2
    assert [merged[name].item() for name in NAMES] == [2.0, 2.0, 2.5, 3.0, 2.0]


def test_nothing_moves_where_no_expert_does():
    base, _ = states(1)
    merged = LayerIncreasingNetworkScaling()(posed(base, base, base))
    assert all(torch.equal(merged[name], base[name]) for name in NAMES)


@pytest.mark.parametrize(
    "options", [{"alpha": "auto"}, {"beta": float("inf")}, {"beta": None}, {"alpha": True}], ids=str
)
def test_what_is_no_number_is_refused(options):
    with pytest.raises(OptionError, match=f"merge.{next(iter(options))}="):
        LayerIncreasingNetworkScaling(**options)
