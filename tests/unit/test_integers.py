"""Small unsigned integers as bytes."""

import pytest
import torch

from byom.errors import CheckpointError
from byom.variants.base import integers


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("numel", [0, 1, 7, 8, 1000])
def test_integers_come_back(bits, numel):
    codes = torch.randint(0, 1 << bits, (numel,), generator=torch.Generator().manual_seed(bits))
    data = integers.pack(codes, bits)
    assert data.dtype == torch.uint8
    assert len(data) == -(-numel * bits // 8)
    assert torch.equal(integers.unpack(data, bits, numel), codes.to(torch.uint8))


def test_chunks_end_at_whole_bytes(monkeypatch):
    codes = torch.arange(100) % 8
    whole = integers.pack(codes, 3)
    monkeypatch.setattr(integers, "CHUNK", 16)
    assert torch.equal(integers.pack(codes, 3), whole)
    assert torch.equal(integers.unpack(whole, 3, 100), codes.to(torch.uint8))


def test_lowest_bit_first():
    assert integers.pack(torch.tensor([1, 2, 3, 0, 7]), 3).tolist() == [1 | 2 << 3 | (3 & 3) << 6, 0 | 7 << 4]


def test_integers_that_need_more_bits_are_refused():
    with pytest.raises(ValueError, match=r"\[0, 4\)"):
        integers.pack(torch.tensor([4]), 2)
    with pytest.raises(ValueError, match="9 bits"):
        integers.pack(torch.tensor([4]), 9)


def test_a_wrong_number_of_bytes_is_refused():
    with pytest.raises(CheckpointError, match="5 integers of 3 bits are 2 bytes, not 3"):
        integers.unpack(torch.zeros(3, dtype=torch.uint8), 3, 5)
