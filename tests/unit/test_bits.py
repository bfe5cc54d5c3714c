"""Masks and signs as bits: every round trip is exact, and bytes of another size are refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from byom.errors import CheckpointError
from byom.variants.base import bits


@given(st.lists(st.booleans(), max_size=70))
def test_a_mask_comes_back(mask):
    packed = bits.pack(torch.tensor(mask, dtype=torch.bool))
    assert packed.dtype == torch.uint8 and len(packed) == -(-len(mask) // 8)
    assert bits.unpack(packed, len(mask)).tolist() == mask


def test_the_lowest_bit_comes_first():
    assert bits.pack(torch.tensor([[True, False, False], [True, False, False]])).tolist() == [9]


@given(st.lists(st.sampled_from([-1, 0, 1]), max_size=70))
def test_signs_come_back(signs):
    parts = bits.pack_signs(torch.tensor(signs))
    assert bits.unpack_signs(parts, len(signs)).tolist() == signs


@given(st.lists(st.sampled_from([-1, 0, 1]), max_size=70))
def test_both_forms_hold_the_same(signs):
    filled = torch.tensor(signs, dtype=torch.int8) != 0
    assert bits._from_groups(bits._to_groups(filled), len(signs)).tolist() == filled.tolist()


@pytest.mark.parametrize(("density", "form"), [(0.05, "group4"), (0.25, "group4"), (0.35, "bitmap"), (1.0, "bitmap")])
def test_the_smaller_form_is_taken(density, form):
    drawn = torch.rand(10_000, generator=torch.Generator().manual_seed(0)) < density
    parts = bits.pack_signs(drawn.int())
    assert set(parts) == {form, "signs"}
    assert len(parts[form]) <= 1250 and len(parts["signs"]) == -(-int(drawn.sum()) // 8)


@pytest.mark.parametrize("numel", [0, 8, 17])
def test_bytes_of_another_size_are_refused(numel):
    with pytest.raises(CheckpointError, match=rf"a mask of {numel} places is {-(-numel // 8)} bytes, not 2"):
        bits.unpack(torch.zeros(2, dtype=torch.uint8), numel)


def test_another_dtype_is_refused():
    with pytest.raises(CheckpointError, match=r"not 1 of torch\.int64"):
        bits.unpack(torch.zeros(1, dtype=torch.int64), 8)
