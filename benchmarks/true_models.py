"""The encoders of the published tables at their true size, with random weights, and synthetic experts of them."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from byom.functional.seeding import keyed
from byom.functional.tensors import copied, wide
from byom.merge.base import Problem
from byom.weights import Weights

EXAMPLES, LENGTH = 8, 48
SHARD = 256_000_000  # bytes of a file, for experts in shards and for merged models
SPREAD, LEAST = 1e-3, 1e-2
EXPERTS = (
    "pre-trained values plus normal numbers times the exponential of normal numbers (a heavy tail), times "
    f"{SPREAD:g} of the tensor's root mean square, or of {LEAST:g} where that is less"
)
Inputs = dict[str, Tensor]


class Logits(nn.Module):
    """A sequence-to-sequence model whose features are the logits of the first word it would write.

    Args:
        model: A transformers model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return ``[B, V]`` of token ids ``[B, L]`` with mask ``[B, L]``."""
        start = torch.zeros(len(input_ids), 1, dtype=torch.int64, device=input_ids.device)
        return self.model(input_ids=input_ids, attention_mask=attention_mask, decoder_input_ids=start).logits[:, 0]


@dataclass(frozen=True)
class Model:
    """One encoder.

    Args:
        build: Makes it with random weights; the caller seeds.
        inputs: Makes the tensors of `EXAMPLES` inputs from a generator.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[torch.Generator], Inputs]


def _clip() -> nn.Module:
    from byom.backbone.clip import Clip

    return Clip("ViT-B-32", "random").load()


def _roberta() -> nn.Module:
    from transformers import AutoModel, RobertaConfig

    from byom.backbone.encoder import PooledEncoder

    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
    return PooledEncoder(AutoModel.from_config(config, add_pooling_layer=False), "cls")


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_decoder_layers": 12, "num_heads": 12}
    flan = {"vocab_size": 32128, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}
    model = T5ForConditionalGeneration(T5Config(**sizes, **flan))
    own = torch.randn_like(model.lm_head.weight) / model.config.d_model**0.5
    model.lm_head.weight = nn.Parameter(own)  # transformers 5 ties it unless a checkpoint holds another one
    return Logits(model)


def _images(generator: torch.Generator) -> Inputs:
    return {"pixels": torch.randint(256, (EXAMPLES, 3, 224, 224), generator=generator, dtype=torch.uint8)}


def _texts(generator: torch.Generator) -> Inputs:
    ids = torch.randint(3, 32000, (EXAMPLES, LENGTH), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


MODELS = {
    "vit_b_32": Model(_clip, _images),
    "roberta_base": Model(_roberta, _texts),
    "flan_t5_base": Model(_t5, _texts),
}


def built(name: str) -> nn.Module:
    """Return an encoder with its random weights, the same at each call, ready for inference."""
    torch.manual_seed(0)
    return MODELS[name].build().eval()


def examples(name: str) -> Inputs:
    """Return random inputs, the same at each call."""
    return MODELS[name].inputs(torch.Generator().manual_seed(0))


def problem(folder: Path, tasks: int) -> Problem:
    """Open the pre-trained model and the first experts of a folder that `written` gave."""
    experts = {f"task{task}": Weights.open(folder / f"task{task}") for task in range(tasks)}
    return Problem(Weights.open(folder / "pretrained"), experts)


@contextmanager
def written(name: str, tasks: int, folder: Path, keep: bool, shard: int = SHARD) -> Iterator[Path]:
    """Give a folder with a pre-trained model and its experts as safetensors, every other one in shards.

    Args:
        name: Which of `MODELS`.
        tasks: Number of experts.
        folder: Where the model's folder is made; experts that are there already are taken.
        keep: Whether they stay there afterwards.
        shard: Bytes of a file of those in shards.

    Yields:
        The model's folder.

    Raises:
        SystemExit: If the disk has too little room.
    """
    place = folder / name
    lost = [task for task in range(tasks) if not (place / f"task{task}").is_dir()]
    try:
        if lost:
            base = Weights.of(copied(built(name).state_dict()))
            _require_room(folder, len(lost) + tasks + 5, size(base)["bytes"])
            base.save(place / "pretrained")
            for task in lost:
                expert(base, task).save(place / f"task{task}", shard if task % 2 else size(base)["bytes"])
        yield place
    finally:
        if not keep:
            shutil.rmtree(place, ignore_errors=True)


def _require_room(folder: Path, models: int, nbytes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < models * nbytes:
        sys.exit(
            f"{folder} has {free / 1e9:.0f} GB free, and up to {models} models of {nbytes / 1e9:.2f} GB will be "
            "there at once; choose another disk with --folder"
        )


def expert(base: Weights, task: int) -> Weights:
    """Return a synthetic expert, drawn tensor by tensor as it is read; `EXPERTS` says how."""

    def read(name: str) -> Tensor:
        if not base.dtype(name).is_floating_point:
            return base[name]
        value = wide(base[name])
        generator = torch.Generator().manual_seed(keyed(task, name))
        tail = torch.randn(value.shape, generator=generator).exp_()
        size = SPREAD * max(LEAST, float(value.square().mean().sqrt()))
        return value + size * tail.mul_(torch.randn(value.shape, generator=generator))

    return base.derived(read, f"synthetic expert {task}")


def size(weights: Weights) -> Mapping[str, int]:
    """Return a model's parameters, and the bytes of it and of its largest tensor, a tied one counted once."""
    nbytes = [weights.dtype(n).itemsize * torch.Size(weights.shape(n)).numel() for n in weights.canonical()]
    return {"parameters": weights.numel, "bytes": sum(nbytes), "largest_bytes": max(nbytes)}
