"""Vocabularies of different size, made one by their tokenizers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from byom.folders.source import Source
from byom.weights import Weights


@dataclass(frozen=True)
class Vocabulary:
    """What was done about vocabularies.

    Args:
        notes: What a reader should know.
    """

    notes: tuple[str, ...] = ()


def agreed(
    mode: str, source: Source, base: Weights, sources: Mapping[str, Source], raws: Mapping[str, Weights]
) -> tuple[Weights, dict[str, Weights], Vocabulary]:
    """Give all models the rows of one vocabulary."""
    return base, dict(raws), Vocabulary()
