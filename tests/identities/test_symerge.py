"""SyMerge: where it starts, which of its parts move, and what it learns from."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from byom.checkpoint.bundle import Bundle
from byom.errors import OptionError
from byom.merge.adamerging import AdaMerging
from byom.merge.base import Problem
from byom.variants import symerge
from byom.variants.base.delta import READOUT
from byom.variants.symerge import ModelTinting, Predictions, trusted
from byom.weights import Weights
from tests.probes import TinyProbe, networks
from tests.problems import bits, same, slow

LEARNT = ModelTinting(steps=10)
LAYERS = ["head", "3.", "2.weight"]
KEPT = {"3.": {"3.weight", "3.bias"}, "2.weight": {"2.weight"}}


def serve(variant, held):
    return variant.serve(held, held.pretrained)


def logits(held, served, task, split="test"):
    features = held.probe.features(served.weights(task), task, split).values
    return served.deltas[task].readout(held.probe.readout(task))(features)


def said(held, task, split="test"):
    """The classes that a task's own model finds likeliest."""
    return held.probe.readout(task)(held.probe.features(held.finetuned[task], task, split).values).argmax(-1)


def loss(held, served):
    return float(sum(cross_entropy(logits(held, served, task), said(held, task)) for task in held.tasks))


# where it starts


@pytest.mark.parametrize("layer", LAYERS)
def test_without_steps_it_is_adamerging_without_steps(layer):
    held = networks(3)
    served, start = serve(ModelTinting(layer=layer, steps=0), held), AdaMerging(steps=0)(held)
    assert same(served.reference, start)
    for task in held.tasks:
        for name in held.pretrained:
            assert_close(served.weights(task)[name], start[name], rtol=1e-6, atol=1e-6)
        expected = held.probe.readout(task)(held.probe.features(start, task, "test").values)
        assert_close(logits(held, served, task), expected, rtol=1e-5, atol=1e-5)


# what moves


@pytest.mark.parametrize("plus_plus", [False, *slow(True)])
@pytest.mark.parametrize("layer", LAYERS)
def test_predictions_come_nearer_to_those_of_the_experts(layer, plus_plus):
    held = networks(3)
    found = [loss(held, serve(ModelTinting(layer, plus_plus, steps=steps), held)) for steps in (0, 5, 40)]
    assert found[0] > found[1] > found[2]


def test_without_task_vectors_only_the_heads_move():
    held = networks(1)
    still = dict.fromkeys(("a", "b"), held.pretrained)
    held = Problem(held.pretrained, still, probe=TinyProbe(held.pretrained, still, held.probe.encoder, (4, 6)))
    served = serve(LEARNT, held)
    assert same(served.reference, held.pretrained)
    for task in held.tasks:
        parts = served.deltas[task].parts[READOUT]
        assert not torch.equal(parts["weight"], held.probe.readout(task).weight) and parts["bias"].any()


def test_a_merged_model_that_is_the_tasks_own_grows_surer_of_its_own_classes():
    held = networks(1)
    still = {"task1": held.pretrained}
    held = Problem(held.pretrained, still, probe=TinyProbe(held.pretrained, still, held.probe.encoder, (4, 6)))
    start, end = (serve(replace(LEARNT, steps=steps), held) for steps in (0, 30))
    assert torch.equal(logits(held, end, "task1").argmax(-1), said(held, "task1"))
    assert loss(held, end) < loss(held, start)


@pytest.mark.parametrize("layer", LAYERS)
def test_the_shared_model_moves_too_and_only_the_layer_is_stored(layer):
    held = networks(2)
    served, start = serve(ModelTinting(layer=layer, steps=10), held), AdaMerging(steps=0)(held)
    assert any(not torch.allclose(served.reference[n], start[n], rtol=1e-3, atol=1e-4) for n in held.pretrained)
    for task in held.tasks:
        own = served.weights(task)
        changed = {name for name in held.pretrained if bits(own[name]) != bits(served.reference[name])}
        assert changed == KEPT.get(layer, set())
        assert served.deltas[task].parts.keys() == (KEPT.get(layer) or {READOUT})


def test_a_layer_of_its_own_leaves_its_coefficients_where_they_were():
    held = networks(2)
    served, start = serve(ModelTinting(layer="3.", steps=10), held), AdaMerging(steps=0)(held)
    assert all(bits(served.reference[name]) == bits(start[name]) for name in KEPT["3."])


