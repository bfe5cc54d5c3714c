"""Text encoders through transformers: RoBERTa, BERT, MiniLM and their relatives, on one code path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from byom.backbone.base import Reader
from byom.backbone.transformer import Pretrained
from byom.data.source.package import Package
from byom.data.splits import Split
from byom.data.suite import Task
from byom.errors import CheckpointError, DataError, listed
from byom.functional.heads import Classifier, Readout, Regression

Row = str | Mapping[str, str]
HEADS = (
    ("classifier.dense.weight", "classifier.dense.bias", "classifier.out_proj.weight", "classifier.out_proj.bias"),
    ("pooler.dense.weight", "pooler.dense.bias", "classifier.weight", "classifier.bias"),
)
"""Classifiers of RoBERTa's and BERT's kind: a layer with tanh on the first token's state, and a linear one."""


class PooledEncoder(nn.Module):
    """A transformer encoder with one feature vector per text.

    Args:
        model: A transformers encoder.
        pooling: ``mean`` over the text's tokens, or ``cls`` for the first token.
    """

    def __init__(self, model: nn.Module, pooling: str) -> None:
        super().__init__()
        self.model = model
        self.pooling = pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **more: Tensor) -> Tensor:
        """Return features ``[B, D]`` of token ids ``[B, L]`` with mask ``[B, L]``; `more` are segments of pairs."""
        states = self.model(input_ids=input_ids, attention_mask=attention_mask, **more).last_hidden_state
        if self.pooling == "cls":
            return states[:, 0]
        weight = attention_mask.unsqueeze(-1).to(states.dtype)
        return (states * weight).sum(1) / weight.sum(1).clamp(min=1)


@dataclass(frozen=True)
class Encoder(Pretrained):
    """A transformers encoder without its pooler and classifier.

    Args:
        checkpoint: A hub id, a folder, or a folder in an installed package.
        revision: Commit of a hub id.
        pooling: ``mean`` or ``cls`` (the paper's RoBERTa classifiers read the first token).
        max_length: Longest text in tokens; the rest is cut off.
        learning_rate: For full fine-tuning.
        temperature: Factor on the cosine of prototype heads.
    """

    checkpoint: Package | str = "roberta-base"
    revision: str = "main"
    pooling: Literal["mean", "cls"] = "mean"
    max_length: int = 48
    learning_rate: float = 5e-5
    temperature: float = 20.0

    modality = "text"
    inner = "model."

    @property
    def encoding(self) -> dict[str, Any]:
        """Tokenizer and length."""
        return {"kind": "tokens", "tokenizer": self._where(), "max_length": self.max_length} | self.tokenizer_contents()

    def encode(self, inputs: Sequence[Row], task: Task | None = None) -> dict[str, Tensor]:
        """Tokenise texts, or pairs of texts.

        Args:
            inputs: Strings, or rows of one or two columns; of a pair that is too long, the longer text is cut.
            task: Not used: all tasks are encoded alike.

        Returns:
            ``input_ids`` and ``attention_mask``, int64 ``[N, max_length]``; for pairs also ``token_type_ids``,
            where the model tells the two texts apart by them.

        Raises:
            DataError: If a row has more columns.
        """
        return self.reader().encode(inputs, task)

    def reader(self) -> Reader:
        """Return `encode` with one tokenizer for all calls."""
        from transformers import AutoTokenizer

        tokenizer = self._from(AutoTokenizer)

        def tokens(row: Row, task: Task | None = None) -> int:
            texts, pairs = _columns([row])
            return len(tokenizer(texts, pairs, verbose=False)["input_ids"][0])

        return Reader(lambda inputs, task: self._tokenised(tokenizer, inputs), tokens, self.max_length)

    def _tokenised(self, tokenizer: Any, inputs: Sequence[Row]) -> dict[str, Tensor]:
        texts, pairs = _columns(inputs)
        rows = tokenizer(
            texts or [""],
            pairs,
            padding="max_length",
            truncation="longest_first",
            max_length=self.max_length,
            return_tensors="pt",
        )
        names = ("input_ids", "attention_mask", *(["token_type_ids"] if pairs else []))
        return {name: rows[name][: len(texts)] for name in names if name in rows}

    def load(self) -> nn.Module:
        """Build the encoder with its pre-trained weights; see `Backbone.load`."""
        from transformers import AutoModel

        return PooledEncoder(self._model(AutoModel, add_pooling_layer=False), self.pooling).eval()

    def head(self, encoder: nn.Module, task: Task, shots: Split | None) -> Readout:
        """Make a head of prototypes or, where labels are numbers, a ridge regression; see `Backbone.head`.

        Raises:
            DataError: If labels are numbers and there are fewer than two examples.
        """
        if not task.regression:
            return super().head(encoder, task, shots)
        if shots is None or len(shots) < 2:
            raise DataError(
                f"the labels of task {task.name} are numbers, and its head is fitted to examples, of which there are "
                f"{len(shots or ())}; take experts with heads of their own (experts.heads=checkpoint)"
            )
        return Regression.fit(_features(encoder, shots), shots.labels)

    def own_head(self, task: Task, tensors: Mapping[str, Tensor]) -> Readout | None:
        """Make the head of RobertaForSequenceClassification or BertForSequenceClassification.

        Raises:
            CheckpointError: If tensors are missing or have odd shapes, the outputs are not as many as the task's
                classes (1 where labels are numbers), or `pooling` is not ``cls``.
        """
        layers = next((names for names in HEADS if set(names) & set(tensors)), None)
        if layers is None:
            return None
        if self.pooling != "cls":
            raise CheckpointError(
                f"the classifier of task {task.name} reads the first token, and backbone.pooling={self.pooling}; "
                "set backbone.pooling=cls, or experts.heads=backbone"
            )
        if lost := [name for name in layers if name not in tensors]:
            raise CheckpointError(
                f"the classifier of task {task.name} lacks {listed(lost)} (the checkpoint has {listed(tensors)}); "
                "set experts.heads=backbone"
            )
        return _classifier(task, [tensors[name].float() for name in layers])


