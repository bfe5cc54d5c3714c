"""FlexMerge: golden groups, both ends of its size, what is stored once, and groups that nest."""

import numpy as np
import pytest
import torch
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import squareform
from torch.testing import assert_close

from byom.checkpoint.bundle import Bundle
from byom.errors import CheckpointError, OptionError
from byom.functional.grouping import LINKAGES, cosines, grouped
from byom.merge.adamerging import AdaMerging
from byom.merge.average import Average
from byom.merge.base import Problem
from byom.merge.dare import Dare
from byom.merge.fisher import FisherMerging
from byom.merge.pretrained import Pretrained
from byom.merge.svc import SingularValueCalibration
from byom.merge.task_arithmetic import TaskArithmetic
from byom.merge.ties import Ties
from byom.pipeline import measure
from byom.variants.base.delta import Delta
from byom.variants.flex import FlexMerge, divided
from byom.weights import Weights
from tests.problems import FLOATS, grid, models, problem, same

FIRST, SECOND = "blocks.0.attn.weight", "blocks.1.mlp.weight"
GOLDEN = {  # task vectors: cosines of A, B and C are .8, 0 and .6 in the first block, 0, .7071 and 0 in the second
    "A": {FIRST: [1.0, 0], SECOND: [1.0, 1, 0, 0]},
    "B": {FIRST: [4.0, 3], SECOND: [0.0, 0, 0, 2]},
    "C": {FIRST: [0.0, 1], SECOND: [1.0, 0, 0, 0]},
}
NAMES = "cls e.0.attn.b e.0.attn.w e.0.norm.w e.1.sub.0.f.w e.1.sub.1.f.w e.1.w e.b e.class n.b n.w".split()  # noqa: SIM905
METHODS = [Average(), TaskArithmetic(0.4), Ties(), Ties(combine="sum", scale=0.3)]


def golden():
    base = {FIRST: torch.full((2,), 10.0), SECOND: torch.full((4,), 10.0)}
    experts = {t: Weights.of({n: base[n] + torch.tensor(v) for n, v in each.items()}, t) for t, each in GOLDEN.items()}
    return Problem(Weights.of(base, "pre-trained"), experts)


def setting(tasks=5, **options):
    return problem(*models(tasks, **options))


def serve(given, size, method=None, **options):
    method = method or Average()
    return FlexMerge(size, method=method, **options).serve(given, method(given).materialise())


def groups(given, size, **options):
    """Return the groups of each block as the text of their members."""
    return [" ".join("".join(g) for g in b.groups) for b in FlexMerge(size, **options).grouping(given)]


def pairs(base=2.0):
    """Two tasks of one model, and two of another: two groups of two in each block at size 2."""
    state = {"a.weight": torch.full((3,), base), "b.weight": torch.full((2,), base)}
    moved = [{n: v + step for n, v in state.items()} for step in (torch.tensor([1.0]), torch.tensor([-1.0]))]
    moved[1]["a.weight"] = state["a.weight"] + torch.tensor([1.0, -1, 0])
    experts = {task: Weights.of(dict(moved[which]), task) for task, which in zip("pqrs", (0, 1, 0, 1), strict=True)}
    return Problem(Weights.of(state, "pre-trained"), experts)


# golden


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (3, ["A B C", "A B C"]),
        (2.7, ["AB C", "A B C"]),  # 16 of 6 parameters
        (2.6, ["AB C", "AC B"]),
        (2, ["AB C", "AC B"]),
        (1.9, ["ABC", "AC B"]),  # two least cosines of 0: the first block
        (1.5, ["ABC", "ABC"]),
        (1, ["ABC", "ABC"]),
    ],
)
def test_groups_golden(size, expected):
    assert groups(golden(), size) == expected


