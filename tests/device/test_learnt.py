"""Statistics, training, evaluation and routers with an encoder on a device: they give what they give on the CPU."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from byom.data.splits import Split
from byom.experts.finetune.full import Full
from byom.experts.finetune.loop import Lesson, finetune
from byom.functional.heads import Head
from byom.pipeline.evaluate import evaluate, features
from byom.statistics.base import fit
from byom.variants.base import Served
from tests.device.test_law import CARD, CPU, LEARNT, NEAR, posed
from tests.problems import options

SHORT = {
    "fisher": {"samples": 2},
    "ivon": {"steps": 3, "batch_size": 4, "initial": 10.0, "ess": 100.0},
    "mlp": {"epochs": 2, "hidden": 8},
}
STATISTICS = {
    name: replace(each, **SHORT.get(name.partition("-")[0], {})) for name, each in options("statistic").items()
}
ROUTERS = {
    name: replace(each, **SHORT.get(name.partition("-")[0], {}))
    for name, each in options("router").items()
    if each.routes
}
TOLERANCE = LEARNT if CARD else NEAR


class Pixels(nn.Module):
    """Averages an image and passes it through two layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4))

    def forward(self, pixels):
        rows = pixels.float().flatten(1).unflatten(1, (6, -1)).mean(-1)
        return self.body(rows / 128 - 1)


@pytest.fixture(scope="module")
def split():
    draw = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (11, 3, 8, 8), generator=draw, dtype=torch.uint8)
    return Split({"pixels": pixels}, torch.arange(11) % 3)


@pytest.fixture(scope="module")
def head():
    return Head(nn.functional.normalize(torch.randn(3, 4, generator=torch.Generator().manual_seed(2))), 10.0)


@pytest.mark.parametrize("name", STATISTICS)
def test_a_statistic_is_fitted_where_the_encoder_is(name, device, split, head):
    found = {
        place: fit(Pixels().to(place), head, split, {"one": STATISTICS[name]}, 4)["one"] for place in (CPU, device)
    }
    assert set(found[CPU]) == set(found[device]) and found[CPU]
    for each, value in found[device].items():
        assert value.device == device
        if name == "ivon" and CARD:  # a card draws other noise
            assert bool(value.isfinite().all())
        else:
            assert_close(value.cpu(), found[CPU][each], **TOLERANCE)


@pytest.mark.parametrize("recipe", [{}, {"augment": "crop"}, {"micro_batch": 2, "augment": "crop"}], ids=str)
def test_an_encoder_is_trained_and_evaluated_where_it_is(recipe, device, split, head, tmp_path):
    found = {}
    for place in (CPU, device):
        encoder = Pixels().to(place)
        before = deepcopy(encoder.state_dict())
        options = Full(epochs=2, batch_size=4, **recipe)
        finetune(encoder, [Lesson(head, split)], options, 1e-2, 0, tmp_path / place.type, "test")
        assert not any(torch.equal(value, before[each]) for each, value in encoder.state_dict().items())
        scored = evaluate(encoder, head, split, 4)
        found[place] = [features(encoder, split, 4), *(each.detach().cpu() for each in encoder.parameters())]
        assert all(each.device == CPU for each in (scored.predictions, scored.labels, *found[place][:1]))
    for there, here in zip(found[device], found[CPU], strict=True):
        assert_close(there, here, **TOLERANCE)


@pytest.mark.parametrize("name", ROUTERS)
def test_a_router_is_fitted_with_an_encoder_on_a_device(name, device):
    found = []
    for lie, encode in ((CPU, CPU), (CPU, device), (device, device)):
        given = posed(lie, encode)
        routing = ROUTERS[name].fit(given, Served(given.pretrained, {}, None))
        shares = routing.shares("task1", "test")
        assert shares.device == CPU and all(tensor.device == CPU for tensor in routing.tensors.values())
        found.append(shares)
    assert_close(found[1], found[0], **TOLERANCE)
    assert_close(found[2], found[0], **TOLERANCE)
