"""CLIP through open_clip: the image tower is merged, zero-shot heads come from the text tower."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import normalize

from byom.backbone.base import Backbone
from byom.backbone.vit import PixelEncoder
from byom.data.splits import Split
from byom.data.suite import Task
from byom.errors import CheckpointError, DataError
from byom.functional.heads import Head
from byom.storage import repository as hub
from byom.storage.contents import content_digest
from byom.storage.repository import Download

PROMPTS = 1024  # texts a pass on a GPU
FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")


@dataclass(frozen=True)
class Clip(Backbone):
    """An open_clip model: heads are text embeddings of class names in templates, frozen and never merged.

    Args:
        model: open_clip's architecture name.
        pretrained: open_clip's weight tag or a file; ``random`` for untrained weights (tests).
        quick_gelu: Whether the weights were trained with the sigmoid approximation of GELU, as OpenAI's were;
            open_clip warns only where this does not fit, and its features are then others.
        learning_rate: For full fine-tuning; 1e-5 in the benchmark.
    """

    model: str = "ViT-B-32"
    pretrained: str = "openai"
    quick_gelu: bool = True
    learning_rate: float = 1e-5

    modality = "image"
    inner = "visual."
    reads_shots = False

    @property
    def encoding(self) -> dict[str, Any]:
        """The model's own resize and crop."""
        return {"kind": "clip", "model": self.model}

    @property
    def hub_name(self) -> str:
        """The name of the model in open_clip."""
        return self.model

    def encode(self, inputs: Sequence[Image.Image], task: Task | None = None) -> dict[str, Tensor]:
        """Return ``pixels`` uint8 ``[N, 3, S, S]``: shorter side resized, centre cropped."""
        from open_clip import get_model_config, image_transform

        config = get_model_config(self.model)
        if config is None:
            raise CheckpointError(f"open_clip has no model '{self.model}'; see open_clip.list_models()")
        transform: Any = image_transform(
            config["vision_cfg"].get("image_size", 224), is_train=False, mean=(0, 0, 0), std=(1, 1, 1)
        )
        rows = [transform(image.convert("RGB")) for image in inputs]
        return {"pixels": (255 * torch.stack(rows)).round().to(torch.uint8)}

    @property
    def frozen_parameters(self) -> int:
        """Token embedding, final norm, projection and scale of the text tower.

        The checkpoints of the task vectors' code keep them, and published counts include them (113 M for ViT-B/32).
        """
        from open_clip import get_model_config

        config: Any = get_model_config(self.model)
        width, text = config["text_cfg"]["width"], config["text_cfg"]
        return width * (text["vocab_size"] + text["context_length"] + 2 + config["embed_dim"]) + 1

    def blank(self) -> nn.Module:
        """Return the image tower with random weights."""
        return replace(self, pretrained="random").load()

    def downloads(self) -> Iterator[Download]:
        """Say what would have to be fetched from a hub."""
        if where := self._repository():
            yield hub.download(f"backbone {self.model} {self.pretrained}", where, [FILES])

    def fetch(self) -> None:
        """Bring the weights to this machine."""
        if self._repository():
            self._full()

    def contents(self, cache: Path | None = None) -> str | None:
        """Return the digest of a local file, or the commit that is used; see `Backbone.contents`."""
        file = Path(self.pretrained)
        if file.is_file():
            return content_digest(file.parent, [file.name], cache, CheckpointError)
        return hub.current(where) if self.pretrained != "random" and (where := self._repository()) else None

    def _repository(self) -> hub.Repository | None:
        from open_clip.pretrained import get_pretrained_cfg

        name = get_pretrained_cfg(self.model, self.pretrained).get("hf_hub", "")
        return hub.Repository(name.rstrip("/")) if name else None

    def load(self) -> nn.Module:
        """Return the image tower with normalisation; see `Backbone.load`."""
        import open_clip

        model = self._full()
        return PixelEncoder(model.visual, open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD).eval()

    def require_head(self, task: Task) -> None:
        """Refuse a task without templates; see `Backbone.require_head`."""
        if not task.templates:
            raise DataError(
                f"task '{task.name}' has no templates; add e.g. templates: ['a photo of a {{}}.'] to its yaml"
            )

    def head(self, encoder: nn.Module, task: Task, shots: Split | None) -> Head:
        """Make the zero-shot head: the normalised mean of the templates' normalised text features per class.

        Args:
            encoder: Says where to compute; the text tower belongs to the same checkpoint.
            task: Gives class names and templates.
            shots: Not used: zero-shot heads need no labelled example.

        Returns:
            The head, on the CPU.

        Raises:
            DataError: If the task has no templates.
        """
        return next(self.heads(encoder, [task], shots))

    def heads(self, encoder: nn.Module, tasks: Sequence[Task], shots: Split | None) -> Iterator[Head]:
        """Yield the zero-shot heads of several tasks from one text tower, which ends with them; see `head`."""
        for task in tasks:
            self.require_head(task)
        model, tokenizer = self._full(), _tokenizer(self.model)
        model.visual = nn.Identity()  # the larger half, which no text needs
        model = model.to(next(encoder.parameters()).device)
        for task in tasks:
            rows = _class_features(model, tokenizer, task.classes, task.templates)
            yield Head(rows, float(model.logit_scale.detach().exp()))

    def _full(self) -> Any:
        import open_clip

        tag = None if self.pretrained == "random" else self.pretrained
        torch.manual_seed(0)
        options: dict[str, Any] = {"force_quick_gelu": self.quick_gelu, "require_pretrained": tag is not None}
        try:
            with _unlogged():
                return open_clip.create_model(self.model, pretrained=tag, **options).eval()
        except Exception as error:
            raise CheckpointError(
                f"open_clip cannot load {self.model} with pretrained='{self.pretrained}' ({type(error).__name__}: "
                f"{error}). Check the names and the network, or set backbone.pretrained to a file"
            ) from error


@contextmanager
def _unlogged() -> Iterator[None]:
    """Keep open_clip, which logs what it also raises, from setting up the root logger and so doubling others' lines."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


@cache
def _tokenizer(model: str) -> Any:
    """Return an architecture's tokenizer, whose table of merges is read once and not for every task."""
    import open_clip

    return open_clip.get_tokenizer(model)


@torch.no_grad()
def _class_features(model: Any, tokenizer: Any, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Return a unit row per class, ``[C, D]`` on the CPU."""
    device = model.logit_scale.device
    # on a CPU one class at a time: its products round otherwise in larger batches, and heads are in every record
    size = 1 if device.type == "cpu" else max(1, PROMPTS // len(templates))
    chunks = [names[start : start + size] for start in range(0, len(names), size)]
    return torch.cat([_chunk(model, tokenizer, chunk, templates, device) for chunk in chunks]).cpu()


def _chunk(model: Any, tokenizer: Any, names: Sequence[str], templates: Sequence[str], device: torch.device) -> Tensor:
    tokens = tokenizer([template.format(name) for name in names for template in templates])
    texts = normalize(model.encode_text(tokens.to(device)).float(), dim=-1)
    return normalize(torch.stack([rows.mean(0) for rows in texts.split(len(templates))]), dim=-1)
