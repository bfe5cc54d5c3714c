"""Representation Surgery: where it starts, what it stores, and that it moves features towards the task's own."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import l1_loss
from torch.testing import assert_close

from byom.checkpoint.bundle import Bundle
from byom.errors import CheckpointError, OptionError
from byom.merge.base.descent import shuffled
from byom.merge.task_arithmetic import TaskArithmetic
from byom.variants.base.delta import READOUT
from byom.variants.surgery import RepresentationSurgery, corrected, initial
from byom.weights import Weights
from tests.probes import TinyProbe, networks
from tests.problems import bits, same

SURGERY = RepresentationSurgery(rank=4, steps=60, learning_rate=0.01)


def parts(served, task="task1"):
    return served.deltas[task].parts[READOUT]


def serve(variant, held):
    return variant.serve(held, TaskArithmetic()(held).materialise())


def distance(held, served, task, split="test"):
    """How far corrected features are from those of the task's own model."""
    shared = held.probe.features(served.reference, task, split).values
    own = held.probe.features(held.finetuned[task], task, split).values
    return float(l1_loss(corrected(shared, **parts(served, task)), own))


# where it starts


def test_without_steps_nothing_is_corrected():
    held = networks(3)
    served = serve(replace(SURGERY, steps=0), held)
    for task in held.tasks:
        features = held.probe.features(served.reference, task, "test").values
        head = held.probe.readout(task)
        assert torch.equal(served.deltas[task].readout(head)(features), head(features))
        assert not parts(served, task)["up"].any() and parts(served, task)["down"].any()


def test_at_the_start_only_up_has_a_gradient():
    features, targets = torch.randn(7, 6), torch.randn(7, 6)
    down, up = initial(4, 6, 0)
    l1_loss(corrected(features, down, up), targets).backward()
    assert torch.all(down.grad == 0) and up.grad.abs().max() > 0


def test_down_starts_uniform_within_the_inverse_root_of_the_width():
    down, up = initial(64, 100, 0)
    assert 0.097 < down.max() <= 0.1 and -0.1 <= down.min() < -0.097 and down.mean().abs() < 0.003
    assert not up.any() and not torch.equal(down, initial(64, 100, 1)[0])


def test_a_merged_model_that_is_the_tasks_own_is_left_alone():
    held = networks(1)
    served = SURGERY.serve(held, held.finetuned["task1"])
    assert not parts(served)["up"].any() and distance(held, served, "task1") == 0


# where it goes


@pytest.mark.parametrize("split", ["test", "validation"])
def test_features_come_nearer_with_the_steps(split):
    held = networks(2)
    for task in held.tasks:
        found = [
            distance(held, serve(replace(SURGERY, steps=s, inputs=split), held), task, split) for s in (0, 10, 100)
        ]
        assert found[0] > found[1] > found[2]


def test_one_task_is_corrected_the_same_with_or_without_others():
    held = networks(3)
    reference = TaskArithmetic()(held).materialise()
    alone = replace(held, finetuned={"task2": held.finetuned["task2"]})
    a, b = (parts(SURGERY.serve(each, reference), "task2") for each in (held, alone))
    assert {name: bits(tensor) for name, tensor in a.items()} == {name: bits(tensor) for name, tensor in b.items()}


def test_the_correction_is_its_formula_golden():
    down, up = torch.tensor([[1.0, 0.0], [0.0, -1.0]]), torch.tensor([[1.0, 2.0], [0.5, 1.0]])
    features = torch.tensor([[2.0, 3.0], [-1.0, -2.0]])
    assert corrected(features, down, up).tolist() == [[0.0, 2.0], [-5.0, -4.0]]


# what it stores and looks at


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_it_stores_two_matrices_a_task(rank, tmp_path):
    held = networks(3)
    served = serve(replace(SURGERY, rank=rank, steps=1), held)
    assert {delta.stored_parameters for delta in served.deltas.values()} == {2 * rank * held.probe.dimensions}
    assert all(same(served.weights(task), served.reference) for task in held.tasks)
    opened = Bundle.open(Bundle(served.reference, served.deltas).save(tmp_path / "bundle"))
    features = torch.randn(5, held.probe.dimensions, generator=torch.Generator().manual_seed(0))
    for task in held.tasks:
        a, b = (each.deltas[task].readout(held.probe.readout(task))(features) for each in (served, opened))
        assert torch.equal(a, b) and not torch.equal(a, held.probe.readout(task)(features))


def test_the_readout_is_the_head_behind_the_correction():
    held = networks(1)
    served, head = serve(SURGERY, held), held.probe.readout("task1")
    features = torch.randn(5, held.probe.dimensions)
    assert_close(served.deltas["task1"].readout(head)(features), head(corrected(features, **parts(served))))


def test_only_the_features_of_its_split_are_looked_at():
    for split in ("test", "validation"):
        held, variant = networks(2), replace(SURGERY, inputs=split)
        serve(variant, held)
        assert held.probe.seen == variant.needs.inputs == {split} and not variant.needs.labels


def test_every_example_comes_once_an_epoch():
    order = shuffled(10, 4, "key")
    epochs = [torch.cat([next(order) for _ in range(3)]) for _ in range(2)]
    assert all(sorted(epoch.tolist()) == list(range(10)) for epoch in epochs)
    assert epochs[0].tolist() != epochs[1].tolist()
    again = shuffled(10, 4, "key")
    assert torch.equal(torch.cat([next(again) for _ in range(3)]), epochs[0])


def test_an_expert_that_is_not_finite_is_refused():
    held = networks(2)
    broken = {name: held.finetuned["task2"][name].clone() for name in held.pretrained}
    broken["0.bias"][1] = float("nan")
    finetuned = {**held.finetuned, "task2": Weights.of(broken, "task2")}
    held = replace(held, finetuned=finetuned, probe=TinyProbe(held.pretrained, finetuned))
    with pytest.raises(CheckpointError, match=r"task2: tensor '0\.bias'"):
        SURGERY.serve(held, held.pretrained)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rank": 0}, r"byom\.rank=0"),
        ({"inputs": "train"}, r"byom\.inputs=train.*test.*validation"),
        ({"steps": -1}, r"byom\.steps=-1"),
        ({"learning_rate": -1.0}, r"byom\.learning_rate=-1"),
        ({"batch_size": 0}, r"byom\.batch_size=0"),
        ({"batches": 0}, r"byom\.batches=0"),
    ],
)
def test_what_is_out_of_range_is_refused(change, message):
    with pytest.raises(OptionError, match=message):
        replace(SURGERY, **change)
