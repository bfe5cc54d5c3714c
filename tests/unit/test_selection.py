"""`locate` against a stable descending sort, bit for bit."""

import tracemalloc
from contextlib import contextmanager
from math import inf

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from byom.errors import CheckpointError, OptionError
from byom.functional import rows, selection, stream
from byom.functional.rows import row_cuts
from byom.functional.selection import Cut, Part, kept, locate, top_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def order_of(values):
    """The obvious oracle: sort everything, stably, largest magnitude first."""
    sizes = values.to(torch.float64 if values.dtype == torch.float64 else torch.float32).abs()
    return sizes, torch.argsort(sizes, descending=True, stable=True)


def expected(sizes, order, count):
    mask = torch.zeros(sizes.shape, dtype=torch.bool)
    mask[order[:count]] = True
    if count in (0, len(sizes)):
        return (Cut(0.0, count - 1, count) if count else Cut(inf, -1, 0)), mask
    last = int(order[count - 1])
    return Cut(sizes[last].item(), last, count), mask


def split(values, sizes):
    return [Part.of(piece) for piece in torch.split(values, sizes)]


def check(values, counts, splits):
    parts = split(values, splits)
    sizes, order = order_of(values)
    for count, found in zip(counts, locate(parts, counts), strict=True):
        cut, mask = expected(sizes, order, count)
        assert found == cut
        assert torch.equal(cut.mask(values), mask)


@st.composite
def streams(draw):
    """Values rich in ties, zeros and negative zeros, a split of them, and counts."""
    dtype = draw(st.sampled_from(DTYPES))
    few = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 2.0, -2.0, 6.0e-8, 65504.0])
    any_ = st.floats(-60000, 60000, width=16)
    number = draw(st.sampled_from([few, any_, st.one_of(few, any_)]))
    numbers = draw(st.lists(number, min_size=1, max_size=60))
    values = torch.tensor(numbers, dtype=dtype)
    n = len(values)
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=5)))
    sizes = [b - a for a, b in zip([0, *cuts], [*cuts, n], strict=True)]
    return values, sizes, draw(st.lists(st.integers(0, n), max_size=12))


TINY = {"BLOCK": 4, "SAMPLE": 5, "MARGIN": 0.0, "TOGETHER": 3}


