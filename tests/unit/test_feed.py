"""Batches read ahead: their order, their errors, and a thread that ends with its reader."""

from __future__ import annotations

import threading

import pytest
import torch

from byom.data.feed import feed, prepared
from byom.errors import DataError


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "byom-feed"]


def test_what_is_read_ahead_comes_in_its_order_and_the_thread_ends():
    assert list(prepared(range(50), lambda i: 2 * i)) == [2 * i for i in range(50)]
    assert not threads()


def test_no_more_is_read_than_was_asked_for():
    read, asked = [], threading.Event()

    def items():
        for number in range(100):
            read.append(number)
            if number == 3:  # the first is out, two wait, and one is about to
                asked.set()
            yield number

    reading = prepared(items(), lambda item: item, ahead=2)
    assert next(reading) == 0
    assert asked.wait(5)
    reading.close()
    assert read == [0, 1, 2, 3]
    assert not threads()


@pytest.mark.parametrize("where", ["items", "prepare"])
def test_an_error_in_the_thread_reaches_the_reader_after_what_came_before_it(where):
    def items():
        yield 1
        if where == "items":
            raise DataError("row 7 is damaged")
        yield 2

    def prepare(item):
        if item == 2:
            raise DataError("row 7 is damaged")
        return item

    seen = []
    with pytest.raises(DataError, match="row 7 is damaged"):
        seen.extend(prepared(items(), prepare))
        pytest.fail("it was swallowed")
    reading = prepared(items(), prepare)
    assert next(reading) == 1
    with pytest.raises(DataError) as raised:
        next(reading)
    assert raised.traceback[-1].name in ("items", "prepare")  # and says where it happened
    assert not threads()


def test_on_a_cpu_batches_are_the_same_tensors_and_there_is_no_thread():
    pixels, labels, index = torch.ones(2, 3), torch.tensor([0, 1]), torch.tensor([4, 5])
    feeding = feed([({"pixels": pixels}, labels, index, "more")], torch.device("cpu"))
    inputs, given, *rest = next(feeding)
    assert inputs["pixels"] is pixels and given is labels and rest[0] is index and rest[1] == "more"
    assert not threads()
