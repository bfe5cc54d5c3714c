"""Models and tokenizers through transformers: from a hub, a folder or an installed package."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from byom.backbone.base import Backbone
from byom.data.source.package import Package
from byom.errors import CheckpointError, listed
from byom.storage import repository as hub
from byom.storage.contents import content_digest
from byom.storage.repository import Download

TOKENIZERS = (".json", ".txt", ".model")
"""Ends of the files of tokenizers, small ones all."""
BESIDE = re.compile(r"README|training_args|trainer_state|optimizer|scheduler|scaler|rng_state(_\d+)?")
"""Files next to weights that are not read."""


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

    def contents(self, cache: Path | None = None) -> str | None:
        """Return the digest of a local folder's files, or the commit that is used; see `Backbone.contents`."""
        return self._contents(cache, lambda file: not BESIDE.fullmatch(file.stem))

    def tokenizer_contents(self) -> dict[str, str]:
        """Return what tells the tokenizer's files from others of the same name, to go with `encoding`."""
        found = self._contents(None, lambda file: file.suffix in TOKENIZERS)
        return {} if found is None else {"files": found}

    def _contents(self, cache: Path | None, read: Callable[[Path], bool]) -> str | None:
        place = self.checkpoint
        if where := self._repository():
            return None if where.pinned else hub.current(where)
        if isinstance(place, Package) and place.sha256:
            return None
        folder = place.folder() if isinstance(place, Package) else Path(place)
        names = [f.name for f in folder.iterdir() if f.is_file() and f.name[0] != "." and read(f)]
        return content_digest(folder, names, cache, CheckpointError)

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
