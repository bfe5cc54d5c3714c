"""Bundles of every kind, opened to be served."""

from __future__ import annotations

import json
from pathlib import Path

from byom.checkpoint.bundle import Bundle
from byom.errors import CheckpointError
from byom.serving.model import Model
from byom.serving.options import Options


def open_bundle(folder: Path, options: Options) -> Model:
    """Return a bundle's model, ready to answer.

    Args:
        folder: The bundle.
        options: Device, batch and lengths.

    Raises:
        CheckpointError: If it is not a bundle, is damaged, or lacks what predicts.
    """
    bundle = Bundle.open(folder)
    kind = json.loads((folder / "bundle.json").read_text(encoding="utf-8")).get("kind")
    if not bundle.deltas:
        raise CheckpointError(f"{folder} holds no task; pack it again with one or more")
    if kind == "folders":
        from byom.serving.folders import FolderModel

        return FolderModel(folder, bundle, options)
    if not (folder / "serve.json").is_file():
        raise CheckpointError(
            f"{folder} holds weights alone: it has no serve.json, which says how inputs reach the encoder and which "
            "heads read it. Pack it again with this version: byom pack FOLDER suite=... merge=... byom=..., or byom "
            "pack FOLDER base=... experts=[...]"
        )
    from byom.serving.suite import SuiteModel

    return SuiteModel(folder, bundle, options)
