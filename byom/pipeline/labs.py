"""The lab of a run, and the keeper through which consecutive runs share one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from byom.pipeline.lab import Lab
from byom.storage.signature import signature

if TYPE_CHECKING:
    from byom.pipeline.settings import Settings


def laboratory(settings: Settings) -> Lab:
    """Return a new lab for a run; nothing is loaded before it is asked for."""
    s = settings
    return Lab(
        s.suite, s.backbone, s.finetune, s.experts, s.seed, s.cache, s.device, s.evaluate.batch_size, s.precision
    )


class Labs:
    """Keeps the lab of the latest run, and hands it to the next one if both agree in everything that a lab is made of.

    A lab holds an encoder, data and models in memory, so there is never more than one. It ends when another is
    needed, or with `close`; a ``with`` block closes.
    """

    def __init__(self) -> None:
        self._held: dict[str, Lab] = {}

    def of(self, settings: Settings) -> Lab:
        """Return the lab of a run."""
        s = settings
        how = [s.device, s.precision, s.evaluate.batch_size, s.finetune.micro_batch]  # signatures leave some of it out
        key = signature(s.suite, s.backbone, s.finetune, s.experts, s.seed, s.cache, how, s.contents)
        if key not in self._held:
            self.close()  # first: memory may not hold two
            self._held[key] = laboratory(settings)
        return self._held[key]

    def close(self) -> None:
        """Let the lab go, with all that it holds in memory."""
        self._held.clear()

    def __enter__(self) -> Labs:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
