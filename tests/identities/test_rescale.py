"""Rescaling of what is put back: each factor, where none is needed, and what stays as it was."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from byom.errors import OptionError
from byom.variants.fft import ByomFft
from byom.variants.post_pruning import PostPruning
from byom.weights import Weights
from tests.problems import same

SCOPES = ["global", "tensor", "row"]


def pair():
    generator = torch.Generator().manual_seed(0)
    reference = {"a": torch.randn(40, 30, generator=generator), "b": torch.randn(50, generator=generator)}
    target = {n: v + torch.randn(v.shape, generator=generator) ** 3 for n, v in reference.items()}
    return Weights.of(target), Weights.of(reference)


def served(variant, target, reference):
    return variant.delta(target, reference).apply(reference)


def factor(rescale, density, differences, kept):
    return {
        "norm": lambda: differences.norm() / kept.norm(),
        "free": lambda: -math.log10(density) * kept.abs().mean() / differences.abs().mean(),
        "dare": lambda: 1 / density,
    }[rescale]()


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("density", [0.05, 0.3])
@pytest.mark.parametrize("rescale", ["norm", "free", "dare"])
@pytest.mark.parametrize("kind", [ByomFft, PostPruning])
def test_kept_differences_are_multiplied_and_the_rest_is_the_reference(kind, rescale, density, scope):
    target, reference = pair()
    plain = served(kind(density, scope), target, reference)
    found = served(kind(density, scope, rescale), target, reference)
    for name in target:
        chosen = plain[name] != reference[name]
        differences = (target[name] - reference[name]).double()
        kept = differences[chosen]
        assert torch.equal(found[name][~chosen], reference[name][~chosen])
        if len(kept):
            expected = reference[name][chosen] + factor(rescale, density, differences, kept) * kept
            assert_close(found[name][chosen].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scope", SCOPES)
def test_the_norm_of_a_tensors_difference_comes_back(scope):
    target, reference = pair()
    found = served(ByomFft(0.1, scope, "norm"), target, reference)
    for name in target:
        whole, back = target[name] - reference[name], found[name] - reference[name]
        assert back.norm() == 0 or math.isclose(back.norm(), whole.norm(), rel_tol=1e-5)


@pytest.mark.parametrize("rescale", ["norm", "free", "dare"])
def test_where_everything_is_kept_nothing_is_rescaled(rescale):
    target, reference = pair()
    assert same(served(ByomFft(1.0, "global", rescale), target, reference), target)
    assert same(served(ByomFft(0.0, "global", rescale), target, reference), reference)
    assert same(served(ByomFft(0.5, "global", rescale), reference, reference), reference)


def test_golden():
    reference = Weights.of({"a": torch.zeros(10)})
    target = Weights.of({"a": torch.tensor([10.0, *[1.0] * 9])})
    values = {
        rescale: served(ByomFft(0.1, "tensor", rescale), target, reference)["a"][0].item()
        for rescale in ("none", "norm", "free", "dare")
    }
    expected = {"none": 10.0, "norm": math.sqrt(109), "free": 10 * 10 / 1.9, "dare": 100.0}
    assert values == pytest.approx(expected, rel=1e-6)


def test_it_costs_no_byte_and_no_position():
    target, reference = pair()
    deltas = [replace(ByomFft(0.1), rescale=rescale).delta(target, reference) for rescale in ("none", "norm")]
    assert deltas[0].nbytes == deltas[1].nbytes
    for name in target:
        assert deltas[0].parts[name].keys() == deltas[1].parts[name].keys()


def test_an_unknown_rule_is_refused():
    with pytest.raises(OptionError, match="byom.rescale=l1"):
        PostPruning(rescale="l1")
