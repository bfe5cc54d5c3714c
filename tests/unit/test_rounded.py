"""Rounded values: half a step at 8 bits, the least squares below, and integers as bytes."""

import pytest
import torch

from byom.errors import CheckpointError
from byom.variants.base import rounded

BITS = [2, 3, 4, 5, 6, 8]


def heavy(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) ** 3


def back(values, bits, dim=None):
    codes, scale = rounded.rounded(values, bits, dim)
    return codes * scale


def test_eight_bits_are_off_by_half_a_step_at_most():
    values = heavy(40, 50)
    for dim, step in ((None, values.abs().max() / 127), (1, values.abs().amax(1, keepdim=True) / 127)):
        assert bool(((back(values, 8, dim) - values).abs() <= step * 0.5001).all())


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_no_other_scale_is_much_nearer(bits):
    values, limit = heavy(400), rounded.largest(bits)
    tried = [values.abs().max() / limit * share / 200 for share in range(1, 220)]
    errors = [(values - scale * (values / scale).round().clamp(-limit, limit)).norm() for scale in tried]
    assert (back(values, bits) - values).norm() <= 1.01 * min(errors)


@pytest.mark.parametrize("bits", BITS)
def test_rounding_keeps_signs_zeros_and_proportions(bits):
    values = torch.cat([heavy(99), torch.zeros(1)])
    found = back(values, bits)
    assert found[-1] == 0 and bool((found * values >= 0).all())
    assert torch.equal(back(-values, bits), -found)
    assert torch.equal(back(4 * values, bits), 4 * found)
    assert not bool(back(torch.zeros(5), bits).any()) and back(torch.zeros(0), bits).shape == (0,)


def test_rows_and_columns_have_scales_of_their_own():
    values = heavy(6, 5) * torch.tensor([1.0, 10, 100, 1e3, 1e4])
    codes, scale = rounded.rounded(values, 4, 0)
    assert scale.shape == (1, 5)
    for column in range(5):
        alone = rounded.rounded(values[:, column], 4)
        assert torch.equal(alone.codes, codes[:, column]) and torch.equal(alone.scale[0], scale[0, column])


def test_golden():
    codes, scale = rounded.rounded(torch.tensor([127.0, -63.6, 0.4, 0.6]), 8)
    assert (codes.tolist(), scale.tolist()) == ([127, -64, 0, 1], [1.0])
    codes, scale = rounded.rounded(torch.tensor([1.0, 1.0, 1.0, -9.0]), 2)
    assert (codes.tolist(), scale.tolist()) == ([0, 0, 0, -1], [9.0])  # the error is 3; all of scale 3 leave 48


def test_what_overflowed_is_refused():
    with pytest.raises(CheckpointError, match=r"beyond what its dtype holds.*byom\.values=native"):
        rounded.rounded(torch.tensor([1.0, torch.inf]), 4)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(), (0, 3), (1,), (7,), (300, 5), (2, 3, 4)])
def test_integers_round_trip(bits, shape):
    limit = rounded.largest(bits)
    codes = (heavy(*shape) * limit / 2).round().clamp(-limit, limit).to(torch.int8)
    data = rounded.pack(codes, bits)
    assert torch.equal(rounded.unpack(data, codes.numel()), codes)
    assert data.dtype == torch.uint8 and len(data) <= 2 + 2 * len(shape) + -(-codes.numel() * bits // 8)


def test_golden_bytes():
    packed = rounded.pack(torch.tensor([[0, 1, -1], [3, -3, 2]], dtype=torch.int8), 3)
    assert packed.tolist() == [3, 2, 2, 3, 163, 140, 2]  # 3 4 2 6 0 5, three bits each
    many = torch.tensor([0] * 60 + [1, -1, 2, -7], dtype=torch.int8)
    head, weights, words = [20, 1, 64], [12, 255, 0, 161, 161, 161, *[0] * 6, 161], [138, 60, 143, 4, 82, 208, 222, 196]
    assert rounded.pack(many, 4).tolist() == [*head, *weights, *words]


def test_a_normal_vector_takes_the_entropy_of_its_integers():
    codes = rounded.rounded(torch.randn(8, 4000, generator=torch.Generator().manual_seed(0)), 4, 1).codes
    share = torch.bincount(codes.flatten().long() + 7) / codes.numel()
    entropy = float(-(share * share.log2()).nansum()) * codes.numel() / 8
    assert entropy < len(rounded.pack(codes, 4)) < 1.003 * entropy + 30 < 0.9 * codes.numel() / 2


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ([], "end within their shape"),
        ([4, 2, 1], "end within their shape"),
        ([4, 1, 255], "end within their shape"),
        ([1, 1, 1, 0], "not 2 to 8 bits of 9 values"),
        ([4, 1, 10, 0, 0, 0, 0, 0], r"\(10,\) of 4 bits are not 2 to 8 bits of 9 values"),
        ([4, 2, 0, *[255] * 5, 1], "not 2 to 8 bits of 9 values"),
        ([4, 2, *[*[128] * 5, 2] * 2], "not 2 to 8 bits of 9 values"),
        ([4, 1, 4, 0], "4 integers of 4 bits are 2 bytes, not 1"),
        ([3, 1, 2, 255], "one is beyond the 3 of 3 bits"),
        ([20, 1, 4, 9, 1], "weights are cut short"),
    ],
)
def test_corrupt_integers_are_refused(data, said):
    with pytest.raises(CheckpointError, match=said):
        rounded.unpack(torch.tensor(data, dtype=torch.uint8), 9)


def test_integers_are_bytes():
    with pytest.raises(CheckpointError, match="not bytes"):
        rounded.unpack(torch.zeros(3), 9)