@pytest.mark.parametrize(("last", "first"), [(10.1**0.5, ("mean", "max")), (3**0.5, ("max",))])
def test_similarities_of_groups_golden(last, first):
    given = golden()
    turned = given.finetuned["B"].state() | {SECOND: torch.tensor([11, 10, 10, 10 + last])}
    given = Problem(given.pretrained, {**given.finetuned, "B": Weights.of(turned)})
    # {A, B} and C in the first block: 0, .3 or .6; {A, C} and B in the second: .21, .26 or .30, then .35, .43 or .5
    expected = {way: ["ABC", "AC B"] if way in first else ["AB C", "ABC"] for way in LINKAGES}
    assert {way: groups(given, 1.9, similarity=way) for way in LINKAGES} == expected


@pytest.mark.parametrize(
    ("method", "first", "second"),
    [
        (Average(), [12.5, 11.5], [11, 10.5, 10, 10]),
        (TaskArithmetic(0.5), [13.75, 12.25], [11.5, 10.75, 10, 10]),  # 0.5 of the sum of three is 0.75 of that of two
        (TaskArithmetic(0.5, weights=(1, 2, -1)), [16.75, 14.5], [10, 10.75, 10, 10]),
    ],
)
def test_values_golden(method, first, second):
    served = serve(golden(), 2, method)
    a, b, c = (served.weights(task) for task in "ABC")
    assert a[FIRST].tolist() == b[FIRST].tolist() == first and a[SECOND].tolist() == c[SECOND].tolist() == second
    assert c[FIRST].tolist() == [10, 11] and b[SECOND].tolist() == [10, 10, 10, 12]


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [
        (
            "module",
            [
                "cls",
                "e.0.attn.b e.0.attn.w",
                "e.0.norm.w",
                "e.1.sub.0.f.w",
                "e.1.sub.1.f.w",
                "e.1.w",
                "e.b",
                "e.class",
                "n.b n.w",
            ],
        ),
        (
            "layer",
            [
                "cls",
                "e.0.attn.b e.0.attn.w e.0.norm.w",
                "e.1.sub.0.f.w e.1.sub.1.f.w e.1.w",
                "e.b",
                "e.class",
                "n.b n.w",
            ],
        ),
        ("tensor", NAMES),
        ("model", [" ".join(NAMES)]),
    ],
)
def test_blocks_golden(blocks, expected):
    assert [" ".join(part) for part in divided(NAMES, blocks)] == expected


# ends


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_size_one_is_the_merged_model(method):
    given = setting()
    served = serve(given, 1, method)
    assert all(same(served.weights(task), method(given)) for task in given.tasks)
    assert measure.stored(served, given)["parameters"] == given.pretrained.numel


@pytest.mark.parametrize("size", [5, 5.0, 99])
def test_size_t_is_every_task_s_own_model(size):
    given = setting()
    served = serve(given, size, Ties())
    assert all(torch.equal(served.weights(t)[n], given.finetuned[t][n]) for t in given.tasks for n in FLOATS)
    assert measure.stored(served, given)["parameters"] == 5 * given.pretrained.numel


@pytest.mark.parametrize(("blocks", "similarity"), [("module", "min"), ("tensor", "mean"), ("model", "max")])
def test_the_size_is_never_exceeded_and_groups_nest(blocks, similarity):
    given, before = setting(6), None
    for size in (6, 5.2, 3.3, 2.5, 1.7, 1):
        served = serve(given, size, blocks=blocks, similarity=similarity)
        assert measure.stored(served, given)["parameters"] <= size * given.pretrained.numel
        now = [{*block.groups} for block in FlexMerge(size, blocks, similarity).grouping(given)]
        assert sum(map(len, now)) >= len(now)
        if before is not None:
            for finer, coarser in zip(before, now, strict=True):
                assert all(sum(set(one) <= set(other) for other in coarser) == 1 for one in finer)
        before = now


# invariances


