"""Combinations of adapters beside PEFT's `add_weighted_adapter`.

``cat`` is equal at every scale ``s = alpha / r``, and so is ``svd``. They differ

- in ``svd`` of earlier versions of PEFT, which multiply by s twice; 0.21.2 does not;
- in an ``svd_rank`` above a side of a layer: an error there, all that there is here;
- in rsLoRA: PEFT (0.21.2) copies the setting to the new adapter and multiplies every combination by the root of its
  rank;
- in ``linear``, ``ties``, ``dare_*`` and ``magnitude_prune``, which byom does not have: PEFT combines B and A apart.
  Their result depends on how a product was factored, and ``linear`` is the weighted sum plus cross terms.
"""

import inspect

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from byom.errors import OptionError
from byom.merge.base import Problem
from byom.merge.knots import KnowledgeOrientationThroughSvd
from byom.merge.ties import Ties
from byom.weights import Weights
from byom.weights.lowrank import Adapted, Piece, cat, truncated

peft = pytest.importorskip("peft")
experiment = pytest.importorskip("experiments.peft_combinations")
pytestmark = pytest.mark.peer

SIDES = {"first": (12, 7), "second": (5, 12)}
RANK = 3
TASKS = ("one", "two", "six")
WEIGHTS = dict(zip(TASKS, (0.7, -0.2, 0.5), strict=True))
SQUARED = "target.scaling" in inspect.getsource(peft.LoraModel._svd_generalized_task_arithmetic_weighted_adapter)


def wrapped(alpha=RANK, tasks=TASKS, rslora=False):
    """Return a PEFT model with one filled adapter a task."""
    layers = nn.ModuleDict({name: nn.Linear(n, m) for name, (m, n) in SIDES.items()})
    settings = peft.LoraConfig(r=RANK, lora_alpha=alpha, target_modules=list(SIDES), use_rslora=rslora)
    model = peft.get_peft_model(layers, settings, tasks[0])
    for task in tasks[1:]:
        model.add_adapter(task, settings)
    generator = torch.Generator().manual_seed(0)
    for name in SIDES:
        base = layer(model, name).base_layer.weight
        base.data = torch.randn(base.shape, generator=generator)
        for task in tasks:
            for side in (layer(model, name).lora_A, layer(model, name).lora_B):
                side[task].weight.data = torch.randn(side[task].weight.shape, generator=generator)
    return model


def layer(model, name):
    return model.base_model.model[name]


def adapters(model, tasks=TASKS):
    """Return the adapters of a PEFT model."""
    base = Weights.of({f"{name}.weight": layer(model, name).base_layer.weight for name in SIDES})

    def piece(name, task):
        lora = layer(model, name)
        return Piece(0, lora.scaling[task] * lora.lora_B[task].weight.detach(), lora.lora_A[task].weight.detach())

    return {task: Adapted(base, {f"{name}.weight": [piece(name, task)] for name in SIDES}) for task in tasks}


def theirs(model, kind, weights=WEIGHTS, **options):
    """Return the change of every layer that PEFT's combination makes."""
    model.base_model.add_weighted_adapter(
        list(weights), list(weights.values()), "new", combination_type=kind, **options
    )
    found = {f"{name}.weight": layer(model, name).get_delta_weight("new").detach() for name in SIDES}
    model.delete_adapter("new")
    return found


def ours(adapted):
    return {name: sum(p.left @ p.right for p in adapted.pieces(name)) for name in adapted.factored}


def equal(a, b, **tolerances):
    for name in a:
        assert_close(a[name], b[name], **tolerances)


def regauged(model, tasks=TASKS):
    """Turn B into B R and A into R^-1 A, another R for every adapter."""
    for seed, task in enumerate(tasks):
        turn = torch.randn(RANK, RANK, generator=torch.Generator().manual_seed(seed)) + 2 * torch.eye(RANK)
        for name in SIDES:
            down, up = (side[task].weight for side in (layer(model, name).lora_A, layer(model, name).lora_B))
            down.data, up.data = torch.linalg.solve(turn, down.data), up.data @ turn
    return model


@pytest.mark.parametrize("alpha", [RANK, 2 * RANK, 1])
def test_cat(alpha):
    model = wrapped(alpha)
    equal(ours(cat(adapters(model), WEIGHTS)), theirs(model, "cat"), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("alpha", [RANK, 2 * RANK, 1])
@pytest.mark.parametrize("rank", [1, 2, RANK, 5])
def test_svd_at_every_scale(rank, alpha):
    model = wrapped(alpha)
    combined = truncated(cat(adapters(model), WEIGHTS), rank)
    again = alpha / RANK if SQUARED else 1
    expected = {name: again * change for name, change in ours(combined).items()}
    equal(theirs(model, "svd", svd_rank=rank), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "rank"), [("cat", 3 * RANK), ("svd", RANK)])
