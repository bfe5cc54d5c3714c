"""Text encoders through transformers: RoBERTa, BERT, MiniLM and their relatives, on one code path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from byom.backbone.base import Backbone
from byom.errors import CheckpointError
from byom.source.package import Package


class PooledEncoder(nn.Module):
    """A transformer encoder with one feature vector a text.

    Args:
        model: A transformers encoder.
        pooling: ``mean`` over the text's tokens, or ``cls`` for the first token.
    """

    def __init__(self, model: nn.Module, pooling: str) -> None:
        super().__init__()
        self.model = model
        self.pooling = pooling

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return features ``[B, D]`` of token ids ``[B, L]`` with mask ``[B, L]``."""
        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if self.pooling == "cls":
            return states[:, 0]
        weight = attention_mask.unsqueeze(-1).to(states.dtype)
        return (states * weight).sum(1) / weight.sum(1).clamp(min=1)


@dataclass(frozen=True)
class Encoder(Backbone):
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
        return {"kind": "tokens", "tokenizer": self._where(), "max_length": self.max_length}

    def encode(self, inputs: Sequence[str]) -> dict[str, Tensor]:
        """Return ``input_ids`` and ``attention_mask``, int64 ``[N, max_length]``."""
        from transformers import AutoTokenizer

        tokenizer = self._from(AutoTokenizer)
        rows = tokenizer(
            list(inputs), padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        return {"input_ids": rows["input_ids"], "attention_mask": rows["attention_mask"]}

    def load(self) -> nn.Module:
        """Build the encoder with its pre-trained weights; see `Backbone.load`."""
        from transformers import AutoModel

        model = self._from(AutoModel, add_pooling_layer=False, dtype=torch.float32)
        return PooledEncoder(model, self.pooling).eval()

    def _where(self) -> str:
        if isinstance(self.checkpoint, Package):
            return f"{self.checkpoint.name}=={self.checkpoint.version}"
        return f"{self.checkpoint}@{self.revision}"

    def _from(self, auto: Any, **options: Any) -> Any:
        place = self.checkpoint
        if isinstance(place, Package):
            place.digest(["model.safetensors"])
            place = str(place.folder())
        else:
            options |= {"revision": self.revision}
        try:
            return auto.from_pretrained(place, **options)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"transformers cannot load '{place}' ({error}). Check the name and the network, "
                "or set backbone.checkpoint to a local folder"
            ) from error
