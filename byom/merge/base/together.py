"""Merging several tensors of a model at once, a thread for each, while they are read one after the other."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from math import prod
from threading import Barrier, local

import torch
from torch import Tensor

from byom.merge.base.problem import Problem
from byom.weights.placed import home
from byom.weights.spec import CPU

LARGE = 1 << 26  # entries of a tensor in all tasks: a larger one has all threads, and the memory, for itself
MOST = 4  # tensors at once
_THREAD = local()


class Together:
    """Merges tensors that are read in order, those that come next ahead, each by one thread.

    A second thread makes LAPACK's decompositions of some thousand columns no faster, and often slower; another matrix
    in that thread halves the time. It begins with the second of two tensors that are read in order, and what was merged
    for nothing is let go with the next request, so whoever reads here and there merges no more than that. Each tensor
    is merged by one thread in either case, and has the same bits. Models on a device, and large tensors, are left to
    the thread that asks, with all of PyTorch's threads.

    Args:
        problem: The models.
        merge: Merges the parameter of a name.
    """

    def __init__(self, problem: Problem, merge: Callable[[str], Tensor]) -> None:
        base = self._base = problem.pretrained
        self._merge, self._tasks = merge, len(problem.tasks)
        self._here = home(base) is base
        self._next = dict(pairwise(name for name in base.canonical() if base.merges(name)))
        self._last = ""
        self._held: dict[str, Future[Tensor]] = {}

    def __call__(self, name: str) -> Tensor:
        """Return a merged parameter."""
        workers = min(torch.get_num_threads(), MOST)
        if workers == 1 or getattr(_THREAD, "merges", False) or self._alone(name):
            self._last = name
            return self._merge(name)
        if self._next.get(self._last) != name:
            self._forget()
        work = self._held.pop(name, None) or self._start(name, workers)
        if self._next.get(self._last) == name:
            self._look_ahead(name, workers)
        self._last = name
        return work.result()

    def _alone(self, name: str) -> bool:
        base = self._base
        return not self._here or base.place(name) not in (CPU, None) or prod(base.shape(name)) * self._tasks > LARGE

    def _look_ahead(self, name: str, workers: int) -> None:
        following = self._next.get(name)
        for _ in range(2 * workers):  # most models have a vector for every matrix
            if following is None or self._alone(following):
                return
            if following not in self._held:
                self._held[following] = self._start(following, workers)
            following = self._next.get(following)

    def _start(self, name: str, workers: int) -> Future[Tensor]:
        return _pool(workers, torch.get_num_threads()).submit(self._work, name, torch.is_grad_enabled())

    def _work(self, name: str, gradients: bool) -> Tensor:
        with torch.set_grad_enabled(gradients):  # what holds in the caller's thread does not in those of a pool
            return self._merge(name)

    def _forget(self) -> None:
        for work in self._held.values():
            work.cancel()
        self._held = {}


@cache
def _pool(workers: int, threads: int) -> ThreadPoolExecutor:
    """Return threads of which each has its share of PyTorch's."""

    def begin() -> None:
        _THREAD.merges = True
        torch.get_num_threads()  # or the number is taken from elsewhere at the thread's first operation
        torch.set_num_threads(max(1, threads // workers))

    pool, begun = ThreadPoolExecutor(workers, "byom merges", begin), Barrier(workers + 1)
    for _ in range(workers):
        pool.submit(begun.wait)
    begun.wait()
    torch.set_num_threads(threads)  # of this thread and of later ones, for which that of the last that asked is taken
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # its threads are the parent's