@contextmanager
def scaled(tiny):
    """The constants as shipped, or so small that brackets miss, move and span many blocks."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in TINY.items() if tiny else ():
            patch.setattr(stream if name == "BLOCK" else selection, name, value)
        yield


@given(streams(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_equals_a_stable_sort(case, tiny):
    values, sizes, counts = case
    with scaled(tiny):
        check(values, counts, sizes)


@given(streams(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_does_not_depend_on_the_parts(case, tiny):
    values, sizes, counts = case
    with scaled(tiny):
        assert locate(split(values, sizes), counts) == locate([Part.of(values)], counts)


@given(streams(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_masks_of_pieces_make_the_mask_of_the_whole(case, tiny):
    values, sizes, counts = case
    starts = np.cumsum([0, *sizes])
    with scaled(tiny):
        cuts = locate([Part.of(values)], counts)
    for cut in cuts:
        pieces = torch.split(values, sizes)
        masks = [cut.mask(piece, int(start)) for piece, start in zip(pieces, starts, strict=False)]
        assert torch.equal(torch.cat(masks), cut.mask(values))
        assert int(cut.mask(values).sum()) == cut.count


def large(kind):
    generator = torch.Generator().manual_seed(3)
    normal = torch.randn(400_003, generator=generator)
    return {
        "normal": normal,
        "bf16": normal.bfloat16(),
        "fp16": normal.half() * 1e-3,
        "fp64": normal.double() * (1 + 1e-9),
        "zeros": torch.zeros_like(normal),
        "equal": torch.full_like(normal, -0.3),
        "signs": normal.sign().bfloat16(),
        "three": (normal * 1.2).round().clamp(-1, 2),
        "half zero": normal * (normal > 0),
        "sorted": normal.sort().values,
        "heavy": normal / torch.rand(normal.shape, generator=generator).clamp(min=1e-12) ** 3,
        "one large": torch.nn.functional.one_hot(torch.tensor(377_777), 400_003).float(),
    }[kind]


KINDS = ["normal", "bf16", "fp16", "fp64", "heavy", "sorted"]
KINDS += ["zeros", "equal", "signs", "three", "half zero", "one large"]


@pytest.mark.parametrize("kind", KINDS)
def test_more_elements_than_the_sample(kind):
    values = large(kind)
    n = len(values)
    check(values, [1, 2, kept(0.01, n), kept(0.1, n), n // 2, n - 2, n - 1], [5, 300_000, 0, 1, n - 300_006])


@pytest.mark.parametrize("kind", ["normal", "zeros", "signs"])
def test_memory_is_a_few_mb_and_few_candidates(kind):
    parts = [Part.of(large(kind).repeat(20))]
    n = parts[0].numel
    tracemalloc.start()
    locate(parts, [kept(density, n) for density in (0.01, 0.05, 0.1, 0.2)])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 12e6 + 0.03 * 4 * n


@pytest.mark.slow
def test_above_two_to_the_24():
    values = torch.randn((1 << 24) + 12_345, generator=torch.Generator().manual_seed(5)).bfloat16()  # with many ties
    check(values, [(1 << 24) + 11], [1 << 23, (1 << 23) + 12_345])


def test_positions_beyond_int32():
    """Constant parts are computed, so 2^31 elements cost no memory; three places stand out."""
    far = {0: 3.0, (1 << 31) - 1: 2.0, (1 << 31) + 7: -2.0}
    n = (1 << 31) + 100_000

    def read(where):
        if isinstance(where, torch.Tensor):
            return torch.zeros(len(where))
        values = torch.zeros(where.stop - where.start)
        for place, value in far.items():
            if where.start <= place < where.stop:
                values[place - where.start] = value
        return values

    endless = stream.Stream.of([Part(n, read)])
    ties = np.zeros(endless.blocks, dtype=np.int64)
    ties[[((1 << 31) - 1) // stream.BLOCK, ((1 << 31) + 7) // stream.BLOCK]] = 1
    cut = selection._Bracket(3, np.zeros(1), 0, 0.0, inf)._cut(endless, 2.0, ties, 2)
    assert cut == Cut(2.0, (1 << 31) + 7, 3)
    assert selection._positions(n).max() > 1 << 31
    assert cut.mask(read(slice(1 << 31, n)), 1 << 31).nonzero().tolist() == [[7]]


@given(streams(), st.sampled_from([0.0, 0.1, 0.29, 0.5, 0.9, 1.0]), st.integers(1, 7))
@settings(max_examples=150, deadline=None)
def test_the_largest_of_every_vector_are_those_of_a_stable_sort(case, density, width):
    values = case[0][: len(case[0]) // width * width].reshape(-1, width)
    masks = [expected(*order_of(row), kept(density, width))[1] for row in values]
    mask = torch.stack(masks) if masks else torch.empty(0, width, dtype=torch.bool)
    assert torch.equal(top_mask(values, density, -1), mask)
    assert torch.equal(top_mask(values.T, density, 0), mask.T)
    for row, survivors in zip(values, mask, strict=True):
        assert torch.equal(top_mask(row, density), survivors)


@given(streams(), st.lists(st.sampled_from([0.0, 0.1, 0.29, 0.5, 0.9, 1.0]), max_size=3), st.integers(1, 7))
@settings(max_examples=100, deadline=None)
def test_cuts_of_rows_give_the_mask_piece_by_piece(case, densities, width):
    values = case[0][: len(case[0]) // width * width].reshape(-1, width)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows, "PIECE", 5)
        cuts = row_cuts(Part.of(values), width, [kept(density, width) for density in densities])
        for density, cut in zip(densities, cuts, strict=True):
            pieces = torch.split(values.reshape(-1), 3)
            masks = [cut.mask(piece, 3 * i) for i, piece in enumerate(pieces)]
            assert torch.equal(torch.cat(masks), top_mask(values, density, -1).reshape(-1))
            assert cut.mask(values).shape == values.shape


def test_the_largest_of_a_tensor_of_no_axis_is_that_entry_or_none():
    assert top_mask(torch.tensor(2.0), 1.0, -1) and not top_mask(torch.tensor(2.0), 0.5, -1)
    with pytest.raises(OptionError, match="density=10 is not a fraction"):
        top_mask(torch.ones(3), 10, -1)


def test_degenerate_shapes():
    assert locate([], [0]) == [Cut(inf, -1, 0)]
    assert locate([Part.of(torch.empty(0, 3))], [0, 0]) == [Cut(inf, -1, 0)] * 2
    assert locate([Part.of(torch.tensor(-2.0))], [1, 0]) == [Cut(0.0, 0, 1), Cut(inf, -1, 0)]
    assert locate([Part.of(torch.ones(3))], []) == []
    matrix = torch.tensor([[1.0, -3.0], [2.0, 0.0]]).T
    [cut] = locate([Part.of(matrix)], [2])
    assert cut.mask(matrix).tolist() == [[False, True], [True, False]]
    assert cut.mask(torch.tensor(2.0), 1).shape == ()


def test_a_stream_of_two_precisions_compares_in_the_wider():
    wide, narrow = torch.tensor([1 + 1e-9], dtype=torch.float64), torch.tensor([1.0, 2.0])
    [cut] = locate([Part.of(wide), Part.of(narrow)], [2])
    assert cut == Cut(1 + 1e-9, 0, 2)
    assert cut.mask(narrow, 1).tolist() == [False, True]


def test_a_threshold_between_two_narrow_values_is_not_rounded_to_either():
    narrow = torch.tensor([1.0, 2.0, 1.0])
    for wide, mask in ((1 + 1e-9, [False, True, False]), (1 - 1e-9, [True, True, True])):
        for offset in (0, 1):  # before the tie that survives, and after it
            cut = Cut(wide, last=3 * (1 - offset), count=2)
            assert cut.mask(narrow, offset).tolist() == mask


def test_gradients_are_not_followed():
    values = torch.randn(9, requires_grad=True)
    [cut] = locate([Part(9, values.__getitem__)], [4])
    assert int(cut.mask(values).sum()) == 4


@pytest.mark.parametrize("bad", [float("nan"), inf, -inf])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [[], [0], [400_000], [17]])
def test_values_that_are_not_finite_are_refused(bad, dtype, counts):
    values = torch.ones(400_000, dtype=dtype)
    values[[300_001, 300_005, 399_999]] = bad
    with pytest.raises(CheckpointError, match=r"3 of 400000 values .* flat position 300001"):
        locate([Part.of(values[:100]), Part.of(values[100:])], counts)


def test_bad_requests_are_refused():
    with pytest.raises(CheckpointError, match="int64"):
        locate([Part.of(torch.arange(3))], [1])
    for count in (-1, 4):
        with pytest.raises(OptionError, match="kept"):
            locate([Part.of(torch.ones(3))], [count])
    for density in (-0.1, 1.1, 20, float("nan")):
        with pytest.raises(OptionError, match="density"):
            kept(density, 10)


def test_kept():
    assert [kept(0.29, 100), kept(0, 7), kept(1, 7), kept(0.5, 0), kept(1 - 1e-12, 1)] == [29, 0, 7, 0, 1]


def test_global_is_not_per_tensor():
    big, small = torch.tensor([10.0, 9, 8, 7]), torch.tensor([0.4, 0.3, 0.2, 0.1])
    [cut] = locate([Part.of(big), Part.of(small)], [kept(0.5, 8)])
    assert cut.mask(big).all() and not cut.mask(small, 4).any()