def _columns(inputs: Sequence[Row]) -> tuple[list[str], list[str] | None]:
    rows = [[row] if isinstance(row, str) else list(row.values()) for row in inputs]
    if odd := [len(row) for row in rows if len(row) != len(rows[0]) or not 1 <= len(row) <= 2]:
        raise DataError(f"a row of {odd[0]} columns cannot be encoded; name one or two columns of text in the source")
    first, *second = (list(column) for column in zip(*rows, strict=True)) if rows else ([],)
    return first, second[0] if second else None


@torch.no_grad()
def _features(encoder: nn.Module, split: Split) -> Tensor:
    device = next(encoder.parameters()).device
    encoder.eval()
    rows: dict[int, Tensor] = {}
    for inputs, _, places in split.batches(64):
        features = encoder(**{name: value.to(device) for name, value in inputs.items()}).float().cpu()
        rows |= dict(zip(places.tolist(), features, strict=True))
    return torch.stack([rows[place] for place in range(len(split))])


def _classifier(task: Task, tensors: Sequence[Tensor]) -> Classifier:
    dense, shift, weight, bias = tensors
    outputs = 1 if task.regression else len(task.classes)
    fits = dense.ndim == weight.ndim == 2 and shift.shape == dense.shape[:1] == weight.shape[1:]
    if not fits or bias.shape != weight.shape[:1]:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
        raise CheckpointError(f"the classifier of task {task.name} has the shapes {shapes}, which do not fit together")
    if len(weight) != outputs:
        raise CheckpointError(
            f"the classifier of task {task.name} has {len(weight)} outputs where the task has {outputs}; "
            "choose the checkpoint of this task"
        )
    return Classifier(*tensors)
