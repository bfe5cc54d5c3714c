"""Random crops of images in fine-tuning, drawn by example, cut and resized on the device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from byom.errors import OptionError
from byom.functional.seeding import keyed

SCALE = (0.9, 1.0)
RATIO = (3 / 4, 4 / 3)
TRIES = 10
REACH, SHARPNESS = 2.0, -0.5  # of the bicubic kernel that PIL and torchvision resize with
BOXES = "crop"
"""The name under which boxes travel with a batch's inputs."""


def boxes(count: int, inputs: dict[str, Tensor], *key: object) -> Tensor:
    """Draw a crop for every example of a split: 90 to 100 % of the area, sides as 3:4 to 4:3, at a random place.

    Args:
        count: Examples (N).
        inputs: The split's inputs.
        key: Seed and epoch; with an example's place in the split they determine its crop.

    Returns:
        Top, left, height and width, int64 ``[N, 4]``. As in torchvision, what fits into the image of ten draws is
        taken, and the whole image where nothing does.

    Raises:
        OptionError: If the examples are no images.
    """
    if "pixels" not in inputs:
        raise OptionError("finetune.augment=crop crops images, and these examples are texts; use finetune.augment=none")
    height, width = inputs["pixels"].shape[-2:]
    generator = torch.Generator().manual_seed(keyed(*key))
    drawn = torch.rand(count, 2, TRIES, generator=generator, dtype=torch.float64)
    area = height * width * (SCALE[0] + (SCALE[1] - SCALE[0]) * drawn[:, 0])
    low, high = map(math.log, RATIO)
    ratio = (low + (high - low) * drawn[:, 1]).exp()
    wide, tall = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (wide >= 1) & (wide <= width) & (tall >= 1) & (tall <= height)
    first = fits.double().argmax(1, keepdim=True)
    found = fits.any(1)
    tall = tall.gather(1, first)[:, 0].where(found, torch.tensor(float(height)).double())
    wide = wide.gather(1, first)[:, 0].where(found, torch.tensor(float(width)).double())
    place = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    top, left = (place[:, 0] * (height - tall + 1)).floor(), (place[:, 1] * (width - wide + 1)).floor()
    return torch.stack([top, left, tall, wide], 1).long()


def cropped(pixels: Tensor, box: Tensor) -> Tensor:
    """Return crops of images, resized to the images' size.

    This is the random resized crop that CLIP models are fine-tuned with, except that it sees the stored image: that is
    the original's shorter side resized and its middle cut out, so that no crop reaches what lies outside of the middle,
    and details are resized twice. Resizing is PIL's and torchvision's bicubic: a product with a matrix from each side.

    Args:
        pixels: uint8 ``[B, C, H, W]``.
        box: Top, left, height and width ``[B, 4]``.

    Returns:
        uint8 ``[B, C, H, W]``.
    """
    top, left, tall, wide = box.to(pixels.device).unbind(1)
    rows = _resizing(top, tall, pixels.shape[-2])
    columns = _resizing(left, wide, pixels.shape[-1])
    resized = rows[:, None] @ pixels.float() @ columns[:, None].transpose(-1, -2)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def _resizing(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Return what resizes ``length`` places from ``start`` on to ``size`` places, ``[B, size, size]``."""
    places = torch.arange(size, device=start.device, dtype=torch.float32)
    middle = (places + 0.5) * (length / size)[:, None] - 0.5  # [B, size]: where each new place lies in the crop
    inside = places - start[:, None]  # [B, size]: the old places, counted from the crop's first
    weights = _bicubic(middle[:, :, None] - inside[:, None, :])
    weights = weights * ((inside >= 0) & (inside < length[:, None]))[:, None, :]
    return weights / weights.sum(-1, keepdim=True)


def _bicubic(distance: Tensor) -> Tensor:
    x, a = distance.abs(), SHARPNESS
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return near.where(x < 1, far.where(x < REACH, torch.zeros_like(x)))
