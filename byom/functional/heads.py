"""Heads: functions from features to logits, how they are read and trained, and their storage as tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, mse_loss, normalize

from byom.errors import CheckpointError, OptionError

Readout = Callable[[Tensor], Tensor]
"""A head: features ``[B, D]`` to logits ``[B, C]``. It may have ``predict`` (logits to predictions ``[B]``, the arg max
by default) and ``loss`` (logits and labels ``[B]`` to a number, cross entropy by default)."""


def loss(head: Readout, logits: Tensor, labels: Tensor) -> Tensor:
    """Return what fine-tuning of a task minimises: its head's own loss, or cross entropy.

    Args:
        head: The task's head.
        logits: What it returned for a batch, ``[B, C]``.
        labels: ``[B]``.
    """
    return getattr(head, "loss", cross_entropy)(logits, labels)


def require_classes(logits: Tensor, what: str) -> Tensor:
    """Refuse logits that are not class probabilities.

    Raises:
        OptionError: If there is one number per example, as where labels are numbers.
    """
    if logits.shape[-1] < 2:
        raise OptionError(
            f"{what} works on class probabilities, and a task of the suite predicts one number per example; "
            "leave that task out (~suite.tasks.NAME), or choose another method"
        )
    return logits


@dataclass(frozen=True)
class Changed:
    """A head whose logits are computed in another way, and read as before.

    Args:
        head: Says how logits become predictions and losses.
        compute: Features to logits.
    """

    head: Readout
    compute: Readout

    def __call__(self, features: Tensor) -> Tensor:
        """Return logits of features."""
        return self.compute(features)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.head, name)


@dataclass(frozen=True)
class Head:
    """A frozen cosine classifier: ``logits = temperature * normalised features @ weight.T``.

    Args:
        weight: ``[C, D]`` unit rows, one per class.
        temperature: Factor on the cosine.
    """

    weight: Tensor
    temperature: float

    def __call__(self, features: Tensor) -> Tensor:
        """Return logits ``[B, C]`` of features ``[B, D]``."""
        return self.temperature * normalize(features.float(), dim=-1) @ self.weight.to(features.device).T


@dataclass(frozen=True)
class Classifier:
    """A classifier that was trained with its checkpoint: ``logits = weight tanh(dense x + shift) + bias``.

    Args:
        dense: ``[H, D]``.
        shift: ``[H]``.
        weight: ``[C, H]``, rows of the classes.
        bias: ``[C]``.
    """

    dense: Tensor
    shift: Tensor
    weight: Tensor
    bias: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Return logits ``[B, C]`` of features ``[B, D]``."""
        dense, shift, weight, bias = (value.to(features.device) for value in vars(self).values())
        return linear(torch.tanh(linear(features.float(), dense, shift)), weight, bias)

    def predict(self, logits: Tensor) -> Tensor:
        """Return class numbers, or the number itself where there is one output, ``[B]``."""
        return logits[:, 0] if logits.shape[-1] == 1 else logits.argmax(-1)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross entropy, or the mean squared error where there is one output."""
        if logits.shape[-1] == 1:
            return mse_loss(logits[:, 0], labels.to(logits.dtype))
        return cross_entropy(logits, labels)


@dataclass(frozen=True)
class Regression:
    """A frozen linear function of features, for tasks whose labels are numbers.

    Args:
        weight: ``[D]``.
        bias: The value at zero, ``[1]``.
    """

    weight: Tensor
    bias: Tensor

    @classmethod
    def fit(cls, features: Tensor, labels: Tensor) -> Regression:
        """Fit a ridge regression with an intercept that is not penalised.

        Features are standardised and the penalty is the number of examples, which shrinks a direction of variance v
        (1 on average) by v / (v + 1): what rests on little variance is noise where examples are few, and without a
        penalty a few hundred of them would be fitted exactly.

        Args:
            features: ``[N, D]``.
            labels: ``[N]``.

        Returns:
            The head, in fp32.
        """
        x, y = features.double(), labels.double()
        mean, scale = x.mean(0), x.std(0, correction=0).clamp(min=1e-6)
        z, centre = (x - mean) / scale, y.mean()
        gram = z.T @ z + len(z) * torch.eye(z.shape[1], dtype=z.dtype)
        weight = torch.linalg.solve(gram, z.T @ (y - centre)) / scale
        return cls(weight.float(), (centre - mean @ weight).reshape(1).float())

    def __call__(self, features: Tensor) -> Tensor:
        """Return values ``[B, 1]`` of features ``[B, D]``."""
        return linear(features.float(), self.weight.to(features.device)[None], self.bias.to(features.device))

    def predict(self, logits: Tensor) -> Tensor:
        """Return values ``[B]``."""
        return logits[:, 0]

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean squared error."""
        return mse_loss(logits[:, 0], labels.to(logits.dtype))


