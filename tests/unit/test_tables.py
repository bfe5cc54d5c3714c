"""The range coder for small integers: bytes that every machine writes, their number, and corrupt streams."""

import hashlib

import numpy as np
import pytest

from byom.functional import tables

EXTREMES = np.array([0, 127, -127, 1, -1, 0, 0, 126, -126, 2])
ROWS = [np.array(row, dtype=np.int64) for row in ([0, 1, -1, 2, 0, 0, -3], [127, -127, 5], [], [0] * 20 + [-1])]
CHOSEN = [12, 34, 0, 60]


def drawn(count=300, width=5.0, seed=0, zero=0.0):
    """Return rounded normal numbers, a share of which is set to 0."""
    generator = np.random.default_rng(seed)
    values = np.clip(np.rint(width * generator.normal(size=count)), -127, 127)
    return np.where(generator.random(count) < zero, 0, values).astype(np.int64)


def best(*rows):
    chosen, bits = tables.best(np.concatenate([tables.histograms(row[None]) for row in rows]))
    return chosen.tolist(), float(bits.sum())


def entropy(values):
    shares = np.unique(values, return_counts=True)[1] / len(values)
    return float(-(shares * np.log2(shares)).sum() * len(values))


def equal(rows, others):
    return all(np.array_equal(one, other) for one, other in zip(rows, others, strict=True))


def test_tables_are_those_of_every_other_machine():
    weights = tables.weights()
    assert weights.shape == (227, 255) and np.array_equal(weights, weights[:, ::-1])
    checksum = hashlib.sha256(weights.astype("<u4").tobytes()).hexdigest()
    assert checksum.startswith("2365426bb24544f9")


def test_tables_are_the_distributions_that_they_are_made_from():
    weights, values = tables.weights() / tables.weights().sum(1, keepdims=True), np.arange(-127, 128)
    normal = np.exp(-((values / 2.0) ** 2) / 2)
    assert np.abs(weights[14] - normal / normal.sum()).max() < 6e-5  # the width of table s is 2^((s - 10) / 4)
    spiked = np.where(values == 0, 1 - 2**-1.5, 2**-1.5 * 0.3 * 0.4 ** (np.abs(values) - 1.0))
    assert np.abs(weights[35 + 2 * 6 + 3] - spiked).max() < 6e-5


def test_bytes_are_those_of_every_other_machine():
    assert tables.encode(ROWS, CHOSEN).hex() == "da928f8f782e0b54"
    assert equal(tables.decode(bytes.fromhex("da928f8f782e0b54"), [7, 3, 0, 21], CHOSEN), ROWS)


def test_lengths_are_those_of_a_code():
    lengths = tables.lengths()
    assert np.allclose((2.0**-lengths).sum(1), 1, rtol=1e-9) and lengths.min() > 0
    assert lengths.max() < 22.001  # an integer that a table hardly knows costs no more


def test_every_table_writes_every_integer():
    rows = [EXTREMES, drawn(40, 2.0)] * len(tables.weights())
    chosen = [table for table in range(len(tables.weights())) for _ in range(2)]
    data = tables.encode(rows, chosen)
    assert equal(tables.decode(data, [len(row) for row in rows], chosen), rows)
    counts = np.concatenate([tables.histograms(row[None]) for row in rows])
    bits = (counts * tables.lengths()[chosen]).sum()
    assert 0.99 * bits <= 8 * len(data) <= 1.0001 * bits + 64  # unlikely integers take a little less than they should


def test_all_integers_come_back():
    every = np.arange(-127, 128)
    for table in (0, 34, 35, 226):
        assert equal(tables.decode(tables.encode([every], [table]), [255], [table]), [every])


def test_empty_rows_take_nothing():
    none = np.empty(0, dtype=np.int64)
    assert tables.encode([], []) == tables.encode([none, none], [3, 200]) == b""
    assert tables.decode(b"", [], []) == [] and equal(tables.decode(b"", [0, 0], [3, 200]), [none, none])
    assert tables.encode([none, ROWS[0], none], [1, 12, 1]) == tables.encode([ROWS[0]], [12])
    assert tables.best(np.zeros((2, 255), dtype=np.int64))[1].tolist() == [0, 0]


