"""A CLIP of two layers, or as many as asked for, in open_clip's and in transformers' terms."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path

NAME = "byom-tiny"
WIDTH, LAYERS, HEADS, PATCH, SIDE, EMBEDDING = 64, 2, 4, 16, 32, 32
SIZES = {
    "hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
    "image_size": SIDE, "patch_size": PATCH, "projection_dim": EMBEDDING,
}  # fmt: skip
CONFIG = {
    "embed_dim": EMBEDDING,
    "quick_gelu": True,
    "vision_cfg": {
        "image_size": SIDE, "layers": LAYERS, "width": WIDTH, "head_width": WIDTH // HEADS, "patch_size": PATCH,
    },
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}  # fmt: skip


@cache
def tiny_clip(layers: int = LAYERS) -> str:
    """Make open_clip know the architecture with some layers in its image tower, and return its name."""
    import open_clip

    name = NAME if layers == LAYERS else f"{NAME}-{layers}"
    file = Path(tempfile.mkdtemp()) / f"{name}.json"
    file.write_text(json.dumps(CONFIG | {"vision_cfg": CONFIG["vision_cfg"] | {"layers": layers}}), encoding="utf-8")
    open_clip.add_model_config(file)
    return name
