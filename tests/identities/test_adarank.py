"""AdaRank: Task Arithmetic and CART where it starts, an ordinary graph's gradient, and masks that are followed."""

from dataclasses import replace

import pytest
import torch
from torch.func import functional_call
from torch.testing import assert_close

from byom.errors import OptionError
from byom.merge.adamerging import AdaMerging, entropies, entropy
from byom.merge.adarank import AdaptiveRankPruning as AdaRank
from byom.merge.adarank import Masks
from byom.merge.base import Problem
from byom.merge.base.components import Components
from byom.merge.base.descent import Blend
from byom.merge.cart import CenteredArithmeticWithRankReducedTaskVectors as Cart
from byom.merge.task_arithmetic import TaskArithmetic
from byom.weights import Weights
from tests.probes import TinyProbe, network, networks
from tests.problems import models, problem, random, same

QUICK = AdaRank(steps=6, learning_rate=0.06)
MATRICES = {"0.weight", "3.weight"}


def close(a, b, **tolerance):
    for name in b.mergeable():
        assert_close(a[name], b[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def learning(held, rank=1.0, scale=0.3, candidates=1.0):
    """Return the blend, the masks and the coefficients before learning."""
    blend = Blend(held, "test")
    parts = AdaRank(candidates=candidates)._parts(blend)
    masks = Masks(blend, parts, rank)
    return blend, masks, blend.start(scale)


# where it starts


def test_without_steps_it_is_task_arithmetic():
    held = problem(*models())
    start = AdaRank(steps=0)
    close(start(held), TaskArithmetic(scale=0.3)(held), rtol=1e-6, atol=1e-7)
    assert not start.plan(held).changes, "nothing was left out, so nothing was put together again"
    assert same(start(held), AdaMerging(steps=0, scale=0.3)(held))


@pytest.mark.parametrize("rank", [0.16, 0.5, 1.0])
def test_without_steps_from_cart_it_is_cart(rank):
    held = networks(3)
    start = AdaRank(start="cart", steps=0, rank=rank)
    close(start(held), Cart(rank=rank, scale=2.3)(held), rtol=1e-5, atol=1e-6)


def test_cart_starts_from_sixteen_percent():
    plan = AdaRank(start="cart", steps=0).plan(networks(3))
    assert all(torch.equal(on.sum(1), torch.ones(3)) for on in plan.masks.values()), "of 4 and of 6, rounded up"


@pytest.mark.parametrize(("rank", "count"), [(0.0, 0), (0.5, 2), (0.75, 3)])
def test_without_steps_the_leading_components_are_added(rank, count):
    held = networks(2)
    merged = AdaRank(steps=0, rank=rank, scale=0.7)(held)
    group, cut = held.group("0.weight"), 0
    for delta in group.deltas.double():
        left, values, right = torch.linalg.svd(delta, full_matrices=False)
        cut = cut + left[:, :count] * values[:count] @ right[:count]
    assert_close(merged["0.weight"].double() - group.pretrained, 0.7 * cut, rtol=1e-5, atol=1e-6)
    close(
        merged.select(lambda name: name not in MATRICES),
        TaskArithmetic(scale=0.7)(held).select(lambda name: name not in MATRICES),
        rtol=1e-6,
        atol=1e-7,
    )


def test_candidates_bound_what_may_be_on():
    held = networks(2)
    whole = AdaRank(steps=0, candidates=0.5)
    close(whole(held), AdaRank(steps=0, rank=0.5)(held), rtol=1e-5, atol=1e-6)
    assert [on.shape for on in replace(QUICK, candidates=0.5).plan(held).masks.values()] == [(2, 2), (2, 3)]


# its components


def test_golden():
    """tau = diag(3, 0, 1): components 3 e_1 e_1ᵀ and e_3 e_3ᵀ, whose slopes under G are 3 G_11 and G_33."""
    delta = torch.diag(torch.tensor([3.0, 0.0, 1.0])).double()
    parts = Components.of(torch.stack([delta, torch.zeros(3, 3).double()]), 3)
    assert_close(parts.values, torch.tensor([[3.0, 1.0], [0.0, 0.0]]).double())
    gradient = torch.arange(9.0).double().reshape(3, 3)
    assert_close(parts.slopes(gradient), torch.tensor([[0.0, 8.0], [0.0, 0.0]]).double())
    on = torch.tensor([False, True])
    assert_close(parts.masked(0, on, delta), torch.diag(torch.tensor([0.0, 0.0, 1.0])).double())
    assert_close(parts.part(0, torch.tensor([1.0, -1.0])), torch.diag(torch.tensor([3.0, 0.0, -1.0])).double())


@pytest.mark.parametrize("shape", [(7, 4), (4, 7)], ids=str)
@pytest.mark.parametrize("most", [4, 2])
def test_components_add_up(shape, most):
    deltas, draw = random(2, *shape), torch.Generator().manual_seed(0)
    parts = Components.of(deltas, most)
    assert parts.complete == (most == 4)
    for _ in range(4):
        on = torch.rand(most, generator=draw) < 0.5
        left, values, right = torch.linalg.svd(deltas[1], full_matrices=False)
        assert_close(parts.masked(1, on, deltas[1]), (left[:, :most] * (values[:most] * on)) @ right[:most])
    whole = parts.masked(1, torch.ones(most, dtype=torch.bool), deltas[1])
    assert torch.equal(whole, deltas[1]) == parts.complete
    gradient = random(*shape, seed=5)
    expected = [[(gradient * parts.part(t, torch.eye(most)[i])).sum() for i in range(most)] for t in range(2)]
    assert_close(parts.slopes(gradient), torch.tensor(expected).double())


def test_a_matrix_of_low_rank_has_few_components():
    deltas = torch.stack([random(6, 2) @ random(2, 5, seed=1), random(6, 1) @ random(1, 5, seed=1)])
    parts = Components.of(deltas, 5)
    assert parts.values.shape == (2, 2) and parts.complete and parts.values[1, 1] == 0
    assert_close(parts.part(0, torch.ones(2)), deltas[0])


# its gradient


def test_the_gradient_is_that_of_an_ordinary_graph_with_straight_through_masks():
    held = networks(3)
    blend, masks, coefficients = learning(held, rank=0.5)
    scores = {
        name: s.view_as(part.values)
        for (name, part), s in zip(
            masks.parts.items(), masks.scores.clone().requires_grad_().split(masks.sizes), strict=True
        )
    }
    for each in scores.values():
        each.retain_grad()
    lambdas, state = coefficients.detach().clone().requires_grad_(), {}
    for name, row in zip(blend.names, lambdas, strict=True):
        group = held.group(name)
        vectors = group.deltas
        if part := masks.parts.get(name):
            soft = (scores[name] / 10).sigmoid()
            mask = soft + ((scores[name] > 0).float() - soft).detach()
            vectors = torch.einsum("tr,tr,trm,trn->tmn", mask, part.values, part.left, part.right)
        state[name] = group.pretrained + torch.einsum("t,t...->...", row, vectors)
    batches = [(task, next(held.probe.batches(task, "test", 12, 0))) for task in held.tasks]
    sum(entropy(held.probe.readout(t)(held.probe.encode(state, batch.inputs))) for t, batch in batches).backward()
    thetas = blend.at(coefficients)
    for loss in entropies(held.probe, thetas, batches):
        loss.backward()
    masks.backward(thetas, coefficients)
    blend.backward(coefficients, thetas)
    expected = torch.cat([scores[name].grad.flatten() for name in masks.parts])
    assert expected.abs().max() > 1e-4
    assert_close(masks.scores.grad, expected, rtol=1e-3, atol=1e-7)
    assert_close(coefficients.grad, lambdas.grad, rtol=1e-4, atol=1e-6)


def test_what_is_followed_is_what_the_masks_say():
    held = networks(3)
    blend, masks, _ = learning(held, rank=0.5)
    draw = torch.Generator().manual_seed(0)
    for _ in range(5):
        masks.scores.copy_(torch.randn(masks.scores.shape, generator=draw))
        masks.follow()
    for name, part in masks.parts.items():
        deltas = held.group(name).deltas
        for task, delta in enumerate(deltas):
            expected = part.masked(task, masks.on[name][task], delta)
            assert_close(blend.vectors[name][task], expected, rtol=1e-4, atol=1e-6)


# its descent


def certainty(held, method):
    merged, total = method(held), 0.0
    for task in held.tasks:
        features = held.probe.features(merged, task, "test").values
        total += float(entropy(held.probe.readout(task)(features)))
    return total


@pytest.mark.parametrize("start", ["task_arithmetic", "cart"])
def test_entropy_falls_and_masks_change(start):
    held = networks(3)
    before = certainty(held, replace(QUICK, start=start, steps=0))
    after = replace(QUICK, start=start, steps=12, learning_rate=0.03)
    fixed = replace(after, coefficients="fixed")
    assert certainty(held, fixed) < before and certainty(held, after) < before
    begin = replace(after, steps=0).plan(held).masks
    assert any(not torch.equal(on, begin[name]) for name, on in fixed.plan(held).masks.items())


def test_fixed_coefficients_stay():
    plan = replace(QUICK, coefficients="fixed", scale=0.4).plan(networks(2))
    assert all(torch.equal(row, torch.full((2,), 0.4)) for row in plan.coefficients.values())
    learnt = QUICK.plan(networks(2)).coefficients
    assert all((row != 0.3).all() for row in learnt.values())


def test_what_is_returned_is_the_sum_of_what_is_on():
    held = networks(3)
    merged, plan = QUICK(held), QUICK.plan(held)
    blend, masks, _ = learning(held)
    assert set(plan.changes) == MATRICES
    for name in MATRICES:
        kept = sum(
            weight * masks.parts[name].part(t, plan.masks[name][t]) for t, weight in enumerate(plan.coefficients[name])
        )
        assert_close(merged[name], blend.base[name] + kept, rtol=1e-5, atol=1e-6)


def test_the_order_of_tasks_does_not_matter():
    held = networks(3)
    turned = Problem(held.pretrained, dict(reversed(held.finetuned.items())))
    turned = replace(turned, probe=TinyProbe(turned.pretrained, turned.finetuned, held.probe.encoder, (4, 6)))
    close(QUICK(turned), QUICK(held), rtol=1e-4, atol=1e-5)
    masks = QUICK.plan(held).masks
    assert all(torch.equal(on.flip(0), masks[name]) for name, on in QUICK.plan(turned).masks.items())


class Named(TinyProbe):
    """What is drawn for a task depends on its name, not on what its expert holds."""

    def _content(self, task):
        return float(task[-1])


def test_a_turn_of_the_inputs_turns_the_matrix():
    """Components turn with the matrix, so that predictions, masks and coefficients are the same."""
    held, turn = networks(2), torch.linalg.qr(random(4, 4))[0].float()
    base = network(0)

    def turned(state, inverse):
        return {**state, "0.weight": state["0.weight"] @ (turn.T if inverse else turn)}

    def through(weights):
        return Weights.of(turned({name: weights[name] for name in weights}, True), weights.origin)

    before = Named(held.pretrained, held.finetuned, held.probe.encoder, (4, 6))
    pretrained, finetuned = through(held.pretrained), {t: through(w) for t, w in held.finetuned.items()}
    after = Named(pretrained, finetuned, lambda s, x: functional_call(base, turned(dict(s), False), x), (4, 6))
    expected = QUICK(replace(held, probe=before))
    found = QUICK(Problem(pretrained, finetuned, probe=after))
    assert_close(found["0.weight"], expected["0.weight"] @ turn.T, rtol=1e-4, atol=1e-5)
    assert_close(found["3.weight"], expected["3.weight"], rtol=1e-4, atol=1e-5)


# what it looks at


class Poisoned(TinyProbe):
    def take(self, task, split, index):
        return super().take(task, split, index)._replace(labels=torch.full((len(index),), -1))


@pytest.mark.parametrize("split", ["test", "validation"])
def test_only_the_inputs_of_its_split_are_looked_at(split):
    held, method = networks(2), replace(QUICK, inputs=split, steps=2)
    merged = method(held)
    assert held.probe.seen == method.needs.inputs == {split} and not method.needs.labels
    assert method.needs.sees_test == (split == "test")
    assert same(
        merged, method(replace(held, probe=Poisoned(held.pretrained, held.finetuned, held.probe.encoder, (4, 6))))
    )


def test_tensors_of_several_experts_are_added_whole():
    name = "layers.0.experts.gate_up_proj"
    base = Weights.of({name: torch.zeros(3, 4, 5)})
    held = Problem(base, {str(t): Weights.of({name: random(3, 4, 5, seed=t).float()}) for t in range(2)})
    held = replace(held, probe=TinyProbe(held.pretrained, held.finetuned))
    assert AdaRank().fallbacks(held) == [name] and not QUICK.plan(held).masks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": "ties"}, r"merge\.start=ties.*task_arithmetic or cart"),
        ({"rank": 1.5}, r"merge\.rank=1\.5"),
        ({"scale": 0.0}, r"merge\.scale=0"),
        ({"candidates": 0.0}, r"merge\.candidates=0 leaves no component"),
        ({"coefficients": "none"}, r"merge\.coefficients=none"),
        ({"inputs": "train"}, r"merge\.inputs=train.*test.*validation"),
        ({"steps": -1}, r"merge\.steps=-1"),
        ({"learning_rate": 0.0}, r"merge\.learning_rate=0"),
        ({"batch_size": 0}, r"merge\.batch_size=0"),
        ({"exclude": "*proj*"}, r"merge\.exclude"),
    ],
)
def test_what_is_out_of_range_is_refused(change, message):
    with pytest.raises(OptionError, match=message):
        replace(QUICK, **change)