@dataclass(frozen=True)
class Answers:
    """The reading of a model that answers in words and gives one number per answer.

    Features are of width C, log-likelihoods of the answers, or of width C + 2, what was generated: a 1 at the answer
    that it is or at C if it is none, and last the number that it spells (0 where it spells none).

    Args:
        values: ``[C]``, what each answer stands for: class numbers int64, or numbers float32.
    """

    values: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """Return log-likelihoods ``[B, C]``; of generated text ``[B, C + 1]``, or ``[B, 1]`` for numbers."""
        if features.shape[-1] == len(self.values):
            return features
        return features[:, -1:] if self.values.is_floating_point() else features[:, :-1]

    def predict(self, logits: Tensor) -> Tensor:
        """Return class numbers, C for text that is not an answer, or values, ``[B]``."""
        if not self.values.is_floating_point():
            return logits.argmax(-1)
        return logits[:, 0] if logits.shape[-1] == 1 else self.values.to(logits.device)[logits.argmax(-1)]

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the mean negative log-likelihood of the right answers; for numbers, of the nearest ones.

        Published models were trained on it. Cross entropy among the answers alone would leave the rest of the
        vocabulary free, and generation could then say something else.
        """
        return -logits.gather(1, self._nearest(labels)).mean()

    def _nearest(self, labels: Tensor) -> Tensor:
        values = self.values.to(labels.device)
        return (labels[:, None] - values).abs().argmin(-1, keepdim=True)


def reordered(head: Readout, order: Sequence[int] | None) -> Readout:
    """Return a head whose classes are in another order.

    Args:
        head: A head with a row per class.
        order: For each class, the row that it has in `head`; None leaves them as they are.
    """
    if order is None or not isinstance(head, Head | Classifier):
        return head
    rows = {"weight": head.weight[list(order)]}
    return replace(head, **rows, **({"bias": head.bias[list(order)]} if isinstance(head, Classifier) else {}))


KINDS: tuple[type, ...] = (Head, Classifier, Regression, Answers)


def pack(head: Readout) -> dict[str, Tensor]:
    """Return a head as tensors; their names tell the kind."""
    if not isinstance(head, KINDS):
        raise CheckpointError(f"a {type(head).__name__} cannot be stored; known heads are {_known()}")
    return {name: torch.as_tensor(value) for name, value in vars(head).items()}


def unpack(tensors: Mapping[str, Tensor]) -> Readout:
    """Return the head that `pack` made tensors of.

    Raises:
        CheckpointError: If their names are those of no kind.
    """
    kind = next((kind for kind in KINDS if {field.name for field in fields(kind)} == set(tensors)), None)
    if kind is None:
        raise CheckpointError(f"tensors {sorted(tensors)} are not a head; known heads are {_known()}")
    return kind(**{name: value if value.ndim else float(value) for name, value in tensors.items()})


def _known() -> str:
    return ", ".join(kind.__name__ for kind in KINDS)
