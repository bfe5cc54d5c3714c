"""T-Switch: the golden vector, the norm of every tensor, exact cases, and the bits a parameter takes."""

import pytest
import torch

from byom.errors import OptionError
from byom.variants.t_switch import BinaryTaskSwitch, binarise
from byom.weights import Weights
from tests.problems import FLOATS, models

GOLDEN = [5, -4, 3, -2, 1, 0.5, -0.1, 0.2, 0.3, -0.7]


def served(delta, drop):
    target = Weights.of({"w": torch.as_tensor(delta, dtype=torch.float64)})
    return BinaryTaskSwitch(drop).delta(target, target * 0).apply(target * 0)["w"]


def test_golden():
    found = served(GOLDEN, 0.6).tolist()
    assert found == pytest.approx([4.082483, -4.082483, 4.082483, *[0] * 7], abs=1e-6)


def test_every_tensor_keeps_the_norm_of_the_entries_it_keeps():
    base, tuned = models(1, torch.float64)
    delta = BinaryTaskSwitch(0.6).delta(Weights.of(tuned["task1"]), Weights.of(base))
    moved = delta.apply(Weights.of(base))
    for name in FLOATS:
        difference = (tuned["task1"][name] - base[name]).reshape(-1)
        got = (moved[name] - base[name]).reshape(-1)
        kept = got.abs() > 1e-12
        assert torch.equal(got.sign()[kept], difference.sign()[kept])
        assert float(got.norm()) == pytest.approx(float(difference[kept].norm()), rel=1e-9)
        assert bool(kept.any()) == bool(len(difference))


@pytest.mark.parametrize("shape", [(), (1,), (7,), (4,), (3, 5), (3, 5, 7)])
def test_one_magnitude_is_exact_when_nothing_is_dropped(shape):
    signs = torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(0)).double()
    assert torch.allclose(served(2.5 * signs, 0.0), 2.5 * signs, rtol=1e-12)


@pytest.mark.parametrize("drop", [0.0, 0.3, 0.6, 0.9, 0.99])
def test_exactly_the_stated_number_of_each_side_survives(drop):
    values = torch.randint(-4, 5, (1000,), generator=torch.Generator().manual_seed(0)).float()
    signs, _ = binarise(values, drop)
    for side in (1, -1):
        count = int((values * side > 0).sum())
        assert int((signs == side).sum()) == (int(count * (1 - drop) + 1e-9) or count)


def test_counts_do_not_suffer_from_the_rounding_of_1_minus_drop():
    signs, scale = binarise(torch.arange(1.0, 11.0), 0.9)
    assert signs.tolist() == [*[0] * 9, 1] and scale == 10


def test_ties_go_to_the_lowest_position():
    assert binarise(torch.tensor([1.0, -1, 1, -1, 1, 1, -1, -1]), 0.5)[0].tolist() == [1, -1, 1, -1, 0, 0, 0, 0]


def test_a_side_too_small_to_keep_any_is_kept_whole():
    assert binarise(torch.tensor([3.0, -1, 4, 5, 6, 7]), 0.6)[0].tolist() == [0, -1, 0, 0, 1, 1]


def test_a_tensor_without_axes_is_stored_as_it_is():
    base, tuned = models(1, torch.bfloat16)
    moved = BinaryTaskSwitch().delta(Weights.of(tuned["task1"]), Weights.of(base)).apply(Weights.of(base))
    assert torch.equal(moved["scale"], tuned["task1"]["scale"])


@pytest.mark.parametrize(("drop", "expected"), [(0.0, 2.0), (0.6, 1.4), (0.9, 0.694)])
def test_bits_a_parameter(drop, expected):
    values = torch.randn(1000, 100, generator=torch.Generator().manual_seed(0))
    delta = BinaryTaskSwitch(drop).delta(Weights.of({"w": values}), Weights.of({"w": values * 0}))
    assert delta.stored_parameters == 1
    assert 8 * (delta.nbytes - 4) / values.numel() == pytest.approx(expected, rel=0.01)


def test_dropping_all_is_refused():
    with pytest.raises(OptionError, match=r"byom\.drop=1 would keep nothing"):
        BinaryTaskSwitch(1.0)
    with pytest.raises(OptionError, match=r"byom\.drop=60 is not a fraction"):
        BinaryTaskSwitch(60)
