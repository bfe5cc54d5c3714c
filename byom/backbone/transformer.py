"""Models and tokenizers through transformers: from a hub, a folder or an installed package."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from byom.backbone.base import Backbone
from byom.data.source.package import Package
from byom.errors import CheckpointError, listed
from byom.storage import repository as hub
from byom.storage.repository import Download


class Pretrained(Backbone):
    """A backbone that transformers builds from a checkpoint."""

    checkpoint: Package | str
    revision: str

    def downloads(self) -> Iterator[Download]:
        """Say what would have to be fetched from a hub."""
        if where := self._repository():
            yield hub.download(f"backbone {where.name}", where, [hub.WEIGHTS])

    def fetch(self) -> None:
        """Bring weights and tokenizer to this machine."""
        if where := self._repository():
            hub.fetch(where, hub.WEIGHTS)

    @property
    def hub_name(self) -> str:
        """The checkpoint; a model inside a data package is called as the package is."""
        place = self.checkpoint
        return f"{place.name}=={place.version}" if isinstance(place, Package) else place

    def _repository(self) -> hub.Repository | None:
        if isinstance(self.checkpoint, Package) or Path(self.checkpoint).is_dir():
            return None
        return hub.Repository(self.checkpoint, self.revision)

    def _where(self) -> str:
        if isinstance(self.checkpoint, Package):
            return f"{self.checkpoint.name}=={self.checkpoint.version}"
        return f"{self.checkpoint}@{self.revision}"

    def _model(self, auto: Any, **options: Any) -> Any:
        """Load a model; a tensor that the checkpoint lacks is an error, for it would start at random."""
        model, notes = self._from(auto, dtype=torch.float32, output_loading_info=True, **options)
        if lost := sorted(notes["missing_keys"]):
            raise CheckpointError(
                f"{self._where()} lacks {len(lost)} tensors of {type(model).__name__}: {listed(lost)}; "
                "choose a checkpoint of this architecture"
            )
        return model

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
