"""FR-Merging: the authors' bands literally, and the frequencies that go."""

import pytest
import torch
from torch.testing import assert_close

from byom.errors import OptionError
from byom.merge.fr import FrequencyMerging, filtered
from byom.merge.task_arithmetic import TaskArithmetic
from tests.problems import one_tensor, random


def bands(matrix, radius):
    """Return the sum of two bands of frequencies that share the ring between them."""
    height, width = matrix.shape
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    distance = ((x - width // 2) ** 2 + (y - height // 2) ** 2).double().sqrt()
    inner, outer = min(height, width) // 10, min(height, width) * radius
    spectrum = torch.fft.fft2(matrix)
    inside, between = distance <= inner, (distance >= inner) & (distance <= outer)
    return torch.fft.ifft2(spectrum * inside).real + torch.fft.ifft2(spectrum * between).real


@pytest.mark.parametrize("radius", [0.2, 0.5, 0.7])
@pytest.mark.parametrize("shape", [(20, 20), (60, 20), (21, 40), (7, 5)], ids=str)
def test_the_bands_of_the_authors(shape, radius):
    matrix = random(*shape)
    assert_close(filtered(matrix, radius), bands(matrix, radius))


def test_the_shares_that_are_dropped():
    def dropped(*shape):
        rows, columns = (torch.arange(size) - size // 2 for size in shape)
        return int((rows[:, None] ** 2 + columns**2 > (0.7 * min(shape)) ** 2).sum())

    assert dropped(768, 768) == 113
    assert round(dropped(2304, 768) / (2304 * 768), 2) == 0.58
    assert round(dropped(3072, 768) / (3072 * 768), 2) == 0.68


def test_golden():
    """The mean of a matrix is its lowest frequency, in a corner of the grid, and goes first."""
    constant = torch.full((20, 20), 3.0).double()
    assert_close(filtered(constant, 0.7), torch.zeros(20, 20).double())
    checks = constant * (-1.0) ** (torch.arange(20)[:, None] + torch.arange(20))  # the highest, in the middle
    assert_close(filtered(checks, 0.05), checks)


def test_the_filtered_sum_is_added():
    deltas = random(3, 20, 30)
    found = FrequencyMerging(radius=0.4, scale=0.3)(one_tensor(deltas))["w"]
    assert_close(found, 0.5 + 0.3 * sum(filtered(delta, 0.4) for delta in deltas))


def test_what_is_no_matrix_is_added_whole():
    vectors, matrices = random(3, 5), random(3, 20, 20)
    assert_close(FrequencyMerging(scale=0.3)(one_tensor(vectors))["w"], TaskArithmetic(0.3)(one_tensor(vectors))["w"])
    embed = one_tensor(matrices, "embed.weight")
    assert_close(FrequencyMerging(scale=0.3)(embed)["embed.weight"], TaskArithmetic(0.3)(embed)["embed.weight"])


def test_a_radius_below_zero_is_refused():
    with pytest.raises(OptionError, match="merge.radius=-1"):
        FrequencyMerging(radius=-1)
