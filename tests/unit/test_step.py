"""Steps of training: batches in pieces, memory that runs out, crops, and ties on the way from a device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resized_crop

from byom.backbone.encoder import Encoder
from byom.cli import config
from byom.data.splits import Split
from byom.errors import OptionError
from byom.experts.finetune.augment import boxes, cropped
from byom.experts.finetune.full import Full
from byom.experts.finetune.loop import Lesson, _batches, finetune
from byom.experts.finetune.processes import require_alike
from byom.functional.heads import Head
from byom.functional.tensors import on_cpu, shared
from byom.pipeline.checks import require_possible
from byom.statistics.base import fit
from byom.statistics.fisher import Fisher, FisherFitter
from byom.storage.signature import describe, signature
from byom.weights import Weights


class Net(nn.Module):
    def __init__(self, most=99):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Linear(16, 8))
        self.most, self.sizes = most, []

    def forward(self, x):
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError
        return self.body(x)


@pytest.fixture
def split():
    labels = torch.arange(20) % 3
    return Split({"x": torch.randn(20, 6, generator=torch.Generator().manual_seed(1))}, labels)


@pytest.fixture
def head():
    return Head(nn.functional.normalize(torch.randn(3, 8, generator=torch.Generator().manual_seed(2))), 10.0)


def trained(split, head, folder, most=99, **options):
    net = Net(most)
    finetune(net, [Lesson(head, split)], Full(epochs=2, batch_size=8, **options), 1e-2, 0, folder, "test")
    return torch.cat([p.detach().flatten() for p in net.parameters()]), net.sizes


def test_a_batch_in_pieces_trains_what_the_whole_batch_trains(split, head, tmp_path):
    whole, sizes = trained(split, head, tmp_path / "a")
    assert sizes == [8, 8, 4] * 2
    parts, sizes = trained(split, head, tmp_path / "b", micro_batch=3)
    assert sizes == [3, 3, 2, 3, 3, 2, 3, 1] * 2  # of unequal size, so that shares matter
    assert torch.allclose(whole, parts, atol=1e-5)
    assert not torch.allclose(whole, trained(split, head, tmp_path / "c", weight_decay=0.5)[0], atol=1e-5)


def test_auto_halves_where_memory_runs_out_and_remembers(split, head, tmp_path):
    whole, _ = trained(split, head, tmp_path / "a")
    parts, sizes = trained(split, head, tmp_path / "b", most=3, micro_batch="auto")
    assert sizes == [8, 4, *[2] * 4, *[2] * 4, *[2] * 2, *[2] * 10]
    assert torch.allclose(whole, parts, atol=1e-5)


def test_memory_that_does_not_hold_a_batch_is_said(split, head, tmp_path):
    with pytest.raises(OptionError, match="does not hold 8 examples in training; set finetune.micro_batch=auto"):
        trained(split, head, tmp_path, most=3)
    with pytest.raises(OptionError, match="does not hold one example in training"):
        trained(split, head, tmp_path, most=0, micro_batch="auto")


def test_examples_that_depend_on_each_other_are_not_computed_in_pieces(split, head, tmp_path):
    normalised = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 8))
    whole = {"epochs": 1, "batch_size": 8}

    class Normalised(Net):
        def __init__(self, most):
            super().__init__(most)
            self.body = normalised

    for most, pieces in ((99, 8), (99, "auto"), (99, None)):
        net = Normalised(most)
        finetune(net, [Lesson(head, split)], Full(**whole, micro_batch=pieces), 1e-2, 0, tmp_path, "x")
        assert net.sizes == [8, 8, 4]
    for most, pieces in ((99, 4), (4, "auto")):
        with pytest.raises(OptionError, match=f"micro_batch={pieces} would change the result: 'body.1' .*batch_size"):
            finetune(Normalised(most), [Lesson(head, split)], Full(**whole, micro_batch=pieces), 1e-2, 0, tmp_path, "x")


def test_crops_in_pieces_are_those_of_the_whole_batch(head, tmp_path):
    pixels = torch.randint(0, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    split, seen = Split({"pixels": pixels}, torch.arange(5) % 3), {}

    class Sees(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 8)

        def forward(self, pixels):
            seen[pieces].append(pixels)
            return self.layer(pixels.float().mean((-1, -2)) / 255)

    for pieces in (5, 2):
        seen[pieces] = []
        recipe = Full(epochs=2, batch_size=5, augment="crop", micro_batch=pieces)
        finetune(Sees(), [Lesson(head, split)], recipe, 1e-2, 0, tmp_path / str(pieces), "x")
    assert [len(each) for each in seen[2]] == [2, 2, 1] * 2
    assert torch.equal(torch.cat(seen[5]), torch.cat(seen[2]))


def test_pieces_are_no_part_of_a_name_and_crops_are():
    assert signature(Full(micro_batch=3)) == signature(Full()) != signature(Full(augment="crop"))
    assert describe(Full(augment="none")) == {"class": "Full"}
    for wrong in ({"micro_batch": 0}, {"micro_batch": "some"}, {"micro_batch": True}, {"augment": "flip"}):
        with pytest.raises(OptionError, match=f"finetune.{next(iter(wrong))}"):
            Full(**wrong)


def test_what_processes_would_decide_apart_is_refused(monkeypatch):
    require_alike("fp16", "auto")
    monkeypatch.setenv("WORLD_SIZE", "2")
    require_alike("bf16", 4)
    with pytest.raises(OptionError, match="precision=bf16 with several"):
        require_alike("fp16", None)
    with pytest.raises(OptionError, match="give a number where there are several"):
        require_alike("fp32", "auto")


@pytest.mark.parametrize("box", [(0, 0, 24, 24), (1, 0, 23, 24), (0, 2, 22, 21), (1, 1, 23, 23)])
def test_a_crop_is_torchvisions(box):
    pixels = torch.randint(0, 256, (3, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    found = cropped(pixels, torch.tensor([box] * 3)).float()
    expected = resized_crop(pixels.float(), *box, [24, 24], InterpolationMode.BICUBIC, antialias=True).clamp(0, 255)
    assert (found - expected).abs().max() < 0.51  # rounded to whole numbers
    assert torch.equal(found.byte(), pixels) == (box == (0, 0, 24, 24))


def test_crops_are_of_an_example_and_fit():
    inputs = {"pixels": torch.zeros(1, 3, 224, 224, dtype=torch.uint8)}
    drawn = boxes(4000, inputs, 0, "crop", 0)
    assert torch.equal(drawn, boxes(4000, inputs, 0, "crop", 0))
    assert not torch.equal(drawn, boxes(4000, inputs, 0, "crop", 1))
    top, left, tall, wide = drawn.double().unbind(1)
    assert drawn.min() >= 0 and (top + tall).max() <= 224 and (left + wide).max() <= 224
    area, ratio = tall * wide / 224**2, wide / tall
    assert area.min() > 0.89 and area.max() <= 1 and 0.92 < area.mean() < 0.97
    assert ratio.min() > 0.88 and ratio.max() < 1.13 and abs(ratio.log().mean()) < 0.01
    assert (top > 0).any() and (left > 0).any()


def test_a_batch_carries_the_crops_of_its_examples_and_epochs_have_their_own():
    split = Split(
        {"pixels": torch.arange(8, dtype=torch.uint8)[:, None, None, None].expand(8, 3, 50, 50)}, torch.arange(8)
    )
    lessons = [Lesson(Head(torch.eye(8), 1.0), split)]

    def crops(epoch):
        rows = [(inputs["crop"], labels) for _, inputs, labels in _batches(lessons, 3, 0, epoch, "crop")]
        order = torch.cat([labels for _, labels in rows]).argsort()
        return torch.cat([crop for crop, _ in rows])[order]

    assert torch.equal(crops(0), boxes(8, split.inputs, 0, "crop", 0))
    assert not torch.equal(crops(0), crops(1))
    assert all("crop" not in inputs for _, inputs, _ in _batches(lessons, 3, 0, 0))


def test_texts_are_not_cropped(split, head, tmp_path):
    with pytest.raises(OptionError, match="these examples are texts"):
        trained(split, head, tmp_path, augment="crop")
    with pytest.raises(OptionError, match="reads texts; use finetune.augment=none"):
        require_possible(replace(config.settings(["finetune.augment=crop", "device=cpu"]), backbone=Encoder()))


def test_ties_survive_the_way_from_a_device(monkeypatch):
    tied = torch.randn(3, 4)
    state = {"b": tied, "a": tied, "c": torch.randn(3, 4)}
    monkeypatch.setattr(torch.Tensor, "cpu", torch.Tensor.clone)  # what a device does: every call makes a copy
    moved = on_cpu(state)
    assert all(torch.equal(moved[name], state[name]) for name in state) and list(moved) == list(state)
    assert moved["a"].data_ptr() != tied.data_ptr()
    assert shared(moved) == {"b": "a"}


def test_a_full_expert_keeps_its_ties(tmp_path, monkeypatch):
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 5, bias=False))
    net[1].weight = net[0].weight
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "cpu", torch.Tensor.clone)
        Full().save(net, tmp_path / "expert")
    assert Weights.open(tmp_path / "expert").ties == Weights.of(net.state_dict()).ties != {}


def test_fisher_takes_fewer_examples_where_memory_runs_out(split, head, monkeypatch):
    net = Net()
    expected = fit(net, head, split, {"fisher": Fisher()}, 8)["fisher"]
    original, sizes = FisherFitter._gradients, []

    def limited(self, inputs, classes):
        sizes.append(len(classes))
        if len(classes) > 3:
            raise torch.OutOfMemoryError
        return original(self, inputs, classes)

    monkeypatch.setattr(FisherFitter, "_gradients", limited)
    found = fit(net, head, split, {"fisher": Fisher()}, 8)["fisher"]
    assert sizes == [8, 4, *[2] * 4, *[2] * 4, *[2] * 2]
    assert all(torch.allclose(found[name], expected[name], rtol=1e-5) for name in expected)
