"""Changes of matrices, known whole or as products of thin factors, and the problem of merging their coordinates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from byom.errors import OptionError, listed
from byom.functional.tensors import wide
from byom.merge.base.matrices import is_matrix, is_stack
from byom.merge.base.method import MergeMethod
from byom.merge.base.needs import Needs
from byom.merge.base.problem import Problem
from byom.merge.base.running import running
from byom.weights import Spec, Weights
from byom.weights.lowrank import Adapted, Piece

Chain = Sequence[Tensor]  # matrices whose product is meant: a change itself, or the two factors of a low-rank one
Changes = Callable[[str, str], Chain]  # (task, parameter) -> the change
EXPERT = "#"  # between the name of a tensor that packs experts and the number of one


@dataclass(frozen=True)
class Dense:
    """Changes as matrices.

    Args:
        base: theta_0.
        experts: Task name to theta_t.
    """

    base: Weights
    experts: Mapping[str, Weights]

    def of(self, task: str, name: str) -> Chain:
        """Return one change, as one matrix; of a tensor that packs experts, that of one of them."""
        name, _, expert = name.partition(EXPERT)
        models = (wide(weights[name]) for weights in (self.experts[task], self.base))
        after, before = (value[int(expert)] if expert else value for value in models)
        return (after - before,)


@dataclass(frozen=True)
class LowRank:
    """Changes as products of two factors, and as one matrix where an expert was trained whole.

    Args:
        base: theta_0.
        experts: Task name to theta_t, low-rank differences to this theta_0.
    """

    base: Weights
    experts: Mapping[str, Adapted]

    def of(self, task: str, name: str) -> Chain:
        """Return one change, as one matrix or two."""
        expert = self.experts[task]
        if EXPERT in name or name in expert.replaced:
            return Dense(self.base, self.experts).of(task, name)
        return stacked(expert.pieces(name), self.base.shape(name), lies(self.base, name))


def changes(problem: Problem) -> Changes:
    """Return the changes of all tasks, as factors where every expert is a low-rank difference to theta_0."""
    base, experts = problem.pretrained, problem.finetuned
    low_rank = adapted(problem)
    return LowRank(base, low_rank).of if len(low_rank) == len(experts) else Dense(base, experts).of


def adapted(problem: Problem) -> dict[str, Adapted]:
    """Return the experts that are low-rank differences to theta_0."""
    return {t: e for t, e in problem.finetuned.items() if isinstance(e, Adapted) and e.on(problem.pretrained)}


def require_adapted(problem: Problem) -> dict[str, Adapted]:
    """Return all experts as low-rank differences to theta_0.

    Raises:
        OptionError: Naming those that are not, or running statistics, which every method averages and no adapter holds.
    """
    found = adapted(problem)
    if statistics := running(problem.pretrained):
        raise OptionError(
            f"{problem.pretrained.origin} has running statistics ({listed(statistics)}), which are averaged and are no "
            "part of an adapter; write the merged model whole"
        )
    if whole := [task for task in problem.tasks if task not in found]:
        raise OptionError(
            f"{listed(whole)} are not known as low-rank differences to {problem.pretrained.origin}, so the merged "
            "model is no adapter; give PEFT adapters as experts, or write the merged model whole"
        )
    return found


def in_coordinates(base: Weights, name: str, exclude: Sequence[str]) -> bool:
    """Say whether a parameter is a matrix, or packs one for each expert, and is merged in coordinates."""
    shape = base.shape(name)
    return is_matrix(name, shape, exclude) or is_stack(name, shape, exclude)


def matrices(name: str, shape: Sequence[int]) -> list[str]:
    """Return what the matrices of a parameter are called: its name, or one name for each expert that it packs."""
    return [f"{name}{EXPERT}{expert}" for expert in range(shape[0])] if is_stack(name, shape) else [name]


def require_coordinates(then: MergeMethod) -> None:
    """Refuse a wrapped method that needs more than weights, which have no counterpart among coordinates.

    Raises:
        OptionError: Naming the method and what it needs.
    """
    if then.needs != Needs():
        raise OptionError(
            f"merge.then={type(then).__name__} needs {then.needs.words}, which have no coordinates in "
            "the shared basis; choose a method that needs weights alone, for example merge@merge.then=ties"
        )


def coordinates(problem: Problem, specs: Mapping[str, Spec], read: Callable[[str, str], Tensor]) -> Problem:
    """Return the problem of merging the coordinates of all tasks from an origin of zeros, read when asked for.

    Args:
        problem: The models.
        specs: Name of a matrix to the shape and dtype of its coordinates.
        read: Gives the coordinates of a task's change of a matrix, by task and name.
    """

    def nothing(name: str) -> Tensor:
        return torch.zeros(specs[name].shape, dtype=specs[name].dtype, device=lies(problem.pretrained, name))

    zero = Weights(specs, nothing, origin="zero")

    def expert(task: str) -> Weights:
        return zero.derived(lambda name: read(task, name), problem.finetuned[task].origin)

    return Problem(zero, {task: expert(task) for task in problem.tasks})


def merged_changes(then: MergeMethod, problem: Problem, names: Iterable[str]) -> Weights:
    """Merge the whole changes of some parameters by themselves, from an origin of zeros."""
    base = problem.pretrained.select(set(names).__contains__)
    zero = base - base

    def change(expert: Weights) -> Weights:
        return zero.derived(lambda n: wide(expert.read_finite(n)) - wide(base.read_finite(n)), expert.origin)

    return then(Problem(zero, {task: change(expert) for task, expert in problem.finetuned.items()}))


def low_rank_result(
    problem: Problem, factors: Mapping[str, tuple[Tensor, Tensor]], rest: Callable[[str], Tensor] | None
) -> Adapted:
    """Return a merged model as low-rank differences to theta_0.

    Args:
        problem: The models, all experts being low-rank differences.
        factors: Name of a matrix (`matrices`) to the factors of its merged change.
        rest: Gives the merged values of what is no matrix; None leaves it as theta_0 has it.
    """
    base = problem.pretrained
    pieces: dict[str, list[Piece]] = {}
    for key, (left, right) in factors.items():
        name, _, expert = key.partition(EXPERT)
        if left.shape[1] and left.any() and right.any():
            pieces.setdefault(name, []).append(Piece(int(expert or 0) * len(left), left, right))
    trained = {name for expert in require_adapted(problem).values() for name in (*expert.replaced, *expert.factored)}
    others = sorted(trained - {key.partition(EXPERT)[0] for key in factors}) if rest else []
    return Adapted(base, pieces, {name: rest(name) for name in others if rest}, "merged")


def stacked(pieces: Sequence[Piece], shape: Sequence[int], place: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Write the differences of a matrix as one product.

    Args:
        pieces: Low-rank differences of some rows each, or none.
        shape: ``(m, n)``.
        place: Device of the factors; None takes the CPU.

    Returns:
        ``[m, q]`` and ``[q, n]``, q being the sum of the ranks.
    """
    height, width = shape
    below = [height - piece.start - len(piece.left) for piece in pieces]
    left = [pad(piece.left.to(place), (0, 0, piece.start, rows)) for piece, rows in zip(pieces, below, strict=True)]
    right = [piece.right.to(place) for piece in pieces]
    none = torch.zeros(height, 0, device=place), torch.zeros(0, width, device=place)
    return torch.cat([none[0], *left], 1), torch.cat([none[1], *right])


def lies(base: Weights, name: str) -> torch.device:
    """Return the device of a parameter, or of one of the matrices that it packs."""
    name = name.partition(EXPERT)[0]
    return base.place(name) or base[name].device
