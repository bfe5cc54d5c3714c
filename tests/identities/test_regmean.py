"""RegMean: special Grams, the least-squares problem it solves, golden vectors, both layouts, and refusals."""

import pytest
import torch
from torch.testing import assert_close

from byom.errors import CheckpointError, OptionError
from byom.merge.base import Problem
from byom.merge.regmean import RegMean, shrunk
from byom.weights import Weights

EXACT = RegMean(off_diagonal=1.0, ridge=0.0)


def posed(matrices, grams, base=None):
    base = torch.zeros_like(matrices[0]) if base is None else base
    finetuned = {str(t): Weights.of({"w": value}) for t, value in enumerate(matrices)}
    return Problem(
        Weights.of({"w": base}), finetuned, {"gram": {str(t): Weights.of({"w": g}) for t, g in enumerate(grams)}}
    )


def merged(matrices, grams, method=EXACT, base=None):
    return method(posed(matrices, grams, base))["w"]


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def drawn(tasks=3, rows=50, outputs=3, inputs=4):
    x = random(tasks, rows, inputs, seed=1)
    return random(tasks, outputs, inputs), x.mT @ x / rows


def test_identity_grams_and_equal_grams_give_the_mean():
    matrices, grams = drawn()
    assert_close(merged(matrices, [torch.eye(4).double()] * 3), matrices.mean(0))
    assert_close(merged(matrices, [grams[0]] * 3), matrices.mean(0))


@pytest.mark.parametrize("method", [EXACT, RegMean()], ids=str)
def test_disjoint_inputs_select_columns_although_each_gram_is_singular(method):
    matrices = random(2, 3, 4)
    grams = [torch.diag(torch.tensor(row)).double() for row in ([1.0, 1, 0, 0], [0, 0, 1.0, 1])]
    expected = torch.cat([matrices[0][:, :2], matrices[1][:, 2:]], 1)
    assert_close(merged(matrices, grams, method), expected, rtol=1e-4, atol=1e-5)


def test_it_minimises_the_squared_difference_of_outputs():
    matrices, grams = drawn()

    def loss(w):
        return sum(float(((w - one) @ gram @ (w - one).T).trace()) for one, gram in zip(matrices, grams, strict=True))

    found = merged(matrices, grams)
    assert all(loss(found) < loss(found + 1e-3 * random(3, 4, seed=seed)) for seed in range(20))


def test_without_off_diagonals_it_is_a_weighted_mean_of_columns():
    matrices, grams = drawn()
    weights = grams.diagonal(dim1=1, dim2=2).unsqueeze(1)
    expected = (matrices * weights).sum(0) / weights.sum(0)
    assert_close(merged(matrices, grams, RegMean(off_diagonal=0.0, ridge=0.0)), expected)


@pytest.mark.parametrize(("off_diagonal", "expected"), [(1.0, [0.5, 0.5]), (0.5, [0.6, 0.4])])
def test_golden_vectors(off_diagonal, expected):
    matrices = [torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
    grams = [torch.tensor([[2.0, 1.0], [1.0, 2.0]]), torch.eye(2)]
    found = merged(matrices, grams, RegMean(off_diagonal=off_diagonal, ridge=0.0))
    assert_close(found, torch.tensor([expected]))


def test_one_task_gives_its_own_matrix_and_a_zero_gram_the_mean():
    matrices, grams = drawn()
    assert_close(merged(matrices[:1], grams[:1], base=random(3, 4, seed=5)), matrices[0])
    assert_close(merged(matrices, torch.zeros(3, 4, 4), RegMean()), matrices.mean(0))


def test_the_pretrained_model_does_not_matter():
    matrices, grams = drawn()
    assert_close(merged(matrices, grams, base=random(3, 4, seed=7)), merged(matrices, grams))


def test_a_direction_without_input_gets_the_mean():
    matrices, grams = drawn()
    turn = torch.linalg.qr(random(4, 4, seed=3))[0]
    kept = turn[:, :3] @ turn[:, :3].T
    found = merged(matrices, kept @ grams @ kept, RegMean(off_diagonal=1.0))
    assert_close(found @ turn[:, 3], matrices.mean(0) @ turn[:, 3])
    exact = torch.linalg.solve(
        (turn.T @ grams.sum(0) @ turn)[:3, :3], ((matrices @ kept @ grams).sum(0) @ turn[:, :3]).T
    )
    assert exact.isfinite().all() and found.isfinite().all()


def test_matrices_stored_in_x_out_are_those_of_the_transposed_problem():
    matrices, grams = drawn()
    square = random(2, 4, 4, seed=8)  # the shape alone could not tell
    assert_close(merged(matrices.mT, grams.unsqueeze(1)), merged(matrices, grams).T)
    assert_close(merged(square.mT, grams[:2].unsqueeze(1)), merged(square, grams[:2]).T)


def test_shrinking_keeps_the_diagonal():
    gram = drawn()[1][0]
    assert_close(shrunk(gram, 0.3).diagonal(), gram.diagonal())
    assert_close(shrunk(gram, 0.3)[0, 1], 0.3 * gram[0, 1])


def test_a_gram_that_is_not_finite_or_of_another_size_is_refused():
    matrices, grams = drawn()
    with pytest.raises(CheckpointError, match=r"Gram of 'w' has shape \(2, 2\), the parameter \(3, 4\)"):
        merged(matrices, grams[:, :2, :2])
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        merged(matrices, grams / 0)


@pytest.mark.parametrize(
    ("options", "said"),
    [({"off_diagonal": 1.1}, "merge.off_diagonal=1.1 is not a fraction"), ({"ridge": -1}, "merge.ridge=-1")],
)
def test_a_value_out_of_range_is_refused(options, said):
    with pytest.raises(OptionError, match=said):
        RegMean(**options)
