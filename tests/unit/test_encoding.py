"""Positions survive the round trip, and corrupt bytes do not pass for positions."""

from math import log2

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from byom.errors import CheckpointError
from byom.variants.base import positions as encoding
from byom.variants.base.positions import decode, encode

GAPS = st.one_of(st.integers(0, 3), st.sampled_from([0, 253, 254, 255, 256, 509, 510, 511, 10**6]))


def round_trip(indices, numel):
    kind, data = encode(indices, numel)
    assert data.dtype == torch.uint8
    assert torch.equal(decode(kind, data, numel, len(indices)), indices)
    return kind, len(data)


@given(st.lists(GAPS, max_size=40), st.sampled_from([0, 1, 7, 8, 300, 10**6]))
@settings(max_examples=200, deadline=None)
def test_gaps_round_trip(gaps, spare):
    indices = torch.cumsum(torch.tensor(gaps, dtype=torch.int64) + 1, 0) - 1
    numel = (int(indices[-1]) + 1 if gaps else 0) + spare
    kind, size = round_trip(indices, numel)
    assert size <= min(-(-numel // 8), sum(gap // 255 + 1 for gap in gaps))
    assert (kind == "none") == (not gaps)


@given(st.lists(st.booleans(), max_size=80), st.sampled_from([8, 16, 1 << 23]))
@settings(max_examples=200, deadline=None)
def test_masks_round_trip(mask, chunk):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "CHUNK", chunk)
        round_trip(torch.tensor(mask, dtype=torch.bool).nonzero().flatten(), len(mask))


@pytest.mark.parametrize(
    ("gap", "expected"), [(0, [0]), (254, [254]), (255, [255, 0]), (256, [255, 1]), (510, [255, 255, 0])]
)
def test_gap_bytes(gap, expected):
    kind, data = encode(torch.tensor([gap]), 10_000)
    assert (kind, data.tolist()) == ("gap8", expected)


def test_escapes_are_counted_before_gaps_are_chosen():
    beside, apart = torch.arange(255), torch.tensor([2047])  # 256 gaps fill as many bytes as the bitmap, before escapes
    assert round_trip(torch.cat([beside, apart]), 2048) == ("bitmap", 256)
    assert round_trip(torch.cat([beside, apart - 1792]), 2048) == ("gap8", 256)


def test_extremes():
    assert round_trip(torch.tensor([10**6]), 10**6 + 1) == ("gap8", 10**6 // 255 + 1)
    assert round_trip(torch.tensor([2**33 - 1, 2**33]) - 2**33 + 10**6, 2**33)[0] == "gap8"
    assert round_trip(torch.arange(9), 9) == ("all", 0)
    assert round_trip(torch.arange(8), 9) == ("bitmap", 2)
    assert round_trip(torch.arange(0), 9) == ("none", 0)
    assert round_trip(torch.arange(0), 0) == ("none", 0)


@pytest.mark.parametrize(
    ("density", "kind", "tolerance"),
    [
        (0.01, "gap8", 1.08),
        (0.05, "gap8", 1.40),
        (0.1, "gap8", 1.71),
        (0.2, "bitmap", 1.39),
        (0.5, "bitmap", 1.001),
    ],
)
def test_bytes_per_kept_entry_against_the_information_bound(density, kind, tolerance):
    """Uniform masks: 1.08, 1.00, 1.00, 0.63 and 0.25 bytes an entry; the entropy is H(m) / 8m bytes."""
    n = 2_000_000
    mask = torch.rand(n, generator=torch.Generator().manual_seed(1)) < density
    indices = mask.nonzero().flatten()
    chosen, size = round_trip(indices, n)
    m = len(indices) / n
    bound = -(m * log2(m) + (1 - m) * log2(1 - m)) / m / 8
    assert chosen == kind
    assert bound <= size / len(indices) * 1.001 <= bound * tolerance * 1.002


@pytest.mark.parametrize(
    ("indices", "numel"), [([1, 1], 5), ([2, 1], 5), ([-1], 5), ([5], 5), ([0], 0), ([0, 1, 2], 2)]
)
def test_encode_refuses_what_are_not_positions(indices, numel):
    with pytest.raises(ValueError, match="strictly ascending"):
        encode(torch.tensor(indices), numel)


@pytest.mark.parametrize(
    ("kind", "data", "numel", "count", "message"),
    [
        ("gap8", [3, 255], 600, 1, "cut short"),
        ("gap8", [3, 3], 600, 3, "holds 2 positions"),
        ("gap8", [3, 3], 7, 2, "reaches 7 of 7"),
        ("gap8", [], 7, 1, "holds 0"),
        ("bitmap", [1], 9, 1, "2 bytes, not 1"),
        ("bitmap", [1, 2], 9, 2, "beyond the 9"),
        ("bitmap", [1, 1], 9, 3, "holds 2"),
        ("bitmap", [], 0, 1, "holds 0"),
        ("all", [], 5, 4, "holds 5"),
        ("all", [1], 5, 5, "none belong"),
        ("none", [], 5, 1, "holds 0"),
        ("none", [0], 5, 0, "none belong"),
        ("gap9", [0], 5, 1, "did you mean 'gap8'"),
    ],
)
def test_decode_refuses_malformed_bytes(kind, data, numel, count, message):
    with pytest.raises(CheckpointError, match=message):
        decode(kind, torch.tensor(data, dtype=torch.uint8), numel, count)


def test_decode_refuses_other_dtypes():
    with pytest.raises(CheckpointError, match="uint8"):
        decode("gap8", torch.tensor([1]), 5, 1)


@given(st.binary(max_size=30), st.sampled_from(["gap8", "bitmap"]), st.integers(0, 300), st.integers(0, 40))
@settings(max_examples=200, deadline=None)
def test_any_bytes_decode_to_positions_or_an_error(data, kind, numel, count):
    try:
        places = decode(kind, torch.tensor(list(data), dtype=torch.uint8), numel, count)
    except CheckpointError:
        return
    assert len(places) == count
    assert count == 0 or ((places.diff() > 0).all() and places[0] >= 0 and places[-1] < numel)
