"""Core Space: nothing lost, linear and rotated merging, gauges, golden vectors, adapters, refusals."""

import pytest
import torch
from torch.testing import assert_close

from byom.errors import CheckpointError, OptionError
from byom.merge.average import Average
from byom.merge.base import Problem
from byom.merge.base.changes import changes
from byom.merge.core_space import CoreSpace, core, directions, frame
from byom.merge.dare import Dare
from byom.merge.fisher import FisherMerging
from byom.merge.iso_c import IsotropicMergingCommon
from byom.merge.knots import KnowledgeOrientationThroughSvd
from byom.merge.magmax import MagMax
from byom.merge.mtl import JointFineTuning
from byom.merge.task_arithmetic import TaskArithmetic
from byom.merge.ties import Ties
from byom.merge.tsv import TaskSingularVectors
from byom.weights import Weights
from byom.weights.lowrank import Adapted, Piece
from tests.factors import SHAPES, base, close, dense, factors, normal, thin
from tests.problems import configured, models, problem

LINEAR = {"sum": TaskArithmetic(0.3), "minus": TaskArithmetic(1.0, (1.0, -2.0, 0.5)), "mean": Average((3, -1, 1))}
ROTATED = {"tsv": TaskSingularVectors(), "iso_c": IsotropicMergingCommon()}
ENTRYWISE = {"ties": Ties(0.4), "sum of ties": Ties(0.6, combine="sum", scope="tensor"), "magmax": MagMax()}


def each(methods):
    return pytest.mark.parametrize("then", methods.values(), ids=methods)


@pytest.mark.parametrize("pose", [dense, thin])
def test_nothing_is_lost(pose):
    given = pose(factors())
    of = changes(given)
    for name in SHAPES:
        chains = [of(task, name) for task in given.tasks]
        bases = frame(chains)
        for task, chain in zip(given.tasks, chains, strict=True):
            change = given.finetuned[task][name] - given.pretrained[name]
            assert_close(bases.left @ core(chain, bases) @ bases.right, change, rtol=1e-12, atol=1e-12)


@each(LINEAR)
@pytest.mark.parametrize("pose", [dense, thin])
def test_a_linear_method_is_not_changed(then, pose):
    given = pose(factors())
    close(CoreSpace(then)(given), then(given), rtol=1e-12, atol=1e-12)


@each(ROTATED)
def test_a_method_that_commutes_with_rotations_is_not_changed(then):
    shapes = {"tall": (40, 30), "wide": (30, 40)}
    ranks = {t: {n: (a[:, :2], b[:2]) for n, (a, b) in p.items()} for t, p in factors(3, shapes=shapes).items()}
    given = thin(ranks, base(shapes))
    plain = Problem(given.pretrained, {t: e.materialise() for t, e in given.finetuned.items()})
    close(CoreSpace(then)(given), then(plain), rtol=1e-9, atol=1e-9)
    assert not torch.equal(then(plain)["tall"], TaskArithmetic(1.0)(plain)["tall"])


@pytest.mark.parametrize("rest", ["pretrained", "merged"])
def test_a_linear_method_on_all_tensors_of_a_model(rest):
    given = problem(*models(3, torch.float64))
    merged, expected = CoreSpace(TaskArithmetic(1.0), 0.3, rest)(given), TaskArithmetic(0.3)(given)
    matrices = {"embed", "layer.weight"}
    assert set(CoreSpace().fallbacks(given)) == set(given.pretrained.mergeable()) - matrices
    for name in given.pretrained.mergeable():
        assert_close(merged[name], (expected if name in matrices or rest == "merged" else given.pretrained)[name])


@each(ENTRYWISE)
@pytest.mark.parametrize("factor", [4.0, -0.125])
def test_a_factor_moved_from_b_to_a_changes_nothing(then, factor):
    given = factors()
    moved = {t: {n: (a * factor, b / factor) for n, (a, b) in pairs.items()} for t, pairs in given.items()}
    close(CoreSpace(then)(thin(given)), CoreSpace(then)(thin(moved)))


def turned(given, turn):
    def both(a, b, t):
        matrix = turn(normal(a.shape[1], a.shape[1], seed=int(t)))
        return a @ matrix, torch.linalg.solve(matrix, b)

    return {t: {n: both(*pair, t) for n, pair in pairs.items()} for t, pairs in given.items()}


@each(ENTRYWISE)
def test_rotating_the_factors_changes_nothing(then):
    given = factors()
    rotated = turned(given, lambda matrix: torch.linalg.qr(matrix)[0])
    close(CoreSpace(then)(thin(given)), CoreSpace(then)(thin(rotated)))


@each(ROTATED)
def test_any_turn_of_the_factors_changes_nothing_for_methods_that_commute_with_rotations(then):
    given = factors()
    skewed = turned(given, lambda matrix: matrix + 3 * torch.eye(len(matrix)))
    close(CoreSpace(then)(thin(given)), CoreSpace(then)(thin(skewed)), rtol=1e-9, atol=1e-9)


