"""One optimizer step: a batch forward and backward, whole or in pieces, in any precision."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from byom.errors import OptionError
from byom.experts.finetune import processes
from byom.experts.finetune.augment import BOXES, cropped
from byom.experts.finetune.base import Recipe
from byom.functional.heads import Readout
from byom.functional.heads import loss as task_loss
from byom.functional.precision import DEFAULT, lowered, products
from byom.functional.tensors import wide


class Step:
    """Steps of one training run. Weights, logits and losses are fp32 in every precision.

    Args:
        encoder: What is trained, prepared for the processes that take part.
        optimizer: Its optimizer.
        recipe: Hyperparameters.
        precision: That of the encoder's arithmetic.
        scaler: See `scaler`.
    """

    def __init__(
        self, encoder: nn.Module, optimizer: Any, recipe: Recipe, precision: str, scaler: torch.amp.GradScaler
    ) -> None:
        self.encoder, self.optimizer, self.recipe, self.precision = encoder, optimizer, recipe, precision
        self.device = next(encoder.parameters()).device
        self.scaler = scaler
        self.piece = recipe.micro_batch if isinstance(recipe.micro_batch, int) else recipe.batch_size
        if self.piece < recipe.batch_size:
            self._require_divisible()

    def __call__(self, head: Readout, inputs: dict[str, Tensor], labels: Tensor, weight: float) -> Tensor:
        """Take one step, and return the batch's loss; nothing waits for the device.

        Args:
            head: The task's frozen head.
            inputs: Name to ``[B, ...]``, on the device.
            labels: ``[B]``.
            weight: Factor on the loss.
        """
        while (loss := self._backward(head, inputs, labels, weight)) is None:
            self._halve(len(labels))
        self.scaler.unscale_(self.optimizer)
        processes.team().clip_grad_norm_(self.encoder.parameters(), self.recipe.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss

    def _backward(self, head: Readout, inputs: dict[str, Tensor], labels: Tensor, weight: float) -> Tensor | None:
        """Leave the batch's gradient in the parameters; None where memory ran out."""
        team, count = processes.team(), len(labels)
        self.optimizer.zero_grad()
        total: Tensor | None = None
        with suppress(torch.OutOfMemoryError):  # once it is left, nothing holds the frames and their activations
            for start in range(0, count, self.piece):
                rows = slice(start, start + self.piece)
                last = start + self.piece >= count
                with nullcontext() if last else team.no_sync(self.encoder):  # processes exchange gradients once
                    loss = self._loss(head, {name: value[rows] for name, value in inputs.items()}, labels[rows])
                    loss = weight * (len(labels[rows]) / count) * loss
                    team.backward(self.scaler.scale(loss))
                total = loss.detach() if total is None else total + loss.detach()
            return total
        self.optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _loss(self, head: Readout, inputs: dict[str, Tensor], labels: Tensor) -> Tensor:
        inputs = _augmented(inputs, self.device)
        with lowered(self.precision, self.device):
            features = self.encoder(**inputs)
        return task_loss(head, head(wide(features)), labels)

    def _require_divisible(self) -> None:
        """Refuse pieces of batches whose examples depend on each other."""
        kind = nn.modules.batchnorm._BatchNorm
        if found := [name for name, module in self.encoder.named_modules() if isinstance(module, kind)]:
            raise OptionError(
                f"finetune.micro_batch={self.recipe.micro_batch} would change the result: '{found[0]}' normalises by "
                "the statistics of the examples that are computed together; leave it out, and use a smaller "
                "finetune.batch_size where memory runs out"
            )

    def _halve(self, count: int) -> None:
        tried = min(self.piece, count)
        if self.recipe.micro_batch != "auto":
            raise OptionError(
                f"the memory of {self.device} does not hold {tried} examples in training; set "
                f"finetune.micro_batch=auto, which computes a batch of {self.recipe.batch_size} in pieces, to the same "
                "result up to rounding"
            )
        if tried == 1:
            raise OptionError(
                f"the memory of {self.device} does not hold one example in training; use finetune=lora, whose "
                "optimizer is small, a smaller backbone, or device=cpu"
            )
        self._require_divisible()
        self.piece = tried // 2


def scaler(precision: str, device: torch.device) -> torch.amp.GradScaler:
    """Return what scales losses up and gradients down again in fp16, where they would vanish below 6e-8; else idle."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")


def _augmented(inputs: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Crop images by the boxes that came with them, to the same bytes in every precision of the encoder."""
    if BOXES not in inputs:
        return inputs
    rest = {name: value for name, value in inputs.items() if name != BOXES}
    with products(DEFAULT, device):
        return rest | {"pixels": cropped(rest["pixels"], inputs[BOXES])}
