"""The module of a folder as transformers builds it, without memory for values."""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import lru_cache
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


def is_outside(name: str, names: Collection[str], folder: Path | None) -> bool:
    """Say whether a tensor is outside of the model's body as transformers names it, and so is a head's.

    Args:
        name: The tensor's name.
        names: All names of the model.
        folder: Its folder; where transformers does not know its class, nothing is outside.
    """
    body = "" if folder is None else _body(folder)
    return bool(body) and not name.startswith(body) and any(other.startswith(body) for other in names)


@lru_cache(maxsize=64)
def _body(folder: Path) -> str:
    """Return what names of the body start with in a folder's class of transformers; empty if it is unknown."""
    import transformers

    names = configuration(folder / CONFIG).get("architectures") if (folder / CONFIG).is_file() else None
    name = names[0] if isinstance(names, list) and names else ""
    body = getattr(getattr(transformers, str(name), None), "base_model_prefix", "")
    return f"{body}." if body else ""


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
