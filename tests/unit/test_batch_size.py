"""Batch sizes: found by doubling, halved where memory runs out, and no part of any score."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from byom.data.splits import Split
from byom.errors import OptionError
from byom.functional.heads import Head
from byom.pipeline import batch_size as module
from byom.pipeline.batch_size import BatchSize, require_batch_size
from byom.pipeline.evaluate import evaluate

CPU = torch.device("cpu")


class Device(nn.Module):
    """A model with memory for so many examples."""

    def __init__(self, most):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(3))
        self.most, self.sizes = most, []

    def forward(self, x):
        self.sizes.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError(f"{len(x)} examples")
        return x @ self.weight


def split(examples):
    labels = torch.arange(examples) % 3
    return Split({"x": torch.eye(3)[labels.roll(1)]}, labels, "x")


def head():
    return Head(torch.eye(3), 1.0)


def test_memory_that_runs_out_halves_the_batch_and_repeats_it():
    net, held = Device(7), split(40)
    found = evaluate(net, head(), held, size := BatchSize(20, CPU))
    assert torch.equal(found.predictions, evaluate(Device(99), head(), held, 20).predictions)
    assert net.sizes == [20, 10, *[5] * 8]
    assert size.now == 5
    net.sizes.clear()
    evaluate(net, head(), held, size)
    assert net.sizes == [5] * 8  # it is remembered


def test_what_does_not_hold_one_example_is_said():
    with pytest.raises(OptionError, match="does not hold one example of this model"):
        evaluate(Device(0), head(), split(4), 4)


@pytest.mark.parametrize(("slower_from", "kept"), [(128, 64), (64, 32), (10_000, 256)])
def test_auto_doubles_until_speed_stops_it(slower_from, kept, monkeypatch):
    monkeypatch.setattr(module, "LARGEST", 256)
    size = BatchSize("auto", CPU)
    held = split(1500)
    seen = []
    for inputs, _, index in size.batches(held):
        seen.append(index)
        seconds = max(1.0, 2 * len(index) / slower_from)  # up to half of it, a batch of any size takes as long
        size.observe(len(index), inputs["x"].numel(), seconds)
    assert size.settled and size.now == kept
    assert torch.equal(torch.cat(seen), torch.arange(1500))  # every example once


def test_auto_stops_at_memory_and_scores_the_same():
    net, held = Device(100), split(500)
    found = evaluate(net, head(), held, size := BatchSize("auto", CPU))
    assert torch.equal(found.predictions, evaluate(Device(999), head(), held, 50).predictions)
    assert size.settled and size.now <= 64


def test_fifty_on_a_cpu_and_searched_on_a_gpu():
    assert (BatchSize(None, CPU).now, BatchSize(None, CPU).settled) == (50, True)
    assert not BatchSize(None, torch.device("cuda")).settled
    assert BatchSize(7, torch.device("cuda")).plain == 7


@pytest.mark.parametrize("value", [0, -1, True, 2.5, "most"])
def test_what_is_no_size_is_refused(value):
    with pytest.raises(OptionError, match="evaluate.batch_size"):
        require_batch_size("evaluate.batch_size", value)