def test_the_order_and_the_scale_of_tasks_do_not_matter():
    given = setting(5, values=grid)
    turned = Problem(given.pretrained, dict(reversed(given.finetuned.items())))
    for size in (4, 2.5, 1.5):
        one, other = serve(given, size), serve(turned, size)
        assert all(same(one.weights(task), other.weights(task)) for task in given.tasks)
    larger = {t: given.pretrained + 2 * (each - given.pretrained) for t, each in given.finetuned.items()}
    assert groups(Problem(given.pretrained, larger), 2.5) == groups(given, 2.5)


@pytest.mark.parametrize("still", [False, True])
def test_identical_experts_merge_first(still):
    given = setting(4)
    twin = given.pretrained if still else given.finetuned["task2"]
    given = Problem(given.pretrained, {**given.finetuned, "task2": twin, "task5": twin})
    (block,) = FlexMerge(4, "model").grouping(given)
    assert block.groups == (("task2", "task5"), ("task1",), ("task3",), ("task4",))
    served = serve(given, 4, Average(), blocks="model")
    for task, expert in given.finetuned.items():
        assert_close({n: served.weights(task)[n] for n in FLOATS}, {n: expert[n] for n in FLOATS}, rtol=0, atol=1e-7)


@pytest.mark.parametrize("way", LINKAGES)
def test_groups_of_one_block_are_those_of_scipys_linkage(way):
    vectors = torch.randn(9, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    alike = cosines(vectors @ vectors.T)
    distances = squareform(1 - alike.double().numpy(), checks=False)
    tree = linkage(distances, {"min": "complete", "mean": "average", "max": "single"}[way])
    for count in range(1, 10):
        labels = fcluster(tree, count, "maxclust")
        expected = {tuple(np.flatnonzero(labels == label).tolist()) for label in np.unique(labels)}
        assert {*grouped([alike], [7], 7 * count, way)[0]} == expected


@pytest.mark.parametrize("method", [Ties(density=0.3), FisherMerging(), Dare(then=Average())], ids=str)
def test_groups_are_merged_by_the_method_on_whole_models(method):
    given = setting(4)
    served = serve(given, 2.5, method)
    found = FlexMerge(2.5).grouping(given)
    some = [(block, group) for block in found for group in block.groups if 1 < len(group) < 4]
    assert some
    for block, group in some:
        merged = method(given.only([task for task in given.tasks if task in group]))
        assert all(torch.equal(served.weights(t)[n], merged[n]) for t in group for n in block.names)


def test_running_statistics_are_averaged_with_their_block_and_say_nothing_of_it():
    name, parameter = "bn.running_var", "bn.weight"
    states = {
        t: {parameter: torch.tensor([1.0, i]), name: torch.tensor([9.0, 1, 9])[i : i + 1]} for i, t in enumerate("abc")
    }
    given = Problem(
        Weights.of({parameter: torch.zeros(2), name: torch.ones(1)}), {t: Weights.of(s, t) for t, s in states.items()}
    )
    assert groups(given, 2) == ["bc a"]  # by the cosines .9487, .7071 and .4472 of the weights
    served = serve(given, 2, TaskArithmetic(1.0))
    assert served.weights("b")[name].tolist() == [5] and served.weights("a")[name].tolist() == [9]


# what is stored


def test_what_two_tasks_share_is_stored_once(tmp_path):
    given = pairs()
    served = serve(given, 2)
    assert groups(given, 2) == ["pr qs", "pr qs"]
    said, d = measure.stored(served, given), given.pretrained.numel
    assert said["parameters"] == 2 * d and said["bytes"] == 8 * d
    assert said["task_parameters"] == {"p": 0, "q": d, "r": 0, "s": 0}
    assert said["task_bytes"] == {"p": 0, "q": 4 * d, "r": 0, "s": 0}
    bundle = Bundle(served.reference, served.deltas)
    assert bundle.nbytes == 8 * d
    folder = bundle.save(tmp_path / "bundle")
    opened = Bundle.open(folder)
    assert opened.nbytes == 8 * d and measure.stored(opened, given)["bytes"] == 8 * d
    assert all(same(opened.weights(task), served.weights(task)) for task in given.tasks)
    again = Bundle.open(opened.save(tmp_path / "again"))
    assert again.nbytes == 8 * d and same(again.weights("s"), served.weights("s"))
    assert [Delta.open(folder / f"{task}.safetensors").nbytes for task in "pqrs"] == [0, 4 * d, 0, 0]


def test_a_difference_without_its_bundle_is_refused_or_whole(tmp_path):
    served = serve(pairs(), 2)
    alone = Delta.open(served.deltas["s"].save(tmp_path / "s.safetensors"))
    assert same(alone.apply(served.reference), served.weights("s")) and alone.common == served.deltas["s"].common
    folder = Bundle(served.reference, served.deltas).save(tmp_path / "bundle")
    with pytest.raises(CheckpointError, match=r"lacks 'a\.weight'.*several tasks.*Bundle\.open"):
        Delta.open(folder / "s.safetensors").apply(served.reference)
    (folder / "q.safetensors").write_bytes((folder / "p.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match=r"'a\.weight' of 's'.*\(q\+s\).*before it.*again"):
        Bundle.open(folder)


def test_the_shared_model_is_never_idle():
    given = setting(5)
    for size in (5, 3, 1.5):
        served = serve(given, size)
        for name in FLOATS:
            assert any(name not in delta.parts for delta in served.deltas.values())


# the method


def test_hyperparameters_of_some_tasks_are_theirs():
    every, some = list("abcd"), ["b", "d"]
    assert TaskArithmetic(0.3, weights=(1, 2, 3, 4)).among(some, every) == TaskArithmetic(0.6, weights=(2, 4))
    assert TaskArithmetic(0.3).among(every, every) == TaskArithmetic(0.3)
    assert Ties(densities=(0.1, 0.2, 0.3, 0.4)).among(some, every) == Ties(densities=(0.2, 0.4))
    assert Ties(combine="sum", scale=0.3).among(some, every) == Ties(combine="sum", scale=0.6)
    assert Dare(then=TaskArithmetic(0.3)).among(some, every) == Dare(then=TaskArithmetic(0.6))
    assert SingularValueCalibration(then=Ties()).among(some, every) == SingularValueCalibration(then=Ties())
    assert Average(weights=(1, 2, 3, 4)).among(some, every) == Average(weights=(2, 4))


def test_the_factor_on_the_mean_is_that_of_all_tasks():
    given, name = setting(4), "layer.weight"
    served = serve(given, 2, TaskArithmetic(0.5), blocks="model")
    (block,) = FlexMerge(2, "model").grouping(given)
    base = given.pretrained[name]
    for group in block.groups:
        mean = torch.stack([given.finetuned[task][name] for task in group]).mean(0) - base
        assert_close(served.weights(group[0])[name], base + (2 if len(group) > 1 else 1) * mean)


def test_a_run_gives_the_variant_its_own_method_unless_another_was_chosen():
    assert FlexMerge(2).merged_by(Ties()).method == Ties()
    assert FlexMerge(2, method=Average()).merged_by(Ties()).method == Average()
    assert {delta.variant for delta in serve(setting(3), 2).deltas.values()} == {FlexMerge(2)}


# refusals


@pytest.mark.parametrize("size", [0.5, 0, -1, float("nan"), float("inf"), True, "2"])
def test_a_size_that_is_no_number_of_models_is_refused(size):
    with pytest.raises(OptionError, match=r"byom\.size=.* from 1 on"):
        FlexMerge(size)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (None, r"FlexMerge\(method=\.\.\.\) is not given"),
        (Pretrained(), "merge=pretrained merges nothing"),
        (AdaMerging(), "looks at inputs or other models"),
        (TaskArithmetic(weights=(1, 2)), "2 values for 5 tasks"),
    ],
)
def test_a_method_that_cannot_merge_some_of_the_tasks_is_refused(method, said):
    given = setting()
    with pytest.raises(OptionError, match=said):
        FlexMerge(2, method=method).serve(given, given.pretrained)