@each(ENTRYWISE)
def test_rotating_the_models_rotates_what_is_merged(then):
    given = factors(shapes={"w": (9, 7)})
    left, right = (torch.linalg.qr(normal(n, n, seed=n))[0] for n in (9, 7))
    moved = {t: {"w": (left @ p["w"][0], p["w"][1] @ right)} for t, p in given.items()}
    zero = Weights.of({"w": torch.zeros(9, 7, dtype=torch.float64)})
    merged, other = CoreSpace(then)(thin(given, zero))["w"], CoreSpace(then)(thin(moved, zero))["w"]
    assert_close(left @ merged @ right, other)


@pytest.mark.parametrize("tasks", [1, 2, 5])
@pytest.mark.parametrize("pose", [dense, thin])
def test_equal_tasks_at_full_density_are_that_task(tasks, pose):
    given = pose({str(t): factors(1)["0"] for t in range(tasks)})
    close(CoreSpace(Ties(1.0))(given), given.finetuned["0"])


def test_golden_the_cores_are_merged_and_not_the_entries():
    """Bases that are rotations: the cores are the rows of the golden test of KnOTS, and TIES merges them as there."""
    turn = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)
    cores = torch.tensor([[[4.0, 0.0], [0.0, 1.0]], [[2.0, 0.0], [0.0, -3.0]]], dtype=torch.float64)
    expert = {str(t): {"w": (turn @ each, turn.T)} for t, each in enumerate(cores)}
    zero = Weights.of({"w": torch.zeros(2, 2, dtype=torch.float64)})
    # [4, 2] agree to 3; of [1, -3] the heavier sign is kept, -3
    expected = turn @ torch.tensor([[3.0, 0.0], [0.0, -3.0]], dtype=torch.float64) @ turn.T
    # the stacked A are two equal rotations, whose directions are open: they are turned apart by a longer first row
    scaled = {t: {"w": (b / torch.tensor([2.0, 1.0]), torch.tensor([[2.0], [1.0]]) * a)} for t, p in expert.items()
              for b, a in [p["w"]]}  # fmt: skip
    assert_close(CoreSpace(Ties(1.0))(thin(scaled, zero))["w"], expected)
    assert_close(CoreSpace(Ties(1.0), 0.5)(thin(scaled, zero))["w"], 0.5 * expected)
    plain = Ties(1.0)(dense(expert, zero))["w"]
    assert not torch.allclose(plain, expected, atol=0.1)


def test_golden_ranks_run_over_all_cores():
    """Of two cores of one entry each, half are the larger one."""
    row, ones = torch.tensor([[3.0, 2.0, 1.0]]), torch.ones(2, 1)
    state = {"large": [Piece(0, 10 * ones, row)], "small": [Piece(0, ones, row)]}
    zero = Weights.of({n: torch.zeros(2, 3) for n in state})
    merged = CoreSpace(Ties(0.5))(Problem(zero, {"a": Adapted(zero, state)}))
    assert_close(merged["large"], 10 * ones @ row)
    assert not merged["small"].any()


@pytest.mark.parametrize("pose", [dense, thin])
def test_only_directions_that_exist_are_kept(pose):
    given = pose(factors(3, shapes={"w": (40, 30)}), base({"w": (40, 30)}))
    left, right = CoreSpace().plan(given).frames["w"]
    if pose is thin:
        assert left.shape == (40, 7) and right.shape == (7, 30)
    assert_close(left.T @ left, torch.eye(left.shape[1], dtype=torch.float64))
    assert_close(right @ right.T, torch.eye(len(right), dtype=torch.float64))


def test_directions_of_nothing_and_of_equal_columns():
    assert directions(torch.zeros(5, 0).double()).shape == directions(torch.zeros(5, 3).double()).shape == (5, 0)
    assert directions(normal(5, 1).expand(5, 3)).shape == (5, 1)


def test_no_matrix_of_an_expert_is_formed(monkeypatch):
    given = thin(factors())
    monkeypatch.setattr(Adapted, "_moved", lambda *_: pytest.fail("an expert's matrix was formed"))
    given = Problem(given.pretrained, {t: Adapted(e.base, e.factored) for t, e in given.finetuned.items()})
    close(CoreSpace(TaskArithmetic(1.0))(given), CoreSpace(TaskArithmetic(1.0)).low_rank(given).base + sums(given))


def sums(given):
    parts = {n: sum(p.left @ p.right for e in given.finetuned.values() for p in e.pieces(n)) for n in given.pretrained}
    return Weights.of(parts)


def test_the_scale_multiplies_the_change():
    given = thin(factors())
    once, half = CoreSpace(Ties(0.4))(given), CoreSpace(Ties(0.4), 0.5)(given)
    for name in SHAPES:
        assert_close(half[name], (once[name] + given.pretrained[name]) / 2)


