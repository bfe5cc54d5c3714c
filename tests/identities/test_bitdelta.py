"""BitDelta: the golden vector, exact cases, the least-squares scale, scale equivariance, and the bytes it takes."""

import pytest
import torch
from torch.testing import assert_close

from byom.errors import CheckpointError, OptionError
from byom.variants.base import Shared
from byom.variants.bitdelta import BitDelta
from byom.weights import Weights
from tests.problems import models, random


def served(delta, name="w", **options):
    target = Weights.of({name: delta})
    packed = BitDelta(**options).delta(target, target * 0)
    return packed, packed.apply(target * 0)[name]


def test_golden():
    delta = torch.tensor([[5.0, -4, 0], [-0.5, 1, 1.5]])
    assert served(delta)[1].tolist() == [[2, -2, 2], [-2, 2, 2]]  # 12 / 6, and no change counts as positive


@pytest.mark.parametrize("shape", [(3, 5), (8, 8), (40, 24)])
def test_one_magnitude_is_exact(shape):
    signs = random(*shape).sign()
    assert torch.equal(served(0.75 * signs)[1], 0.75 * signs)


def test_no_other_scale_is_nearer():
    delta = random(40, 24)
    put_back = served(delta)[1]
    error = float((delta - put_back).norm())
    assert error**2 == pytest.approx(float(delta.norm() ** 2 - delta.numel() * delta.abs().mean() ** 2), rel=1e-9)
    for factor in (0.9, 0.99, 1.01, 1.1):
        assert float((delta - factor * put_back).norm()) > error


@pytest.mark.parametrize("factor", [0.25, 3.0])
def test_longer_task_vectors_are_served_as_much_farther(factor):
    assert_close(served(factor * random(6, 4))[1], factor * served(random(6, 4))[1], rtol=1e-12, atol=0)


def test_experts_of_a_mixture_have_a_scale_each():
    name, stack = "mlp.experts.gate_up_proj", torch.stack([random(6, 4), 10 * random(6, 4, seed=1), torch.zeros(6, 4)])
    packed, put_back = served(stack, name)
    assert packed.parts[name]["scale"].shape == (3,)
    assert all(torch.equal(put_back[e], served(stack[e])[1]) for e in range(3))


def test_on_a_merged_model_it_is_the_same_of_what_is_left():
    base, tuned = models(1)
    target, merged = Weights.of(tuned["task1"]), Weights.of(base) * 0.5
    one, other = (BitDelta(reference=kind).delta(target, merged).apply(merged) for kind in ("pretrained", "merged"))
    assert (BitDelta().on, BitDelta(reference="merged").on) == ("pretrained", "merged")
    assert torch.equal(one["layer.weight"], other["layer.weight"])


@pytest.mark.parametrize("shape", [(3, 5), (16, 8), (40, 24)])
def test_it_takes_a_bit_an_entry_and_one_number(shape):
    packed, _ = served(random(*shape).float())
    assert packed.nbytes == -(-shape[0] * shape[1] // 8) + 4 and packed.stored_parameters == 1


def test_other_tensors_are_stored_whole_and_unchanged_ones_not_at_all():
    base, tuned = models(1, torch.bfloat16)
    target, reference = Weights.of(tuned["task1"]), Weights.of(base)
    packed = BitDelta().delta(target, reference)
    put_back = packed.apply(reference)
    for name in ("embed", "layer.bias", "one", "scale"):
        assert torch.equal(put_back[name], target[name])
    assert "signs" in packed.parts["layer.weight"]
    assert "signs" in BitDelta(exclude=()).delta(target, reference).parts["embed"]
    assert BitDelta().delta(reference, reference).nbytes == 0


def test_parts_that_do_not_fit_are_refused():
    parts = served(random(6, 4))[0].parts["w"]
    with pytest.raises(CheckpointError, match="a mask of 28 places is 4 bytes, not 3"):
        BitDelta().unpack(parts, Shared(torch.zeros(7, 4)))
    with pytest.raises(CheckpointError, match=r"scales of shape \(\) do not fit a tensor of shape \(2, 6, 2\)"):
        BitDelta().unpack(parts, Shared(torch.zeros(2, 6, 2)))


def test_options_out_of_range_are_refused():
    with pytest.raises(OptionError, match=r"byom\.reference=tuned is not known; use pretrained or merged"):
        BitDelta(reference="tuned")
    with pytest.raises(OptionError, match=r"byom\.exclude=\*embed\* is not a list of patterns"):
        BitDelta(exclude="*embed*")
