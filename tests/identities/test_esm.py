"""ESM: the formula from rows of inputs, Iso-C and TSV-M as its ends, and what it does not depend on."""

import pytest
import torch
from torch.testing import assert_close

from byom.errors import CheckpointError, OptionError
from byom.functional.linalg import polar
from byom.merge.base import Problem
from byom.merge.esm import EssentialSubspaceMerging as Esm
from byom.merge.esm import essential, joined
from byom.merge.iso_c import isotropic
from byom.merge.tsv import TaskSingularVectors, add_orthogonalised
from byom.weights import Weights
from tests.problems import one_tensor, random

PLAIN = Esm(power=0.0, energy=0.0)


def second_moments(rows):
    return rows.mT @ rows / rows.shape[1]


def orthogonal(size, seed=0):
    return torch.linalg.qr(random(size, size, seed=seed))[0]


def posed(deltas, grams, name="w"):
    held = one_tensor(deltas, name)
    return Problem(
        held.pretrained,
        held.finetuned,
        {"gram": {str(t): Weights.of({name: gram}) for t, gram in enumerate(grams)}},
    )


def literal(deltas, rows, power, energy):
    """Follow the published code step by step, from rows of inputs and with plain decompositions."""
    tasks, outputs, _ = deltas.shape
    rank, left, right, sizes = outputs // tasks, [], [], []
    for delta, x in zip(deltas, rows, strict=True):
        _, values, directions = torch.linalg.svd(x @ delta.T, full_matrices=False)
        size = torch.linalg.norm(delta)
        weights = (values[:rank] ** 2 / (values[:rank] ** 2).mean()) ** energy
        weights = weights / weights.mean()
        left.append(directions[:rank].T * weights)
        right.append((directions[:rank] @ delta) * weights[:, None] * size**power)
        sizes.append(size)
    u, a = torch.cat(left, 1), torch.cat(right) / (sum(sizes) / tasks) ** power
    columns = a.norm(dim=0)
    a = a * (columns / columns.mean()) ** power
    factors = []
    for each in (u, a):
        p, values, q = torch.linalg.svd(each, full_matrices=False)
        factors.append(p @ q * values.mean())
    return 2 * factors[0] @ factors[1]


@pytest.mark.parametrize("shape", [(12, 7), (9, 20), (8, 8)], ids=str)
def test_the_formula(shape):
    deltas, rows = random(3, *shape), random(3, 40, shape[1], seed=1) + 1
    found = Esm(scale=0.7, power=1.5, energy=0.3)(posed(deltas, second_moments(rows)))["w"]
    assert_close(found - 0.5, 0.7 * literal(deltas, rows, 1.5, 0.3))


def test_golden():
    """One task, G = diag(4, 1), tau = I: weights 4/3 and 2/3, columns again; A = diag(16, 4) / 9, of mean 10 / 9."""
    held = posed(torch.eye(2).double()[None], torch.diag(torch.tensor([4.0, 1.0])).double()[None])
    assert_close(Esm(scale=0.5, power=1.0, energy=0.5)(held)["w"] - 0.5, torch.eye(2).double() * 10 / 9)


def test_golden_of_two_tasks():
    """tau_1 = 3 e_1 e_1ᵀ and tau_2 = e_2 e_2ᵀ, k = 1: tasks weigh 3/2 and 1/2, columns the same; A is their cube."""
    deltas = torch.zeros(2, 2, 2).double()
    deltas[0, 0, 0], deltas[1, 1, 1] = 3.0, 1.0
    grams = torch.eye(2).double().expand(2, 2, 2)
    rows = torch.tensor([3.0 * 1.5, 0.5]).double()
    rows = rows * (rows / rows.mean())
    assert_close(Esm(power=1.0)(posed(deltas, grams))["w"] - 0.5, torch.eye(2).double() * 2 * rows.mean())


# its ends


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)], ids=str)
def test_one_task_moves_by_twice_its_isotropic_change(shape):
    deltas = random(1, *shape)
    found = PLAIN(posed(deltas, torch.eye(shape[1]).double()[None]))["w"]
    assert_close(found - 0.5, 2 * isotropic(deltas[0]))


def test_tasks_that_share_no_direction_have_the_directions_of_tsv():
    deltas = torch.zeros(2, 8, 10).double()
    deltas[0, :4, :5], deltas[1, 4:, 5:] = random(4, 5), random(4, 5, seed=1)
    found = PLAIN(posed(deltas, torch.eye(10).double().expand(2, 10, 10)))["w"] - 0.5
    theirs = add_orthogonalised(deltas)
    assert_close(found, 2 * torch.linalg.svdvals(theirs).mean() * polar(theirs))


def test_without_grams_a_matrix_is_that_of_tsv():
    held = one_tensor(random(3, 7, 9))
    held = Problem(held.pretrained, held.finetuned, {"gram": {t: Weights.of({}) for t in held.tasks}})
    assert_close(Esm(scale=0.8)(held)["w"], TaskSingularVectors(scale=0.8)(held)["w"])
    assert Esm().fallbacks(held) == ["w"]


@pytest.mark.parametrize(("shape", "name"), [((6,), "w"), ((2, 9), "w"), ((9, 6), "text_projection")], ids=str)
def test_other_tensors_move_by_the_mean(shape, name):
    deltas = random(3, *shape)
    held = posed(deltas, torch.eye(shape[-1]).double().expand(3, -1, -1), name)
    assert_close(Esm(scale=2.0)(held)[name], 0.5 + 2 * deltas.mean(0))
    assert (name in Esm().fallbacks(held)) == (shape == (2, 9))


