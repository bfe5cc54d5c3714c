"""Merging several tensors at once: what is merged ahead, by whom, and what becomes of errors."""

import os
import signal
import threading
from collections import Counter

import pytest
import torch

from byom.errors import CheckpointError
from byom.merge.base import Problem, together
from byom.merge.iso_c import IsotropicMergingCommon
from byom.weights import Weights
from tests.problems import same

NAMES = [f"layer{number}" for number in range(9)]


def states(tasks=2, rows=4):
    generator = torch.Generator().manual_seed(0)
    return [{name: torch.randn(rows, 3, generator=generator) for name in NAMES} for _ in range(tasks + 1)]


def posed(base, *experts):
    return Problem(Weights.of(base), {f"task{number}": Weights.of(state) for number, state in enumerate(experts)})


@pytest.fixture
def merge(threads):
    """Return a merge of two threads, and how often each tensor was merged in which thread."""
    threads(2)
    problem, merged = posed(*states()), Counter()

    def work(name):
        merged[name, threading.current_thread().name.partition("_")[0]] += 1
        if name == "layer7":
            raise CheckpointError(name)
        return torch.full((), float(name[5:]), requires_grad=True) * 2

    return together.Together(problem, work), merged


def settle():
    """Wait until the threads have done what was given to them."""
    pool, begun = together._pool(2, 2), threading.Barrier(3)
    for _ in range(2):
        pool.submit(begun.wait)
    begun.wait()


def test_in_order_each_is_merged_once_ahead_of_its_request(merge):
    read, merged = merge
    assert [read(name).item() for name in NAMES[:2]] == [0.0, 2.0]
    settle()
    assert merged == dict.fromkeys([(name, "byom merges") for name in NAMES[:6]], 1)
    assert [read(name).item() for name in NAMES[2:7]] == [4.0, 6.0, 8.0, 10.0, 12.0]
    with pytest.raises(CheckpointError, match="layer7"):
        read("layer7")
    assert read("layer8").item() == 16.0
    assert set(merged.values()) == {1}


def test_out_of_order_nothing_is_merged_ahead(merge):
    read, merged = merge
    for name in reversed(NAMES[:7]):
        read(name)
    settle()
    assert merged == dict.fromkeys([(name, "byom merges") for name in NAMES[:7]], 1)


def test_what_was_merged_for_nothing_is_let_go(merge):
    read, merged = merge
    for name in ("layer0", "layer1", "layer5", "layer2"):
        read(name)
        settle()  # or what was asked for ahead is let go before it begins
    assert merged["layer5", "byom merges"] == 2 and not read._held


def test_large_tensors_are_left_to_the_thread_that_asks(merge, monkeypatch):
    monkeypatch.setattr(together, "LARGE", 23)  # of two tasks' twelve entries
    read, merged = merge
    for name in NAMES[:3]:
        read(name)
    assert merged == dict.fromkeys([(name, "MainThread") for name in NAMES[:3]], 1)


def test_gradients_are_taken_where_they_are_asked_for(merge):
    read, _ = merge
    assert read("layer0").requires_grad
    with torch.no_grad():
        assert not read("layer5").requires_grad


def test_a_pool_has_its_share_of_the_threads_and_leaves_others_theirs(threads):
    threads(4)
    pool = together._pool.__wrapped__(2, 4)
    assert [pool.submit(torch.get_num_threads).result() for _ in range(4)] == [2] * 4
    found = []
    later = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert found == [4] == [torch.get_num_threads()]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_has_threads_of_its_own(threads):
    threads(2)
    problem = posed(*states())
    assert together.Together(problem, lambda name: torch.ones(()))("layer0")
    child = os.fork()
    if not child:
        signal.alarm(20)
        os._exit(0 if together.Together(problem, lambda name: torch.ones(()))("layer0") else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_merged_model_among_the_experts_is_merged_by_the_thread_that_needs_it(threads):
    base, one, two = states()
    alone = IsotropicMergingCommon()(posed(base, one, two))
    expected = IsotropicMergingCommon()(posed(base, one, alone.state())).state()
    threads(2)
    within = IsotropicMergingCommon()(posed(base, one, two))
    outer = Problem(Weights.of(base), {"task0": Weights.of(one), "task1": within})
    assert same(IsotropicMergingCommon()(outer), expected)
