"""Range-coded integers: the bytes that every machine writes, their number, and what is found where they are corrupt."""

from math import lgamma, log

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from byom.errors import CheckpointError
from byom.variants.base import coded
from byom.variants.base.positions import decode, encode, smallest


def entropy(count, total):
    """Return log2 C(n, k) in bytes."""
    return (lgamma(total + 1) - lgamma(count + 1) - lgamma(total - count + 1)) / log(2) / 8


def chosen(share, total, seed=0):
    places = np.random.default_rng(seed).choice(total, int(share * total), replace=False)
    return torch.from_numpy(np.sort(places))


@given(st.lists(st.integers(0, 20) | st.integers(0, 2**48 - 1), max_size=30))
@settings(max_examples=50, deadline=None)
def test_numbers_round_trip(numbers):
    given = np.array(numbers, dtype=np.int64)
    assert coded.decode(coded.encode(given), len(given)).tolist() == numbers


@given(st.sets(st.integers(0, 99), min_size=1, max_size=99))
@settings(max_examples=50, deadline=None)
def test_positions_round_trip(places):
    given = torch.tensor(sorted(places))
    for numel in (100, 10**6):
        kind, data = smallest(given, numel)
        assert torch.equal(decode(kind, data, numel, len(given)), given)
        assert data.dtype == torch.uint8 and len(data) <= len(encode(given, numel)[1])


def test_every_class_follows_the_one_before_it():
    firsts = coded.first(np.arange(188))
    assert firsts[:14].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20] and bool((np.diff(firsts) > 0).all())
    around = np.unique(np.concatenate([firsts, firsts[1:] - 1]))
    assert coded.decode(coded.encode(around), len(around)).tolist() == around.tolist()


def test_the_weights_of_gaps_are_their_probabilities():
    weights = coded.geometric(3, 20)
    assert weights[:8].tolist() == pytest.approx([0.15 * 0.85**gap for gap in range(8)], rel=1e-12)
    assert weights[8] == pytest.approx(0.15 * (0.85**8 + 0.85**9), rel=1e-12)
    assert len(weights) == 13  # the class of 16 to 19 holds the widest gap, 17


@pytest.mark.parametrize("share", [0.001, 0.01, 0.05, 0.1, 0.3, 0.5])
def test_random_positions_take_their_entropy(share):
    places = chosen(share, 10**6)
    kind, data = smallest(places, 10**6)
    assert entropy(len(places), 10**6) < len(data) < 1.002 * entropy(len(places), 10**6) + 7
    assert torch.equal(decode(kind, data, 10**6, len(places)), places)


def test_positions_that_lie_together_take_less():
    places = torch.cat([500 * row + chosen(0.4, 50, row) for row in range(400)])  # a tenth of the columns
    assert len(smallest(places, 200_000)[1]) < 0.6 * entropy(len(places), 200_000)


def test_golden_bytes():
    assert coded.encode(np.arange(0)).tolist() == [1, 0, 0, 0, 177, 0]
    assert coded.encode(np.array([5])).tolist() == [6, 0, 0, 0, 0, 0, 255, 253, 4, 177, 0]
    assert coded.encode(np.array([4, 0, 11]), coded.geometric(3, 20)).tolist() == [90, 174, 28, 130]
    numbers = np.arange(1000) ** 2 % 37
    assert coded.encode(numbers).tobytes()[:20].hex() == "11d5e500e5e50000e5e5f5e500e5e5fff5ffbdef"
    assert sum(coded.encode(numbers).tolist()) == 87841
    kind, data = smallest(torch.arange(0, 20_000, 40) + torch.arange(500) % 7, 20_000)
    assert (kind, data[:12].tolist(), len(data)) == ("coded", [18, 115, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], 247)


def test_what_is_out_of_range_is_refused():
    for numbers in ([-1], [2**48]):
        with pytest.raises(ValueError, match=r"must lie in \[0, 2\^48\)"):
            coded.encode(np.array(numbers))
    with pytest.raises(ValueError, match="a number of class 9 has none of the 4 weights"):
        coded.encode(np.array([1, 10]), np.ones(4))


def corrupted(data):
    """Yield bytes that differ from some, with what differs."""
    yield data[:-4]
    yield np.concatenate([data, np.zeros(4, dtype=np.uint8)])
    for place in range(0, len(data), 7):
        changed = data.copy()
        changed[place] ^= 1 << place % 8
        yield changed


def test_corrupt_numbers_are_found_but_for_the_odds_of_the_closing_one():
    numbers = np.random.default_rng(0).integers(0, 40, 400)
    weights = np.ones(20)
    data, missed = coded.encode(numbers, weights), 0
    for changed in corrupted(data):
        try:
            missed += not np.array_equal(coded.decode(changed, 400, weights), numbers)
        except CheckpointError as error:
            assert "coded integers are corrupt: " in str(error) and "pack or fetch it again" in str(error)
    assert missed == 0


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "weights are cut short"),
        ([3, 17, 0], "weights are cut short"),
        ([2, 0, 0, 1, 2, 3, 4], "weights are cut short"),
        ([2, 255, 255, 1, 2, 3], "3 bytes are no whole number of words"),
        ([2, 255, 255], "not as they were written"),
        ([2, 255, 255, *[255] * 8], "no numbers have their words"),
    ],
)
def test_bytes_that_hold_no_numbers_are_refused(data, said):
    with pytest.raises(CheckpointError, match=said):
        coded.decode(np.array(data, dtype=np.uint8), 5)


@pytest.mark.parametrize("numel", [6000, 10**7])
def test_positions_of_another_tensor_are_refused(numel):
    places = chosen(0.05, 10**5)
    kind, data = smallest(places, 10**5)
    with pytest.raises(CheckpointError, match="corrupt"):
        decode(kind, data, numel, len(places))
    with pytest.raises(CheckpointError, match="corrupt"):
        decode(kind, data, 10**5, len(places) - 1)
    with pytest.raises(CheckpointError, match="0 of 100000 places are not coded"):
        decode(kind, data, 10**5, 0)


def test_numbers_that_lead_beyond_the_places_are_refused():
    data = torch.from_numpy(coded.encode(np.array([3, 50, 60])))
    assert decode("coded", data, 200, 3).tolist() == [3, 54, 115]
    with pytest.raises(CheckpointError, match="a position lies beyond the 100 places"):
        decode("coded", data, 100, 3)