def test_it_stores_the_head_with_a_bias(tmp_path):
    held = networks(3)
    served = serve(LEARNT, held)
    assert {d.stored_parameters for d in served.deltas.values()} == {held.probe.classes * (held.probe.dimensions + 1)}
    opened = Bundle.open(Bundle(served.reference, served.deltas).save(tmp_path / "bundle"))
    for task in held.tasks:
        assert torch.equal(logits(held, served, task), logits(held, opened, task))


def test_a_kept_layer_comes_back_from_disk_in_the_models_dtype(tmp_path):
    held = networks(2)
    half = {t: Weights.of({n: w[n].bfloat16() for n in w}, t) for t, w in held.finetuned.items()}
    base = Weights.of({n: held.pretrained[n].bfloat16() for n in held.pretrained})
    held = Problem(base, half, probe=TinyProbe(base, half, held.probe.encoder, (4, 6)))
    served = serve(ModelTinting(layer="3.", steps=3), held)
    opened = Bundle.open(Bundle(served.reference, served.deltas).save(tmp_path / "bundle"))
    for task in held.tasks:
        assert same(opened.weights(task), served.weights(task))
        assert served.weights(task)["3.weight"].dtype == torch.bfloat16
    assert served.deltas["task1"].nbytes == 2 * (8 * 6 + 6)


# what it learns from


def test_what_is_trusted_golden():
    found = torch.tensor([[3.0, 0, 0], [0, 0, 3.0], [0, 0.5, 0], [9.0, 0, 0]])
    teacher = Predictions(torch.tensor([0, 1, 0, 2]), torch.tensor([0.4, 0.95, 0.99, 0.9]))
    assert trusted(found, teacher).tolist() == [True, True, True, False]


def test_where_nothing_is_trusted_nothing_is_learnt(monkeypatch):
    held = networks(2)
    monkeypatch.setattr(symerge, "trusted", lambda found, _: torch.zeros(len(found), dtype=torch.bool))
    served, start = (serve(replace(LEARNT, plus_plus=True, steps=steps), held) for steps in (5, 0))
    assert same(served.reference, start.reference)
    assert all(torch.equal(logits(held, served, task), logits(held, start, task)) for task in held.tasks)


class Poisoned(TinyProbe):
    def take(self, task, split, index):
        return super().take(task, split, index)._replace(labels=torch.full((len(index),), -1))


@pytest.mark.parametrize("split", ["test", "validation"])
def test_only_the_inputs_of_its_split_are_looked_at(split):
    held, variant = networks(2), replace(LEARNT, inputs=split)
    served = serve(variant, held)
    assert held.probe.seen == variant.needs.inputs == {split} and not variant.needs.labels
    poisoned = replace(held, probe=Poisoned(held.pretrained, held.finetuned, held.probe.encoder, (4, 6)))
    assert same(served.reference, serve(variant, poisoned).reference)


def test_the_order_of_tasks_does_not_matter_and_the_seed_does():
    held, variant = networks(3), replace(LEARNT, batch_size=4)
    served = serve(variant, held)
    turned = serve(variant, replace(held, finetuned=dict(reversed(held.finetuned.items()))))
    for name in held.pretrained:
        assert_close(turned.reference[name], served.reference[name], rtol=1e-4, atol=1e-5)
    assert same(serve(variant, held).reference, served.reference)
    assert not same(serve(replace(variant, seed=1), held).reference, served.reference)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer": ""}, r"byom\.layer is empty"),
        ({"inputs": "train"}, r"byom\.inputs=train"),
        ({"scale": -0.1}, r"byom\.scale=-0\.1"),
        ({"steps": -1}, r"byom\.steps=-1"),
        ({"learning_rate": 0.0}, r"byom\.learning_rate=0"),
        ({"batch_size": 0}, r"byom\.batch_size=0"),
    ],
)
def test_what_is_out_of_range_is_refused(change, message):
    with pytest.raises(OptionError, match=message):
        replace(LEARNT, **change)


def test_a_layer_that_is_nowhere_is_refused():
    with pytest.raises(OptionError, match=r"byom\.layer=norm begins no parameter's name.*0\.bias"):
        serve(ModelTinting(layer="norm"), networks())


def test_a_head_that_is_not_a_cosine_classifier_is_refused(monkeypatch):
    held = networks(2)
    monkeypatch.setattr(held.probe, "readout", lambda _: torch.nn.Linear(held.probe.dimensions, 3))
    with pytest.raises(OptionError, match=r"cosine head, and that of task .* is a Linear; name a layer of the encoder"):
        serve(ModelTinting(steps=1), held)
