"""Positions beyond 2^31, parameters in pieces, and what is told of how far reading is."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from byom.functional.rows import RowCut
from byom.functional.selection import Cut
from byom.functional.stream import Part, Stream
from byom.merge.average import Average
from byom.merge.base import Problem
from byom.merge.base import group as pieces
from byom.merge.breadcrumbs import ModelBreadcrumbs
from byom.merge.dare import Dare
from byom.merge.model_stock import ModelStock
from byom.merge.task_arithmetic import TaskArithmetic
from byom.merge.ties import Ties
from byom.variants.base import positions
from byom.variants.fft import ByomFft
from byom.weights import Weights
from byom.weights.cuts import cuts
from byom.weights.watched import watched
from tests.problems import models, problem, same

FAR = 1 << 31


def drawn(seed, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    shapes = {"matrix": (40, 30), "row": (170,), "scalar": (), "stack": (3, 5, 20)}
    return Weights.of({name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()})


def given(tasks=3):
    return Problem(drawn(0), {f"task{t}": drawn(t) for t in range(1, tasks + 1)})


def test_positions_beyond_31_bits_come_back():
    places = torch.tensor([FAR - 1, FAR, FAR + 5, FAR + 900])
    kind, data = positions.encode(places, FAR + 1000)
    assert kind == "gap8" and torch.equal(positions.decode(kind, data, FAR + 1000, 4), places)


def test_a_cut_beyond_31_bits_keeps_the_first_of_equal_values():
    values = torch.tensor([1.0, -2.0, 1.0, -1.0, 1.0])
    assert Cut(1.0, FAR + 2, FAR).mask(values, FAR).tolist() == [True, True, True, False, False]
    assert not Cut(1.0, 2, 3).mask(values.clamp(-1, 1), FAR).any()
    far = RowCut(torch.ones(1).expand(FAR), torch.zeros(1, dtype=torch.int64).expand(FAR), 5)  # stride 0
    assert far.mask(values, 5 * (FAR - 1)).tolist() == [True, True, False, False, False]


def test_a_stream_beyond_31_bits_is_read_where_it_is_asked():
    """Two parts, of which the second begins in the middle of a block; values are their own places, in fp64."""

    def places(first):
        def read(at):
            return torch.arange(at.start, at.stop).double() + first if isinstance(at, slice) else at.double() + first

        return read

    start = FAR + 77
    stream = Stream.of([Part(start, places(0)), Part(FAR, places(start))])
    index = start // len(stream.buffer)
    expected = np.arange(index * len(stream.buffer), (index + 1) * len(stream.buffer))
    assert np.array_equal(stream.block(index), expected)
    asked = np.array([1, FAR, start - 1, start, start + FAR - 1])
    assert np.array_equal(stream.at(asked), asked)


@pytest.mark.parametrize(
    "method",
    [TaskArithmetic(), Dare(), Dare(then=Average(), drop=0.9, seed=3), ModelBreadcrumbs(), Ties(), ModelStock()],
)
def test_pieces_of_a_parameter_make_the_whole_to_the_bit(method, monkeypatch):
    whole = method(given(5)).materialise()
    monkeypatch.setattr(pieces, "BLOCK", 64)
    assert same(method(given(5)), whole)


def test_experts_thinned_in_pieces_are_those_thinned_whole(monkeypatch):
    class Wholly(TaskArithmetic):
        def __call__(self, problem):
            return super().__call__(problem)

    monkeypatch.setattr(pieces, "BLOCK", 64)
    assert same(Dare()(given()), Dare(then=Wholly())(given()))


def test_experts_cut_together_are_those_cut_alone():
    posed = given()
    together = Ties(scope="tensor").plan(posed).cuts, Ties().plan(posed).cuts
    for scope, found in zip(("tensor", "global"), together, strict=True):
        assert found == [cuts(drawn(t), posed.pretrained, 0.2, scope) for t in (1, 2, 3)]


def nbytes(posed):
    every = (posed.pretrained, *posed.finetuned.values())
    return sum(each[name].nbytes for each in every for name in each.mergeable())


@pytest.mark.parametrize(
    "method", [Ties(), Ties(scope="tensor"), Ties(scope="row"), TaskArithmetic(), Dare(), ModelStock()]
)
def test_a_watched_problem_tells_every_byte_that_is_read(method, monkeypatch):
    monkeypatch.setattr("byom.functional.stream.BLOCK", 64)
    whole = [torch.randn(40, 50, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    base, *experts = (Weights.of({f"{row:02}": value for row, value in enumerate(each)}) for each in whole)
    plain, told = Problem(base, dict(zip("abc", experts, strict=True))), []
    passes = method.passes if isinstance(method, Ties) else 0
    merged = method(plain.watched(told.append))
    planned = sum(told)
    merged.materialise()
    assert sum(told) - planned == nbytes(plain)
    assert planned == passes * nbytes(plain)
    assert same(merged, method(plain))


def test_watched_weights_are_the_same_weights():
    state, told = models()[0], []
    weights = Weights.of(state)
    seen = watched(weights, told.append)
    assert same(seen, weights) and seen.ties == weights.ties and seen.fingerprint() == weights.fingerprint()
    told.clear()
    read = [seen["layer.weight"], seen["head"]]
    assert len(read) == 2 and told == [state["layer.weight"].nbytes, state["head"].nbytes]


def test_packing_a_watched_problem_tells_what_it_reads():
    base, finetuned = models()
    posed, told = problem(base, finetuned), []
    merged = Ties()(posed).materialise()
    seen = replace(posed, statistics={}, members={}).watched(told.append)
    packed = ByomFft().serve(seen, merged)
    assert told and all(same(packed.weights(t), ByomFft().serve(posed, merged).weights(t)) for t in posed.tasks)