def test_rslora_multiplies_by_the_root_of_the_new_rank_there(kind, rank):
    model = wrapped(rslora=True)
    combined = ours(truncated(cat(adapters(model), WEIGHTS), rank))
    found = theirs(model, kind, svd_rank=RANK)
    equal(found, {name: rank**0.5 * change for name, change in combined.items()}, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [RANK, 2 * RANK])
def test_linear_adds_cross_terms(alpha):
    model = wrapped(alpha)
    found, exact = theirs(model, "linear"), ours(cat(adapters(model), WEIGHTS))
    for name in SIDES:
        lora = layer(model, name)
        weights = {task: weight * lora.scaling[task] for task, weight in WEIGHTS.items()}
        crossed = sum(
            abs(v * w) ** 0.5 * (1 if w > 0 else -1) * lora.lora_B[left].weight @ lora.lora_A[right].weight
            for left, v in weights.items()
            for right, w in weights.items()
            if left != right
        )
        difference = found[f"{name}.weight"] - exact[f"{name}.weight"]
        assert difference.norm() > 0.1 * exact[f"{name}.weight"].norm()
        assert_close(difference, crossed.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["cat", "svd", "linear"])
def test_one_adapter_of_weight_one_is_itself(kind):
    model = wrapped(tasks=["one"])
    single = adapters(model, ["one"])
    equal(theirs(model, kind, {"one": 1.0}), ours(single["one"]), rtol=1e-5, atol=1e-5)
    equal(ours(cat(single, {"one": 1.0})), ours(single["one"]))


@pytest.mark.parametrize("kind", ["cat", "svd"])
def test_another_split_of_the_same_products_gives_the_same(kind):
    equal(theirs(regauged(wrapped()), kind), theirs(wrapped(), kind), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "ties", "magnitude_prune"])
def test_another_split_of_the_same_products_changes_what_is_done_to_the_factors(kind):
    before, after = theirs(wrapped(), kind, density=0.5), theirs(regauged(wrapped()), kind, density=0.5)
    for name in before:
        assert (before[name] - after[name]).norm() > 0.1 * before[name].norm()


def test_another_split_of_the_same_products_changes_nothing_here():
    before, after = adapters(wrapped()), adapters(regauged(wrapped()))
    equal(ours(cat(after, WEIGHTS)), ours(cat(before, WEIGHTS)), rtol=1e-4, atol=1e-4)
    for method in (Ties(0.5), KnowledgeOrientationThroughSvd(Ties(0.5))):
        first, second = (method(Problem(next(iter(given.values())).base, given)) for given in (before, after))
        for name in first:
            assert_close(first[name], second[name], rtol=1e-3, atol=1e-3)


# the experiment


def test_the_experiment_hands_peft_the_factors():
    given = adapters(wrapped())
    third = dict.fromkeys(given, 1 / 3)
    host = experiment.Host(given)
    equal(ours(host.combine("cat")), ours(cat(given, third)), rtol=1e-5, atol=1e-5)
    equal(ours(host.combine("linear")), theirs(wrapped(), "linear", third), rtol=1e-5, atol=1e-5)


def test_the_experiment_measures_against_the_exact_sum():
    rows = {row["name"]: row for row in experiment.measure(experiment.synthetic(40, 3, 2), lambda weights: 0.5)}
    assert all(row["accuracy"] == 0.5 for row in rows.values())
    for name in ("PEFT cat", "byom cat", "byom average"):
        assert rows[name]["error"] < 1e-5 and rows[name]["cosine"] > 1 - 1e-6
    assert_close(rows["PEFT svd"]["error"], rows["byom cat, rank 2"]["error"], rtol=1e-4, atol=1e-5)
    assert rows["pre-trained"] == {"name": "pre-trained", "error": 1.0, "cosine": None, "accuracy": 0.5}
    assert rows["PEFT linear"]["error"] > rows["PEFT svd"]["error"] > 0.1
    assert len(experiment.table(list(rows.values())).splitlines()) == 2 + len(rows)


def test_the_experiment_keeps_the_parts_of_a_fused_matrix_apart():
    base = Weights.of({"qkv": torch.zeros(9, 4)})
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, generator=generator)

    given = {t: Adapted(base, {"qkv": [Piece(s, drawn(3, 2), drawn(2, 4)) for s in (0, 6)]}) for t in "ab"}
    found = experiment.Host(given).combine("cat")
    assert_close(found["qkv"], cat(given, {"a": 0.5, "b": 0.5})["qkv"], rtol=1e-5, atol=1e-6)
    assert not found["qkv"][3:6].any()


def test_the_experiment_refuses_adapters_that_peft_could_not_combine():
    given = experiment.synthetic(12, 2, 2)
    with pytest.raises(OptionError, match="adapters of ranks"):
        experiment.Host(given | {"task1": experiment.synthetic(12, 1, 3)["task0"]})