# what it does not depend on


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)], ids=str)
def test_a_turn_of_the_outputs_turns_the_result(shape):
    deltas, grams, turn = random(3, *shape), second_moments(random(3, 30, shape[1], seed=1)), orthogonal(shape[0])
    assert_close(joined(turn @ deltas, grams, 2.0, 0.15), turn @ joined(deltas, grams, 2.0, 0.15))


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)], ids=str)
def test_a_turn_of_the_inputs_turns_the_result_where_columns_weigh_alike(shape):
    deltas, grams, turn = random(3, *shape), second_moments(random(3, 30, shape[1], seed=1)), orthogonal(shape[1])
    given = deltas @ turn.T, turn @ grams @ turn.T
    assert_close(joined(*given, 0.0, 0.15), joined(deltas, grams, 0.0, 0.15) @ turn.T)
    assert not torch.allclose(joined(*given, 2.0, 0.15), joined(deltas, grams, 2.0, 0.15) @ turn.T)
    shuffled = torch.eye(shape[1]).double().flip(0) * random(shape[1], seed=2).sign()
    given = deltas @ shuffled.T, shuffled @ grams @ shuffled.T
    assert_close(joined(*given, 2.0, 0.15), joined(deltas, grams, 2.0, 0.15) @ shuffled.T)


def test_tasks_are_a_set_and_the_size_of_their_inputs_is_none():
    deltas, grams = random(3, 6, 9), second_moments(random(3, 30, 9, seed=1))
    found = joined(deltas, grams, 2.0, 0.15)
    assert_close(joined(deltas.flip(0), grams.flip(0), 2.0, 0.15), found)
    assert_close(joined(deltas, grams * torch.tensor([0.1, 5.0, 3.0]).double()[:, None, None], 2.0, 0.15), found)


def test_a_parameter_stored_in_by_out_is_merged_as_its_transpose():
    deltas, grams = random(3, 8, 5), second_moments(random(3, 30, 5, seed=1))
    turned = Esm()(posed(deltas.mT.contiguous(), grams[:, None]))["w"]
    assert_close(turned.T, Esm()(posed(deltas, grams))["w"])


# what is not there


@pytest.mark.parametrize("shape", [(9, 6), (6, 9)], ids=str)
def test_directions_that_no_input_shows_are_none(shape):
    rows = random(2, shape[1])
    directions, energies = essential(random(*shape), (rows.T @ rows).float(), 4)
    assert directions.shape == (shape[0], 2) and (energies > 0).all()
    assert essential(random(*shape), torch.zeros(shape[1], shape[1]), 4)[0].shape == (shape[0], 0)


def test_an_idle_task_takes_its_share_of_directions_and_no_more():
    deltas, grams = random(2, 9, 9), second_moments(random(3, 30, 9, seed=1))
    idle = torch.cat([deltas, torch.zeros(1, 9, 9).double()])
    found = Esm(energy=0.0, power=0.0)(posed(idle, grams))["w"] - 0.5
    assert int(torch.linalg.matrix_rank(found)) == 6 and found.isfinite().all()


# layers


def test_layers_of_a_kind_are_scaled_by_their_size_over_the_mean():
    shapes = {"a.0.w": (6, 7), "a.1.w": (6, 7), "a.1.fc1": (6, 7), "a.1.b": (6,)}
    experts = {t: {n: random(*s, seed=i + 9 * t) * (i + 1) for i, (n, s) in enumerate(shapes.items())} for t in (1, 2)}
    base = Weights.of({n: torch.zeros(s).double() for n, s in shapes.items()})
    grams = {n: torch.eye(7).double() for n in ("a.0.w", "a.1.w", "a.1.fc1")}
    finetuned = {str(t): Weights.of(s) for t, s in experts.items()}
    held = Problem(base, finetuned, {"gram": {t: Weights.of(grams) for t in finetuned}})
    found = Esm(power=1.5)(held)
    alone = {
        n: joined(torch.stack([experts[1][n], experts[2][n]]), torch.stack([grams[n]] * 2), 1.5, 0.15) for n in grams
    }
    sizes = [alone[n].norm() for n in ("a.0.w", "a.1.w")]
    for name, size in zip(("a.0.w", "a.1.w"), sizes, strict=True):
        assert_close(found[name], alone[name] * (size / (sum(sizes) / 2)) ** 1.5)
    assert_close(found["a.1.fc1"], alone["a.1.fc1"])
    assert_close(found["a.1.b"], (experts[1]["a.1.b"] + experts[2]["a.1.b"]) / 2)


# what it looks at, and options


def test_it_needs_training_inputs_and_no_label():
    assert Esm().needs.statistics == {"gram"} and Esm().needs.inputs == {"train"}
    assert not Esm().needs.labels and not Esm().needs.sees_test


def test_a_gram_of_another_layer_is_refused():
    with pytest.raises(CheckpointError, match=r"the Gram of 'w' has shape \(5, 5\), the parameter \(6, 7\)"):
        Esm()(posed(random(2, 6, 7), torch.eye(5).double().expand(2, 5, 5)))


@pytest.mark.parametrize("change", [{"power": -1.0}, {"energy": float("nan")}, {"exclude": "*proj*"}], ids=str)
def test_what_is_out_of_range_is_refused(change):
    with pytest.raises(OptionError, match=f"merge.{next(iter(change))}="):
        Esm(**change)
