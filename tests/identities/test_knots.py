"""KnOTS: linear merging, equal and single tasks, factors beside dense matrices, gauges, golden vectors, refusals."""

import pytest
import torch
from torch.testing import assert_close

from byom.errors import OptionError
from byom.merge.average import Average
from byom.merge.base import Problem
from byom.merge.fisher import FisherMerging
from byom.merge.knots import KnowledgeOrientationThroughSvd, basis, left_singular
from byom.merge.mtl import JointFineTuning
from byom.merge.task_arithmetic import TaskArithmetic
from byom.merge.ties import Ties
from byom.merge.tsv import TaskSingularVectors
from byom.weights import Weights
from byom.weights.lowrank import Adapted, Piece
from tests.factors import SHAPES, base, close, dense, factors, normal, thin
from tests.problems import configured, models, problem

CONCAT = ["output", "input"]


def knots(then, concat="output", **options):
    return KnowledgeOrientationThroughSvd(then, options.pop("scale", 1.0), concat, **options)


@pytest.mark.parametrize("concat", CONCAT)
@pytest.mark.parametrize("then", [TaskArithmetic(0.3), TaskArithmetic(-1.0), Average()], ids=["sum", "minus", "mean"])
@pytest.mark.parametrize("pose", [dense, thin])
def test_a_linear_method_is_not_changed(then, concat, pose):
    given = pose(factors())
    close(knots(then, concat)(given), then(given))


@pytest.mark.parametrize("concat", CONCAT)
@pytest.mark.parametrize("rest", ["pretrained", "merged"])
def test_a_linear_method_on_all_tensors_of_a_model(concat, rest):
    given = problem(*models(3, torch.float64))
    merged, expected = knots(TaskArithmetic(0.3), concat, rest=rest)(given), TaskArithmetic(0.3)(given)
    matrices = {"embed", "layer.weight"}
    assert set(knots(TaskArithmetic()).fallbacks(given)) == set(given.pretrained.mergeable()) - matrices
    for name in given.pretrained.mergeable():
        assert_close(merged[name], (expected if name in matrices or rest == "merged" else given.pretrained)[name])


def test_the_scale_is_that_of_matrices_and_of_the_rest():
    given = problem(*models(3, torch.float64))
    merged = knots(TaskArithmetic(1.0), scale=0.25, rest="merged")(given)
    expected = TaskArithmetic(0.25)(given)
    for name in given.pretrained.mergeable():
        assert_close(merged[name], expected[name])


def test_what_is_excluded_is_no_matrix():
    given = thin(factors())
    merged = knots(TaskArithmetic(0.3), exclude=["wi*"])(given)
    assert torch.equal(merged["wide"], given.pretrained["wide"])
    assert_close(merged["tall"], TaskArithmetic(0.3)(given)["tall"])
    close(knots(TaskArithmetic(0.3), exclude=["wi*"], rest="merged")(given), TaskArithmetic(0.3)(given))


@pytest.mark.parametrize("concat", CONCAT)
@pytest.mark.parametrize("tasks", [1, 2, 5])
@pytest.mark.parametrize("pose", [dense, thin])
def test_equal_tasks_at_full_density_are_that_task(tasks, concat, pose):
    one = factors(1)["0"]
    given = pose({str(t): one for t in range(tasks)})
    close(knots(Ties(1.0), concat)(given), given.finetuned["0"])