@pytest.mark.parametrize("width", [0.3, 0.6, 1.0, 2.0, 5.0, 17.0, 40.0])
@pytest.mark.parametrize("zero", [0.0, 0.7, 0.99])
def test_integers_take_their_entropy(width, zero):
    values = drawn(20000, width, zero=zero)
    table, bits = best(values)
    stream = 8 * len(tables.encode([values], table))
    assert entropy(values) - 64 <= stream <= 1.0001 * bits + 64
    if not zero:
        assert stream <= 1.02 * entropy(values) + 64


@pytest.mark.parametrize("share", [0.3, 0.05, 0.01, 0.001])
@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.7])
def test_sparse_integers_take_their_entropy(share, ratio):
    generator = np.random.default_rng(0)
    values = generator.geometric(1 - ratio, 50000).clip(max=127) * generator.choice([-1, 1], 50000)
    values[generator.random(50000) >= share] = 0
    assert 8 * len(tables.encode([values], best(values)[0])) <= 1.02 * entropy(values) + 64


def test_the_best_table_is_the_one_with_the_shortest_stream():
    rows = [drawn(400, 3.0), drawn(400, 8.0, zero=0.9), EXTREMES]
    chosen, bits = best(*rows)
    for row, table in zip(rows, chosen, strict=True):
        sizes = [len(tables.encode([row], [other])) for other in range(227)]
        assert sizes[table] <= min(sizes) + 4
    assert bits == pytest.approx(sum(tables.lengths()[t][r + 127].sum() for r, t in zip(rows, chosen, strict=True)))


def test_histograms_count_row_by_row():
    counts = tables.histograms(np.array([[0, 0, 1], [-127, 127, 127]]))
    assert counts.shape == (2, 255) and counts.sum() == 6
    assert (counts[0, 127], counts[0, 128], counts[1, 0], counts[1, 254]) == (2, 1, 1, 2)


@pytest.mark.parametrize("cut", [1, 2, 3, 4, 8, 40, 160])
def test_a_stream_that_is_cut_short_is_refused(cut):
    row = drawn()
    table, _ = best(row)
    with pytest.raises(ValueError, match="stream"):
        tables.decode(tables.encode([row], table)[:-cut], [300], table)


@pytest.mark.parametrize("more", [b"\0", b"\0" * 8, b"\xff" * 8, b"\7" * 400])
def test_a_stream_that_goes_on_is_refused(more):
    row = drawn()
    table, _ = best(row)
    with pytest.raises(ValueError, match="stream"):
        tables.decode(tables.encode([row], table) + more, [300], table)


@pytest.mark.parametrize(
    ("sizes", "chosen"), [([300], [227]), ([300], [255]), ([300], []), ([300, 0], [14]), ([280], [14]), ([330], [14])]
)
def test_another_number_of_rows_or_tables_is_refused(sizes, chosen):
    data = tables.encode([drawn()], [14])
    with pytest.raises(ValueError, match="stream"):
        tables.decode(data, sizes, chosen)


def test_corrupt_streams_are_refused_or_give_rows_of_the_right_lengths():
    generator, rows = np.random.default_rng(0), [drawn(120), drawn(200, 1.0, zero=0.8)]
    chosen, _ = best(*rows)
    data, refused = tables.encode(rows, chosen), 0
    for trial in range(600):
        changed, other = bytearray(data), list(chosen)
        if trial % 3:
            changed[generator.integers(len(data))] ^= 1 << generator.integers(8)
        else:
            other[trial % 2] = int(generator.integers(256))
        try:
            found = tables.decode(bytes(changed), [120, 200], other)
        except ValueError:
            refused += 1
            continue
        assert [len(row) for row in found] == [120, 200] and max(np.abs(row).max() for row in found) <= 127
    assert refused > 500