def test_pieces_of_a_fused_matrix_are_one_change():
    zero = base({"qkv": (12, 5)})
    pieces = [Piece(4, normal(4, 2, seed=1), normal(2, 5, seed=2)), Piece(8, normal(4, 1), normal(1, 5, seed=4))]
    other = [Piece(0, normal(12, 2, seed=5), normal(2, 5, seed=6))]
    given = Problem(zero, {"a": Adapted(zero, {"qkv": pieces}), "b": Adapted(zero, {"qkv": other})})
    plain = Problem(zero, {t: expert.materialise() for t, expert in given.finetuned.items()})
    close(CoreSpace(TaskArithmetic(0.3))(given), TaskArithmetic(0.3)(plain))


@pytest.mark.parametrize("pose", [dense, thin])
def test_a_matrix_that_no_task_changed_stays(pose):
    given = {t: p | {"wide": (0 * p["wide"][0], p["wide"][1])} for t, p in factors().items()}
    posed = pose(given)
    assert torch.equal(CoreSpace()(posed)["wide"], posed.pretrained["wide"])
    untouched = Problem(posed.pretrained, {"idle": Adapted(posed.pretrained, {})})
    close(CoreSpace()(untouched), posed.pretrained)


LOW_RANK = {
    "core_space": CoreSpace(Ties(0.4), 0.7),
    "core_space of merged": CoreSpace(Ties(1.0), 0.7, "merged"),
    "core_space of DARE": CoreSpace(Dare(Ties(0.5))),
    "knots": KnowledgeOrientationThroughSvd(Ties(0.4)),
    "knots of inputs": KnowledgeOrientationThroughSvd(Ties(0.4), concat="input", rest="merged"),
    "task_arithmetic": TaskArithmetic(0.3, (1.0, -2.0, 0.5)),
    "average": Average((2, 1, 1)),
}


@pytest.mark.parametrize("method", LOW_RANK.values(), ids=LOW_RANK)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_low_rank_form_is_the_merged_model(method, dtype):
    given = thin(factors(), base(dtype=dtype))
    low, merged = method.low_rank(given), method(given)
    for name in SHAPES:
        assert_close(low[name], merged[name], rtol=1e-5, atol=1e-5)
        assert sum(piece.left.shape[1] for piece in low.pieces(name)) <= 7
    assert low.on(given.pretrained) and any(low.pieces(name) for name in SHAPES)


def test_biases_of_adapters_are_merged_or_left_in_the_low_rank_form():
    zero = Weights.of({"w": normal(5, 4), "w.bias": torch.zeros(5)})
    experts = {
        t: Adapted(zero, {"w": [Piece(0, normal(5, 1, seed=k), normal(1, 4))]}, {"w.bias": torch.full((5,), k + 1.0)})
        for k, t in enumerate("ab")
    }
    given = Problem(zero, experts)
    for rest, expected in (("pretrained", 0.0), ("merged", 1.5)):
        method = CoreSpace(Average(), rest=rest)  # pyright: ignore
        close(method.low_rank(given), method(given))
        assert method.low_rank(given)["w.bias"].tolist() == [expected] * 5


def test_no_low_rank_form_without_adapters_or_of_methods_that_fill_matrices():
    with pytest.raises(OptionError, match="0, 1, 2 are not known as low-rank differences to .*give PEFT adapters"):
        CoreSpace().low_rank(dense(factors()))
    with pytest.raises(OptionError, match="result of TIES is no low-rank difference.*core_space"):
        Ties().low_rank(thin(factors()))


def test_factors_that_are_not_finite_are_refused_by_name():
    zero = base({"w": (3, 2)})
    bad = Adapted(zero, {"w": [Piece(0, torch.full((3, 1), float("inf")), torch.zeros(1, 2))]}, origin="mine")
    with pytest.raises(CheckpointError, match="mine: tensor 'w' has 6 of 6"):
        CoreSpace()(Problem(zero, {"a": bad}))


@pytest.mark.parametrize("then", [FisherMerging(), JointFineTuning()], ids=["fisher", "mtl"])
def test_methods_that_need_more_than_weights_are_refused(then):
    with pytest.raises(OptionError, match=f"merge.then={type(then).__name__} needs .*merge@merge.then=ties"):
        CoreSpace(then)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("rest", "mean", "use pretrained or merged"),
        ("scale", float("inf"), "finite"),
        ("scale", "1", "finite"),
        ("exclude", "embed", "not a list of patterns"),
    ],
)
def test_values_out_of_range_are_refused(option, value, said):
    with pytest.raises(OptionError, match=f"merge.{option}=.*{said}"):
        CoreSpace(**{option: value})


def test_the_wrapped_method_is_configured_inside():
    built = configured(["merge=core_space", "merge@merge.then=dare", "merge.then.drop=0.1"])
    assert built.then.drop == 0.1
    assert configured(["merge=core_space", "merge.then.density=1"]).then == Ties(1.0)
