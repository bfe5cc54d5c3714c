"""Vision transformers through timm."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from byom.backbone.base import Backbone, fill
from byom.data.source.package import Package
from byom.data.suite import Task
from byom.errors import CheckpointError
from byom.storage.contents import content_digest


class PixelEncoder(nn.Module):
    """An image encoder that takes 8-bit pixels; the normalisation is part of it, not of the data.

    Args:
        visual: Module from normalised pixels ``[B, 3, H, W]`` to features ``[B, D]``.
        mean: Channel means in [0, 1].
        std: Channel standard deviations in [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, visual: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.visual = visual
        self.register_buffer("mean", 255 * torch.tensor(mean).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(std).reshape(3, 1, 1), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """Return features ``[B, D]`` of uint8 pixels ``[B, 3, H, W]``."""
        return self.visual((pixels.float() - self.mean) / self.std)


@dataclass(frozen=True)
class Vit(Backbone):
    """A timm vision transformer without its classifier, on images resized to a square.

    Args:
        model: timm's architecture name.
        image_size: Side of the input in pixels; position embeddings are resized to it.
        checkpoint: A file, an installed package that holds `file`, the word ``hub`` for timm's own weights, or
            ``random`` for untrained ones (tests).
        file: File inside the package.
        learning_rate: For full fine-tuning; 1e-4 was seen to destroy mergeability.
        temperature: Factor on the cosine of prototype heads.
    """

    model: str = "vit_small_patch14_reg4_dinov2"
    image_size: int = 56
    checkpoint: Package | str = "hub"
    file: str = ""
    learning_rate: float = 2e-5
    temperature: float = 20.0

    modality = "image"
    inner = "visual."

    @property
    def encoding(self) -> dict[str, Any]:
        """Square size and resampling."""
        return {"kind": "pixels", "image_size": self.image_size, "resample": "bicubic"}

    @property
    def hub_name(self) -> str:
        """The name of the model in timm."""
        return self.model

    def encode(self, inputs: Sequence[Image.Image], task: Task | None = None) -> dict[str, Tensor]:
        """Return ``pixels`` uint8 ``[N, 3, S, S]``."""
        side = (self.image_size, self.image_size)
        rows = [np.asarray(image.convert("RGB").resize(side, Image.Resampling.BICUBIC)) for image in inputs]
        return {"pixels": torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous()}

    def contents(self, cache: Path | None = None) -> str | None:
        """Return the digest of a file that nothing was promised of; see `Backbone.contents`."""
        if self.checkpoint in ("hub", "random") or (isinstance(self.checkpoint, Package) and self.checkpoint.sha256):
            return None
        file = _located(self.checkpoint, self.file)
        return content_digest(file.parent, [file.name], cache, CheckpointError)

    def load(self) -> nn.Module:
        """Build the timm model and load its weights; see `Backbone.load`."""
        import timm

        torch.manual_seed(0)
        visual = _create(timm, self.model, self.image_size, pretrained=self.checkpoint == "hub")
        if self.checkpoint not in ("hub", "random"):
            self._read_into(visual)
        config: Any = visual.pretrained_cfg
        return PixelEncoder(visual, config["mean"], config["std"]).eval()

    def _read_into(self, visual: nn.Module) -> None:
        from timm.models.vision_transformer import checkpoint_filter_fn

        path = _located(self.checkpoint, self.file)
        state = checkpoint_filter_fn(read_state(path), visual)  # pyright: ignore[reportArgumentType]
        expected = visual.state_dict()
        fill(visual, {name: state[name] for name in expected if name in state}, str(path))


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a PyTorch state dict without executing anything stored in the file.

    Args:
        path: A ``.pt``, ``.pth`` or ``.bin`` file.

    Returns:
        Name to tensor.

    Raises:
        CheckpointError: If the file is missing or is not a plain state dict.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{path} cannot be read as a plain state dict: {error}") from error
    return state.get("state_dict", state)


def _located(checkpoint: Package | str, file: str) -> Path:
    if not isinstance(checkpoint, Package):
        return Path(checkpoint)
    checkpoint.digest([file])
    return checkpoint.folder() / file


def _create(timm: Any, model: str, image_size: int, *, pretrained: bool) -> nn.Module:
    try:
        return timm.create_model(model, pretrained=pretrained, num_classes=0, img_size=image_size)
    except Exception as error:
        raise CheckpointError(
            f"timm cannot build '{model}' with pretrained={pretrained} ({type(error).__name__}: {error}). "
            "Check the name and the network, or give backbone.checkpoint a file"
        ) from error
