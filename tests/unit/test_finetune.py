"""Fine-tuning: deterministic, resumable to the bit, frozen heads, and it learns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from byom.backbone.base import prototypes
from byom.data.splits import Split
from byom.experts.finetune import loop as module
from byom.experts.finetune.full import Full
from byom.experts.finetune.loop import Lesson, finetune
from byom.functional.heads import Head
from byom.pipeline.evaluate import evaluate
from byom.weights import Weights


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 16), nn.GELU(), nn.Dropout(0.2), nn.Linear(16, 8))

    def forward(self, x):
        return self.body(x)


@pytest.fixture
def split():
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(60) % 3
    return Split({"x": torch.eye(6)[labels] + 0.4 * torch.randn(60, 6, generator=generator)}, labels)


@pytest.fixture
def head(split):
    return Head(prototypes(Net(), split, 3), 10.0)


def train(split, head, folder, seed=0, **options):
    recipe = Full(**{"epochs": 3, "batch_size": 16, **options})
    net = Net()
    finetune(net, [Lesson(head, split)], recipe, 1e-2, seed, folder, "test")
    return Weights.of(net.state_dict())


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns(split, head, tmp_path):
    net = Net()
    before = evaluate(net, head, split).value
    net.load_state_dict(train(split, head, tmp_path, epochs=8).state())
    assert evaluate(net, head, split).value > max(before, 0.9)


def test_same_seed_same_bits_other_seed_other_bits(split, head, tmp_path):
    first = train(split, head, tmp_path / "a")
    assert same(first, train(split, head, tmp_path / "b"))
    assert not same(first, train(split, head, tmp_path / "c", seed=1))


def test_an_interrupted_run_resumes_to_the_same_bits(split, head, tmp_path, monkeypatch):
    whole = train(split, head, tmp_path / "whole")
    original = module._epoch

    def interrupted(*arguments):
        if arguments[-1] == 2:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(module, "_epoch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(split, head, tmp_path / "cut")
    seen = []
    monkeypatch.setattr(module, "_epoch", lambda *a: seen.append(a[-1]) or original(*a))
    assert same(whole, train(split, head, tmp_path / "cut"))
    assert seen == [2]


def contrary(split, head, folder, first):
    """Train on two tasks that contradict each other, and return how well each was learned."""
    other = Split(split.inputs, (split.labels + 1) % 3)
    net, recipe = Net(), Full(epochs=8, batch_size=4)
    finetune(net, [Lesson(head, split, first), Lesson(head, other, 2 - first)], recipe, 1e-2, 0, folder, "test")
    return [evaluate(net, head, each).value for each in (split, other)]


def test_a_larger_share_wins_where_tasks_contradict_each_other(split, head, tmp_path):
    mostly, other = contrary(split, head, tmp_path / "a", 1.8)
    assert mostly > other + 0.3
    mostly, other = contrary(split, head, tmp_path / "b", 0.2)
    assert other > mostly + 0.3


def test_shares_are_frequencies_of_batches(split, head):
    lessons = [Lesson(head, split, share) for share in (1.5, 0.5, 1.0)]
    drawn = [lesson for lesson, *_ in module._batches(lessons, 16, 0, 0)]
    assert [drawn.count(lesson) for lesson in lessons] == [6, 2, 4]
    seen = torch.cat([labels for lesson, _, labels in module._batches(lessons, 16, 0, 0) if lesson is lessons[2]])
    assert torch.equal(seen.sort().values, split.labels.sort().values)


def test_the_head_is_frozen(split, head, tmp_path):
    before = head.weight.clone()
    train(split, head, tmp_path)
    assert torch.equal(head.weight, before)


def test_the_learning_rate_warms_up_and_falls_to_zero():
    rates = [module._warm_cosine(step, 100, 0.1) for step in range(101)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[100] == pytest.approx(0.0)


def test_weight_decay_spares_vectors():
    matrices, vectors = module._groups(Net(), 0.1)
    assert {p.ndim for p in matrices["params"]} == {2} and matrices["weight_decay"] == 0.1
    assert {p.ndim for p in vectors["params"]} == {1} and vectors["weight_decay"] == 0.0


def test_prototypes_are_unit_class_means(split):
    net = Net().eval()
    with torch.no_grad():
        features = nn.functional.normalize(net(split.inputs["x"]), dim=-1)
    expected = nn.functional.normalize(torch.stack([features[split.labels == c].mean(0) for c in range(3)]), dim=-1)
    assert torch.allclose(prototypes(net, split, 3), expected, atol=1e-6)
