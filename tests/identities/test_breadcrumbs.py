"""Model Breadcrumbs: golden row, its two limits, exact counts and ties, outliers, short rows."""

import pytest
import torch
from torch.testing import assert_close

from byom.errors import OptionError
from byom.merge.breadcrumbs import ModelBreadcrumbs, middle
from byom.merge.task_arithmetic import TaskArithmetic
from tests.problems import grid, models, problem

ROW = torch.tensor([10.0, -9, 8, 7, -6, 5, 4, 3, 2, 1])
GRANULARITIES = ["per_row", "per_tensor"]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_golden_row(granularity):
    assert (ROW * middle(ROW, 0.3, 0.2, granularity)).tolist() == [0, 0, 8, 7, -6, 0, 0, 0, 0, 0]


def test_golden_row_in_the_form_of_the_paper():
    beta, gamma = 0.5, 0.8
    assert (ROW * middle(ROW, gamma - beta, 1 - gamma)).tolist() == [0, 0, 8, 7, -6, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_keeping_everything_is_task_arithmetic(granularity):
    given = problem(*models(3, torch.float64, values=grid))
    everything = ModelBreadcrumbs(1.0, 0.0, 0.3, granularity)(given)
    expected = TaskArithmetic(0.3)(given)
    for name in expected.mergeable():
        assert torch.equal(everything[name], expected[name])


@pytest.mark.parametrize("keep", [0.0, 0.1, 0.29, 0.5, 1.0])
@pytest.mark.parametrize("remove_top", [0.0, 0.006, 0.2])
def test_every_row_has_exactly_its_count_and_the_middle_ranks(keep, remove_top):
    if keep + remove_top > 1:
        keep = 1 - remove_top
    delta = torch.randn(7, 100, generator=torch.Generator().manual_seed(0))
    first, count = int(remove_top * 100 + 1e-9), int(keep * 100 + 1e-9)
    mask = middle(delta, keep, remove_top)
    sizes = delta.abs()
    assert mask.sum(1).tolist() == [count] * 7
    for row, chosen in zip(sizes, mask, strict=True):
        assert_close(row[chosen].sort(descending=True).values, row.sort(descending=True).values[first:][:count])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_equal_magnitudes_go_to_the_lowest_position(granularity):
    delta = torch.tensor([1.0, -1, 1, -1, 1, -1, 1, -1, 1, -1])
    assert middle(delta, 0.3, 0.2, granularity).nonzero().flatten().tolist() == [2, 3, 4]


@pytest.mark.parametrize("shape", [(50,), (20, 30), (4, 5, 12)], ids=str)
@pytest.mark.parametrize("distinct", [2, 5, 1000])
@pytest.mark.parametrize(("keep", "remove_top"), [(0.15, 0.05), (0.5, 0.1), (0.0, 0.2), (0.8, 0.2)])
def test_the_mask_is_that_of_a_stable_sort(shape, distinct, keep, remove_top):
    delta = torch.randint(-distinct, distinct, shape, generator=torch.Generator().manual_seed(2)) / 8
    first = int(remove_top * shape[-1] + 1e-9)
    last = min(shape[-1], first + int(keep * shape[-1] + 1e-9))
    order = delta.abs().sort(dim=-1, descending=True, stable=True).indices[..., first:last]
    expected = torch.zeros(shape, dtype=torch.bool).scatter_(-1, order, True)
    assert torch.equal(middle(delta, keep, remove_top), expected)


def test_rows_are_ranked_apart_and_tensors_together():
    delta = torch.tensor([[10.0, 9, 8, 7], [0.4, 0.3, 0.2, 0.1]])
    assert middle(delta, 0.5, 0.0).tolist() == [[True, True, False, False]] * 2
    assert middle(delta, 0.5, 0.0, "per_tensor").tolist() == [[True] * 4, [False] * 4]
    assert middle(delta, 0.25, 0.25, "per_tensor").tolist() == [[False, False, True, True], [False] * 4]


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_an_outlier_vanishes(granularity):
    delta = torch.randn(20, 40, generator=torch.Generator().manual_seed(1))
    delta[3, 5] = 100 * delta.abs().max()
    assert not middle(delta, 0.9, 1 / 40, granularity)[3, 5]
    assert middle(delta, 0.9, 0.0, granularity)[3, 5]


def test_short_rows_lose_no_outlier_and_may_keep_nothing():
    short = torch.tensor([[3.0, 2, 1]])
    assert middle(short, 0.9, 0.3).tolist() == [[True, True, False]]
    assert not middle(short, 0.15, 0.0).any()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_scalar_is_kept_whole(granularity):
    assert middle(torch.tensor(2.0), 0.0, 0.5, granularity).item() is True


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0,)], ids=str)
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_nothing_has_an_empty_mask(shape, granularity):
    assert middle(torch.zeros(shape), 0.5, 0.1, granularity).shape == shape


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"keep": 1.5}, r"merge\.keep=1\.5 is not a fraction"),
        ({"remove_top": -0.1}, r"merge\.remove_top=-0\.1 is not a fraction"),
        ({"keep": 0.9, "remove_top": 0.2}, "more than all entries"),
        ({"granularity": "per_layer"}, "use per_row or per_tensor"),
    ],
    ids=str,
)
def test_what_is_out_of_range_is_refused(values, said):
    with pytest.raises(OptionError, match=said):
        ModelBreadcrumbs(**values)