@pytest.mark.parametrize("concat", CONCAT)
@pytest.mark.parametrize("then", [Ties(0.2), Ties(0.6, combine="sum"), TaskSingularVectors()], ids=repr)
@pytest.mark.parametrize("tasks", [2, 3, 8])
def test_factors_give_what_dense_matrices_give(then, concat, tasks):
    given = factors(tasks)
    close(knots(then, concat)(thin(given)), knots(then, concat)(dense(given)), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("concat", CONCAT)
@pytest.mark.parametrize("factor", [4.0, -0.125])
def test_rescaling_the_factors_changes_nothing(concat, factor):
    given = factors()
    turned = {t: {n: (a * factor, b / factor) for n, (a, b) in pairs.items()} for t, pairs in given.items()}
    close(knots(Ties(0.4), concat)(thin(given)), knots(Ties(0.4), concat)(thin(turned)))


@pytest.mark.parametrize("concat", CONCAT)
def test_turning_the_factors_changes_nothing(concat):
    given = factors()

    def turn(a, b, seed):
        gauge = normal(a.shape[1], a.shape[1], seed=seed) + 3 * torch.eye(a.shape[1])
        return a @ gauge, torch.linalg.solve(gauge, b)

    turned = {t: {n: turn(*pair, seed=3) for n, pair in pairs.items()} for t, pairs in given.items()}
    close(knots(Ties(0.4), concat)(thin(given)), knots(Ties(0.4), concat)(thin(turned)))


def test_input_is_output_of_the_transposed():
    given = factors()
    flipped = {t: {n: (b.T, a.T) for n, (a, b) in pairs.items()} for t, pairs in given.items()}
    zero = base()
    turned = Weights.of({name: zero[name].T for name in zero})
    merged, other = knots(Ties(0.4), "input")(thin(given, zero)), knots(Ties(0.4))(thin(flipped, turned))
    for name in SHAPES:
        assert_close(merged[name], other[name].T)


def test_the_scale_multiplies_the_change():
    given = thin(factors())
    once, half = knots(Ties(0.4))(given), knots(Ties(0.4), scale=0.5)(given)
    for name in SHAPES:
        assert_close(half[name], (once[name] + given.pretrained[name]) / 2)
    close(knots(Ties(0.4, 0.5))(given), half)


def one(deltas):
    """Pose one matrix on a pre-trained model of zeros."""
    experts = {str(t): Weights.of({"w": delta}) for t, delta in enumerate(deltas)}
    return Problem(Weights.of({"w": torch.zeros_like(deltas[0])}), experts)


ROTATION = torch.tensor([[0.6, 0.8], [-0.8, 0.6]], dtype=torch.float64)
COORDINATES = torch.tensor([[[4.0, 0.0], [0.0, 1.0]], [[0.0, 2.0], [1.0, 0.0]]], dtype=torch.float64)


def test_golden_the_coordinates_are_merged_and_not_the_entries():
    """The rows of ``[R_1 | R_2]`` are orthogonal, so U is the rotation; entry by entry, 2.4 and 0.8 were averaged."""
    given = one(ROTATION @ COORDINATES)
    assert_close(knots(Ties(1.0))(given)["w"], torch.tensor([[3.2, 2.0], [-2.6, -1.0]], dtype=torch.float64))
    assert_close(Ties(1.0)(given)["w"][0, 0], torch.tensor(1.6, dtype=torch.float64))


def test_golden_of_the_other_side():
    given = one((ROTATION @ COORDINATES).mT)
    expected = torch.tensor([[3.2, -2.6], [2.0, -1.0]], dtype=torch.float64)
    assert_close(knots(Ties(1.0), "input")(given)["w"], expected)


def test_golden_ranks_run_over_all_matrices():
    """Of six coordinates (one direction a matrix), half are the three of the larger matrix."""
    row, ones = torch.tensor([[3.0, 2.0, 1.0]]), torch.ones(2, 1)
    state = {"large": 10 * ones @ row, "small": ones @ row}
    given = Problem(Weights.of({n: torch.zeros(2, 3) for n in state}), {"a": Weights.of(state)})
    merged = knots(Ties(0.5))(given)
    assert_close(merged["large"], state["large"])
    assert not merged["small"].any()


@pytest.mark.parametrize("pose", [dense, thin])
@pytest.mark.parametrize("concat", CONCAT)
def test_only_directions_that_exist_are_kept(pose, concat):
    given = pose(factors(3, shapes={"w": (40, 30)}), base({"w": (40, 30)}))
    plan = knots(Ties(0.2), concat).plan(given)
    assert plan.bases["w"].shape == (30 if concat == "input" else 40, 2 + 2 + 3)
    assert_close(plan.bases["w"].T @ plan.bases["w"], torch.eye(7, dtype=torch.float64))


def test_a_low_rank_change_that_was_rounded_is_of_full_rank_and_its_factors_are_not():
    zero = base({"w": (40, 30)}, torch.float32)
    given = {t: {n: (1e-3 * a, b) for n, (a, b) in p.items()} for t, p in factors(2, shapes={"w": (40, 30)}).items()}
    rounded = dense(given, zero)
    rounded = Problem(zero, {t: Weights.of({"w": e["w"].float()}) for t, e in rounded.finetuned.items()})
    assert knots(Ties(), rtol=1e-7).plan(rounded).bases["w"].shape[1] > 4
    assert knots(Ties(), rtol=1e-7).plan(thin(given, zero)).bases["w"].shape[1] == 4
    assert knots(Ties(), rtol=1e-3).plan(rounded).bases["w"].shape[1] == 4


def test_a_tiny_rtol_keeps_what_squaring_would_lose():
    left, right = (torch.linalg.qr(normal(6, 6, seed=seed))[0] for seed in (1, 2))
    matrix = left * torch.tensor([1, 1e-2, 1e-5, 1e-9, 1e-11, 0], dtype=torch.float64) @ right
    for rtol, kept in ((1e-3, 2), (1e-6, 3), (1e-10, 4), (1e-12, 5)):
        found = left_singular([matrix], rtol)
        assert found.shape == (6, kept)
        assert_close((left[:, :kept] * found).sum(0).abs(), torch.ones(kept, dtype=torch.float64))


def test_pieces_of_a_fused_matrix_are_one_change():
    zero = base({"qkv": (12, 5)})
    pieces = [
        Piece(4, normal(4, 2, seed=1), normal(2, 5, seed=2)),
        Piece(8, normal(4, 1, seed=3), normal(1, 5, seed=4)),
    ]
    other = [Piece(0, normal(12, 2, seed=5), normal(2, 5, seed=6))]
    given = Problem(zero, {"a": Adapted(zero, {"qkv": pieces}), "b": Adapted(zero, {"qkv": other})})
    plain = Problem(zero, {t: expert.materialise() for t, expert in given.finetuned.items()})
    close(knots(Ties(0.5))(given), knots(Ties(0.5))(plain))


def test_what_was_trained_whole_or_not_at_all_counts_as_it_is():
    zero, given = base(), factors()
    adapted = thin(given, zero)
    first = Adapted(zero, {"tall": adapted.finetuned["0"].pieces("tall")}, {"wide": zero["wide"] + 1})
    mixed = Problem(zero, dict(adapted.finetuned) | {"0": first})
    plain = Problem(zero, {t: expert.materialise() for t, expert in mixed.finetuned.items()})
    close(knots(Ties(0.5))(mixed), knots(Ties(0.5))(plain))


@pytest.mark.parametrize("pose", [dense, thin])
def test_a_matrix_that_no_task_changed_stays(pose):
    given = {t: p | {"wide": (0 * p["wide"][0], p["wide"][1])} for t, p in factors().items()}
    posed = pose(given)
    assert torch.equal(knots(Ties(0.5))(posed)["wide"], posed.pretrained["wide"])
    untouched = Problem(posed.pretrained, {"idle": Adapted(posed.pretrained, {})})
    close(knots(Ties(0.5))(untouched), posed.pretrained)


def test_a_basis_of_products_is_that_of_the_matrices():
    chains = [(normal(9, 2, seed=t), normal(2, 4, seed=5 + t)) for t in range(3)]
    whole = basis([(a @ b,) for a, b in chains], 1e-6)
    found = basis(chains, 1e-6)
    assert whole.shape == found.shape == (9, 6)
    assert_close((whole * found).sum(0).abs(), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("then", [FisherMerging(), JointFineTuning()], ids=["fisher", "mtl"])
def test_methods_that_need_more_than_weights_are_refused(then):
    with pytest.raises(OptionError, match=f"merge.then={type(then).__name__} needs .*merge@merge.then=ties"):
        knots(then)


@pytest.mark.parametrize(
    ("option", "value", "said"),
    [
        ("concat", "rows", "use output or input"),
        ("rest", "mean", "use pretrained or merged"),
        ("rtol", 1.0, "relative"),
        ("rtol", -1e-9, "relative"),
        ("rtol", float("nan"), "relative"),
        ("scale", float("inf"), "finite"),
        ("exclude", "embed", "not a list of patterns"),
    ],
)
def test_values_out_of_range_are_refused(option, value, said):
    with pytest.raises(OptionError, match=f"merge.{option}=.*{said}"):
        KnowledgeOrientationThroughSvd(**{option: value})


def test_the_wrapped_method_is_configured_inside():
    built = configured(["merge=knots", "merge@merge.then=dare", "merge.then.drop=0.1"])
    assert built.then.drop == 0.1
    built = configured(["merge=knots", "merge.then.density=1"])
    assert built.then == Ties(1.0)
