"""Every option of ``conf/router`` against the laws of routing; a new router joins by having its yaml."""

from dataclasses import replace

import pytest
import torch

from byom.cli import config
from byom.errors import OptionError
from byom.functional.seeding import keyed
from byom.merge.base import Problem
from byom.merge.base.probe import Features
from byom.pipeline.router.oracle import Oracle
from byom.variants.base.delta import Served
from byom.weights import Weights
from tests.problems import bits

ROUTERS = {name: config.option("router", name) for name in config.options("router")}
LEARNED = {name: router for name, router in ROUTERS.items() if not isinstance(router, Oracle)}
TASKS = {"left": -4.0, "middle": 0.0, "right": 4.0}


class Clouds:
    """Features of each task around a place of its own; every split is another draw."""

    def __init__(self, centres=TASKS, train=40, test=30):
        self.centres, self.sizes, self.asked = centres, {"train": train, "validation": test, "test": test}, []

    def features(self, weights, task, split):
        self.asked.append(split)
        generator = torch.Generator().manual_seed(keyed(task, split))
        values = torch.randn(self.sizes[split], 5, generator=generator) + self.centres[task]
        return Features(values, torch.zeros(self.sizes[split], dtype=torch.int64))


def problem(probe=None, tasks=TASKS):
    base = Weights.of({"w": torch.zeros(2)}, "pre-trained")
    made = Problem(base, {task: Weights.of({"w": torch.ones(2)}, task) for task in tasks}, probe=probe or Clouds())
    return made, Served(base, {})


@pytest.fixture(params=LEARNED)
def router(request):
    return LEARNED[request.param]


def test_the_oracle_has_nothing_to_learn():
    assert ROUTERS["oracle"].fit(*problem()) is None
    assert not ROUTERS["oracle"].needs.inputs


def test_shares_are_a_distribution_over_tasks(router):
    routing = router.fit(*problem())
    for task in TASKS:
        shares = routing.shares(task, "test")
        assert shares.shape == (30, 3) and (shares >= 0).all()
        assert torch.allclose(shares.sum(1), torch.ones(30), atol=1e-6)


def test_separate_tasks_are_told_apart(router):
    routing = router.fit(*problem())
    for place, task in enumerate(TASKS):
        assert (routing.shares(task, "test").argmax(1) == place).float().mean() > 0.95


def test_tasks_that_look_alike_are_not(router):
    routing = router.fit(*problem(Clouds(dict.fromkeys(TASKS, 0.0))))
    right = [(routing.shares(t, "validation").argmax(1) == i).float().mean() for i, t in enumerate(TASKS)]
    assert sum(right) / 3 < 0.7


def test_only_training_inputs_are_learned_from(router):
    probe = Clouds()
    router.fit(*problem(probe))
    assert set(probe.asked) == {"train"} == set(router.needs.inputs) and not router.needs.labels


def test_one_task_takes_everything(router):
    routing = router.fit(*problem(tasks=["left"]))
    assert routing.shares("left", "test").tolist() == [[1.0]] * 30


def test_fitting_twice_gives_the_same_bits_and_leaves_the_generator_alone(router):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one, two = (router.fit(*problem()).shares("left", "test") for _ in range(2))
    assert bits(one) == bits(two) and torch.equal(before, torch.get_rng_state())


def test_another_seed_is_another_draw(router):
    first, second = (replace(router, seed=seed).fit(*problem()) for seed in (0, 1))
    if hasattr(router, "examples"):
        first, second = (replace(router, seed=seed, examples=5).fit(*problem()) for seed in (0, 1))
    assert any(bits(a) != bits(b) for a, b in zip(first.stored, second.stored, strict=True))


def test_what_is_stored_is_reported(router):
    stored = router.fit(*problem()).stored
    assert stored and all(tensor.numel() for tensor in stored)


def test_without_inputs_the_router_refuses(router):
    bare, served = problem()
    with pytest.raises(OptionError, match="looks at inputs"):
        router.fit(replace(bare, probe=None), served)


@pytest.mark.parametrize(
    "wrong", [{"mix": "token"}, {"heads": "none"}, {"batch_size": 0}], ids=lambda wrong: next(iter(wrong))
)
def test_options_out_of_range_are_refused(router, wrong):
    name = next(iter(wrong))
    with pytest.raises(OptionError, match=f"router.{name}"):
        replace(router, **wrong)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("knn", {"neighbours": 0}),
        ("knn", {"examples": 0}),
        ("knn", {"metric": "manhattan"}),
        ("mlp", {"hidden": 0}),
        ("mlp", {"dropout": 1.0}),
        ("mlp", {"epochs": 0}),
        ("mlp", {"learning_rate": 0.0}),
    ],
)
def test_hyperparameters_out_of_range_are_refused(name, wrong):
    with pytest.raises(OptionError, match=f"router.{next(iter(wrong))}"):
        replace(ROUTERS[name], **wrong)


def test_neighbours_vote_by_count():
    routing = replace(ROUTERS["knn"], neighbours=4, examples=2).fit(*problem(Clouds(train=2)))
    shares = routing.shares("left", "test")
    assert set((4 * shares).round().flatten().tolist()) <= {0, 1, 2} and torch.equal(4 * shares, (4 * shares).round())


def test_every_option_is_titled_and_hashable():
    assert [router.title for router in LEARNED.values() if not router.title] == []
    assert all(hash(router) == hash(replace(router)) for router in ROUTERS.values())


def test_cosine_neighbours_do_not_mind_the_length_of_features():
    class Scaled(Clouds):
        def features(self, weights, task, split):
            found = super().features(weights, task, split)
            direction = torch.eye(5)[list(TASKS).index(task)] * 9
            return Features((found.values / 9 + direction) * (5 if split == "test" else 1), found.labels)

    routing = replace(ROUTERS["knn"], metric="cosine").fit(*problem(Scaled(dict.fromkeys(TASKS, 0.0))))
    assert all((routing.shares(t, "test").argmax(1) == i).all() for i, t in enumerate(TASKS))
