"""Localize-and-Stitch: golden stitching, full and disjoint masks, one task, exact counts, excluded parameters."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from byom.errors import OptionError
from byom.merge.average import Average
from byom.merge.base import Problem
from byom.merge.localize_and_stitch import LocalizeAndStitch, Scored, stitch, top
from byom.variants.post_pruning import PostPruning
from byom.weights import Weights
from byom.weights.cuts import cuts
from tests.probes import TinyProbe, networks
from tests.problems import FLOATS, grid, models, problem, same


def test_golden_stitching():
    deltas = torch.tensor([[4.0, 2, 6], [2, 8, 1]])
    masks = torch.tensor([[1, 0, 1], [1, 1, 0]]).bool()
    assert stitch(deltas, masks).tolist() == [3, 8, 6]


def test_golden_vectors_stitched_globally():
    """The largest 2 of 5 are 3 and -4; 2 and -2; -6 and the first of two 1."""
    vectors = torch.tensor([[3, -1, 0.5, 0.125, -4], [1, 2, -0.5, 0.25, -2], [-6, 1, 0.5, -0.375, 1]])
    experts = {str(t): Weights.of({"a": vector[:2], "b": vector[2:]}) for t, vector in enumerate(vectors)}
    merged = LocalizeAndStitch(0.4)(Problem(Weights.of({"a": torch.zeros(2), "b": torch.zeros(3)}), experts))
    assert merged["a"].tolist() == [-1.5, 1.5] and merged["b"].tolist() == [0, 0, -3]


@pytest.mark.parametrize("tasks", [1, 3])
def test_full_masks_are_the_average(tasks):
    given = problem(*models(tasks, torch.float64, values=grid))
    merged, average = LocalizeAndStitch(1.0)(given), Average()(given)
    for name in average.mergeable():
        assert_close(merged[name], average[name], rtol=1e-12, atol=1e-12)


def test_empty_masks_are_the_pretrained():
    base, finetuned = models(3)
    assert same(LocalizeAndStitch(0.0)(problem(base, finetuned)), base)


def test_disjoint_tasks_add_up():
    deltas = torch.diag(torch.arange(1.0, 7.0))
    experts = {str(t): Weights.of({"w": delta}) for t, delta in enumerate(deltas)}
    merged = LocalizeAndStitch(1 / 6)(Problem(Weights.of({"w": torch.zeros(6)}), experts))
    assert torch.equal(merged["w"], deltas.sum(0))


@pytest.mark.parametrize("density", [0.05, 0.3])
@pytest.mark.parametrize("values", [grid, None], ids=["ties", "normal"])
def test_one_task_is_post_pruning(density, values):
    base, finetuned = models(1, **({"values": values} if values else {}))
    given = problem(base, finetuned)
    merged = LocalizeAndStitch(density)(given)
    served = PostPruning(density).serve(given, given.pretrained)
    pruned = served.weights("task1")
    for name in FLOATS:
        assert_close(merged[name], pruned[name])


@pytest.mark.parametrize("density", [0.05, 0.29, 0.5])
def test_exactly_as_many_survive_as_asked_for(density):
    delta = torch.ones(100)
    merged = LocalizeAndStitch(density)(Problem(Weights.of({"w": torch.zeros(100)}), {"t": Weights.of({"w": delta})}))
    assert merged["w"].tolist() == [1] * round(density * 100) + [0] * (100 - round(density * 100))


def test_what_is_excluded_stays_and_is_not_counted():
    base = {"ln_final.bias": torch.zeros(4), "w": torch.zeros(4)}
    expert = {"ln_final.bias": torch.full((4,), 9.0), "w": torch.tensor([4.0, 3, 2, 1])}
    given = Problem(Weights.of(base), {"t": Weights.of(expert)})
    merged = LocalizeAndStitch(0.5)(given)
    assert merged["ln_final.bias"].tolist() == [0] * 4 and merged["w"].tolist() == [4, 3, 0, 0]
    everything = LocalizeAndStitch(0.5, exclude=())(given)
    assert everything["ln_final.bias"].tolist() == [9] * 4 and everything["w"].tolist() == [0] * 4


@pytest.mark.parametrize(
    ("values", "said"),
    [({"density": 5}, r"merge\.density=5 is not a fraction"), ({"exclude": "w"}, r"merge\.exclude=w is not a list")],
    ids=str,
)
def test_what_is_out_of_range_is_refused(values, said):
    with pytest.raises(OptionError, match=said):
        LocalizeAndStitch(**values)


# learned masks

LEARNED = LocalizeAndStitch(0.3, masks="learned", steps=30, learning_rate=0.5)


def shots(held, task):
    places = held.probe.shots(task, "train", LEARNED.shots, LEARNED.seed)
    return held.probe.take(task, "train", places)


def labelled_loss(held, task, weights):
    batch, state = shots(held, task), {name: weights[name] for name in weights.mergeable()}
    return float(cross_entropy(held.probe.readout(task)(held.probe.encode(state, batch.inputs)), batch.labels))


@pytest.mark.parametrize("density", [0.0, 0.05, 0.3, 1.0])
def test_masks_before_learning_are_those_without_data(density):
    for held in (problem(*models(3)), networks(3)):
        assert same(replace(LEARNED, density=density, steps=0)(held), LocalizeAndStitch(density)(held))


@pytest.mark.parametrize("density", [0.05, 0.1])
@pytest.mark.parametrize("task", [1, 2, 3])
def test_learning_lowers_the_labelled_loss_of_as_many_entries(density, task):
    held = networks(task, examples=60)
    held = replace(held, finetuned={f"task{task}": held.finetuned[f"task{task}"]})
    dataless, learned = (LocalizeAndStitch(density, masks=masks)(held) for masks in ("dataless", "learned"))
    assert labelled_loss(held, f"task{task}", learned) < labelled_loss(held, f"task{task}", dataless)
    changed = [sum(int((m[n] != held.pretrained[n]).sum()) for n in m) for m in (dataless, learned)]
    assert changed[0] == changed[1] == int(density * held.pretrained.numel)


def test_entries_that_matter_are_found_among_larger_ones_that_do_not():
    base = Weights.of({"idle": torch.zeros(6), "used": torch.zeros(3)})
    expert = {"task": Weights.of({"idle": torch.full((6,), 9.0), "used": torch.tensor([1.0, -1, 0.5])}, "task")}
    probe = TinyProbe(base, expert, lambda state, x: x * (0.2 + state["used"]) + 0 * state["idle"].sum(), sizes=(3, 3))
    held = Problem(base, expert, probe=probe)
    assert LocalizeAndStitch(3 / 9)(held)["used"].tolist() == [0, 0, 0]
    merged = replace(LEARNED, density=3 / 9, penalty=0.01)(held)
    assert merged["used"].tolist() == [1, -1, 0.5] and merged["idle"].tolist() == [0] * 6


def test_the_gradient_of_the_scores_is_that_of_an_ordinary_graph():
    held = networks(1)
    scored = Scored(held, "task1", cuts(held.finetuned["task1"], held.pretrained, 0.3))
    leaves = {name: score.clone().requires_grad_() for name, score in scored.scores.items()}
    state = {n: scored.base[n] + leaf.sigmoid() * scored.delta[n] for n, leaf in leaves.items()}
    batch = shots(held, "task1")
    loss = cross_entropy(held.probe.readout("task1")(held.probe.encode(state, batch.inputs)), batch.labels)
    (7 * loss + 0.5 * sum(leaf.sigmoid().sum() for leaf in leaves.values())).backward()
    scored.backward(held, "task1", batch, 7, 0.5)
    for name, leaf in leaves.items():
        assert_close(scored.scores[name].grad, leaf.grad, rtol=1e-4, atol=1e-7)


def test_the_highest_scores_of_all_tensors_stay_golden():
    scores = {"a": torch.tensor([-9.0, 3, -30]), "b": torch.tensor([[40.0, -8], [3, 39]])}
    found = {count: top(scores, count) for count in (0, 2, 3, 5, 7)}
    flat = {count: torch.cat([m["a"], m["b"].reshape(-1)]).int().tolist() for count, m in found.items()}
    assert flat == {
        0: [0, 0, 0, 0, 0, 0, 0],
        2: [0, 0, 0, 1, 0, 0, 1],
        3: [0, 1, 0, 1, 0, 0, 1],
        5: [0, 1, 0, 1, 1, 1, 1],
        7: [1, 1, 1, 1, 1, 1, 1],
    }


class Relabelled(TinyProbe):
    def take(self, task, split, index):
        batch = super().take(task, split, index)
        return batch._replace(labels=(batch.labels + 1) % self.classes)


def test_learning_looks_at_labelled_training_examples_and_nothing_else():
    held = networks(2)
    merged = LEARNED(held)
    assert held.probe.seen == LEARNED.needs.inputs == {"train"} and LEARNED.needs.labels
    assert not LocalizeAndStitch().needs.inputs and not LocalizeAndStitch().needs.labels
    other = Relabelled(held.pretrained, held.finetuned, held.probe.encoder, (4, 6))
    assert same(LEARNED(held), merged) and not same(LEARNED(replace(held, probe=other)), merged)


def test_one_task_is_localised_the_same_with_or_without_others():
    held = networks(2)
    alone = replace(held, finetuned={"task2": held.finetuned["task2"]})
    both, one = LEARNED.plan(held)[1], LEARNED.plan(alone)[0]
    for name in held.pretrained:
        delta = held.finetuned["task2"][name] - held.pretrained[name]
        assert torch.equal(both.of(name, delta, 0), one.of(name, delta, 0))


def test_learned_masks_leave_the_excluded_alone():
    held = networks(2)
    merged = replace(LEARNED, exclude=("3.*",))(held)
    assert all(torch.equal(merged[n], held.pretrained[n]) for n in ("3.weight", "3.bias"))
    assert not torch.equal(merged["0.weight"], held.pretrained["0.weight"])
    assert same(replace(LEARNED, exclude=("*",))(held), held.pretrained)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"masks": "learnt"}, r"merge\.masks=learnt.*dataless or learned"),
        ({"shots": 0}, r"merge\.shots=0"),
        ({"penalty": -1.0}, r"merge\.penalty=-1"),
        ({"learning_rate": 0.0}, r"merge\.learning_rate=0"),
        ({"steps": -1}, r"merge\.steps=-1"),
        ({"batch_size": 0}, r"merge\.batch_size=0"),
    ],
    ids=str,
)
def test_options_of_learning_out_of_range_are_refused(values, said):
    with pytest.raises(OptionError, match=said):
        LocalizeAndStitch(**values)
