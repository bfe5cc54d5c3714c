"""Twin-Merging: BYOM-FFT by tensor, the mean of random compressions, singular values, and the uniform router."""

import pytest
import torch
from torch.testing import assert_close

from byom.errors import OptionError
from byom.merge.average import Average
from byom.variants.fft import ByomFft
from byom.variants.twin import TwinMerging
from byom.weights import Weights
from tests.problems import FLOATS, models, problem, same

DENSITIES = [0.0, 0.1, 0.2, 0.5, 1.0]
COMPRESSIONS = ["magnitude", "bernoulli", "svd"]


def pair(dtype=torch.float32):
    base, tuned = models(1, dtype)
    return Weights.of(tuned["task1"]), Weights.of(base)


def matrix(*shape, seed=0):
    return Weights.of({"w": torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)})


@pytest.mark.parametrize("density", DENSITIES)
def test_by_magnitude_it_is_byom_fft_by_tensor_where_tensors_have_two_axes(density):
    target, reference = (w.select(lambda name: name in ("embed", "layer.weight", "empty")) for w in pair())
    twin, fft = TwinMerging(density).delta(target, reference), ByomFft(density, "tensor").delta(target, reference)
    assert same(twin.apply(reference), fft.apply(reference))
    assert (twin.nbytes, twin.stored_parameters) == (fft.nbytes, fft.stored_parameters)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("compress", COMPRESSIONS)
def test_tensors_with_fewer_than_two_axes_are_the_target(density, compress):
    target, reference = pair(torch.bfloat16)
    put_back = TwinMerging(density, compress).delta(target, reference).apply(reference)
    assert all(torch.equal(put_back[name], target[name]) for name in ("layer.bias", "one", "scale"))


@pytest.mark.parametrize("compress", COMPRESSIONS)
def test_at_density_0_matrices_are_the_reference(compress):
    target, reference = pair()
    delta = TwinMerging(0.0, compress).delta(target, reference)
    assert not {"embed", "layer.weight"} & set(delta.parts)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_singular_values_give_the_target_up_to_rounding(dtype):
    target, reference = pair(dtype)
    put_back = TwinMerging(1.0, "svd").delta(target, reference).apply(reference)
    for name in FLOATS:
        assert_close(put_back[name], target[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("density", [0.1, 0.2, 0.29, 0.5])
def test_singular_values_dropped_are_the_error(density):
    target = matrix(40, 24)
    delta = TwinMerging(density, "svd").delta(target, target * 0)
    rank = int(density * 24 + 1e-9)
    dropped = torch.linalg.svdvals(target["w"])[rank:].norm()
    assert float((delta.apply(target * 0)["w"] - target["w"]).norm()) == pytest.approx(float(dropped), rel=1e-9)
    assert delta.stored_parameters == rank * (40 + 24 + 1)


def test_random_compressions_average_to_the_target():
    target, draws = matrix(8, 8), 500
    variants = [TwinMerging(0.25, "bernoulli", seed) for seed in range(draws)]
    total = sum(variant.delta(target, target * 0).apply(target * 0)["w"] for variant in variants)
    deviation = target["w"].abs() * (3 / draws) ** 0.5  # of a mean of draws that are 0 or 4 times the value
    assert torch.all((total / draws - target["w"]).abs() < 5 * deviation)


def test_random_entries_are_rescaled_and_about_as_many_as_stated():
    target = matrix(300, 300)
    put_back = TwinMerging(0.2, "bernoulli").delta(target, target * 0).apply(target * 0)["w"]
    assert torch.all((put_back == 0) | torch.isclose(put_back, 5 * target["w"], rtol=1e-12))
    assert int((put_back != 0).sum()) == pytest.approx(0.2 * 300 * 300, rel=0.03)


def test_randomness_is_that_of_the_seed_the_expert_and_the_parameter():
    one, two = matrix(50, 50), matrix(50, 50, seed=1)
    state = one.state() | {"v": one["w"] + 0}

    def positions(target, name="w", seed=0):
        put_back = TwinMerging(0.5, "bernoulli", seed).delta(target, target * 0).apply(target * 0)
        return put_back[name] != 0

    assert torch.equal(positions(one), positions(one))
    assert not torch.equal(positions(one), positions(two))
    assert not torch.equal(positions(one), positions(one, seed=1))
    assert not torch.equal(positions(Weights.of(state)), positions(Weights.of(state), "v"))


def test_what_a_task_did_not_change_is_not_stored():
    _, reference = pair()
    for compress in COMPRESSIONS[1:]:
        assert TwinMerging(0.5, compress).delta(reference, reference).nbytes == 0


@pytest.mark.parametrize("compress", COMPRESSIONS)
def test_a_uniform_router_at_density_1_serves_the_average(compress):
    given = problem(*models(3, torch.float64))
    reference = given.pretrained * 0.5
    served = TwinMerging(1.0, compress).serve(given, reference)
    mixed = sum(served.weights(task) for task in given.tasks) / 3
    for name in FLOATS:
        assert_close(mixed[name], Average()(given)[name], rtol=1e-9, atol=1e-9)


def test_options_out_of_range_are_refused():
    with pytest.raises(OptionError, match=r"byom\.density=2 is not a fraction"):
        TwinMerging(2)
    with pytest.raises(OptionError, match=r"byom\.compress=top.*magnitude, bernoulli or svd"):
        TwinMerging(compress="top")
