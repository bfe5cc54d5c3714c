"""The module of a folder as transformers builds it, without memory for values."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from byom.folders.beside import CONFIG, configuration


def skeleton(folder: Path | None) -> nn.Module | None:
    """Return the module that a configuration describes, on the meta device; None where transformers knows none.

    Args:
        folder: A folder with a ``config.json``; custom code in it is not run.
    """
    if folder is None or not (folder / CONFIG).is_file():
        return None
    config = configuration(folder / CONFIG)
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    return None if not isinstance(name, str) else built(json.dumps(config), name)


def body(folder: Path | None, names: Collection[str]) -> str:
    """Return what the names of a model's body start with, as its class in transformers has it; others are a head's.

    Args:
        folder: The model's folder.
        names: The names of its tensors.

    Returns:
        The start with its dot; empty where transformers does not know the class, or no name starts so.
    """
    if folder is None or not (folder / CONFIG).is_file():
        return ""
    import transformers

    named = configuration(folder / CONFIG).get("architectures")
    model = getattr(transformers, str(named[0]), None) if isinstance(named, list) and named else None
    start = f"{getattr(model, 'base_model_prefix', '')}."
    return start if any(name.startswith(start) for name in names) else ""


def built(config: str, name: str) -> nn.Module | None:
    """Return a module of one of transformers' classes on the meta device; None if it cannot be built.

    Args:
        config: The configuration as JSON.
        name: The class.
    """
    import transformers

    settings: dict[str, Any] = json.loads(config)
    model = getattr(transformers, name, None)
    if model is None or "model_type" not in settings:
        return None
    try:
        configuration = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
        with torch.device("meta"):
            return model(configuration)
    except Exception:  # whatever a foreign configuration makes it raise: it cannot be built
        return None
