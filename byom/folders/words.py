"""The tokens of a joint vocabulary: whether two agree, and the files that state them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from byom.errors import CheckpointError, listed
from byom.folders.beside import CONFIG, configuration
from byom.folders.source import Source
from byom.storage.tokens import SETTINGS, Tokenizer, extended, replaced

GENERATION, TEMPLATE = "generation_config.json", "chat_template.jinja"
IDS = re.compile(r"token_(ids?|index)$|suppress_tokens$|^bad_words_ids$")
"""Settings that are tokens' ids."""
LEAST = 0.5
"""Share of rows with one token in both, below which two vocabularies of one size are different ones."""


class Model(Protocol):
    """What is asked of a model here."""

    @property
    def source(self) -> Source:
        """Where it lies."""
        ...

    @property
    def rows(self) -> int:
        """The rows of its tables."""
        ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """Its tokens."""
        ...


@dataclass(frozen=True)
class Words:
    """The tokens of a result.

    Args:
        mode: ``base`` or ``union``.
        base: The base's folder and tokenizer.
        models: The folder of each model to the rows of its tables and its tokenizer.
        ids: Token to row.
        new: Tokens that the base lacks, in the order of their rows, and how they are matched in a text.
        rows: The rows of the tables.
        untied: Whether tables that the base ties are not tied in the result.
    """

    mode: str
    base: Tokenizer | None
    models: Mapping[Path, tuple[int, Tokenizer | None]]
    ids: Mapping[str, int]
    new: Sequence[tuple[str, Any]]
    rows: int
    untied: bool = False
    home: Path | None = field(default=None)

    @classmethod
    def of(
        cls,
        mode: str,
        base: Model,
        experts: Sequence[Model],
        ids: Mapping[str, int],
        new: Sequence[tuple[str, Any]],
        rows: int,
        *,
        untied: bool = False,
    ) -> Words:
        """Collect them from models."""
        models = {m.source.folder: (m.rows, m.tokenizer) for m in (base, *experts) if m.source.folder is not None}
        return cls(mode, base.tokenizer, models, ids, new, rows, untied, base.source.folder)

    def write(self, folder: Path, place: Path) -> None:
        """Change the files of a tokenizer and the configurations that were copied from a model's folder.

        Raises:
            CheckpointError: If a configuration names a token that there is no more.
        """
        if place not in self.models:  # a model without tokens
            return
        for name in (CONFIG, GENERATION):
            if (folder / name).is_file():
                self._configure(folder / name, place, is_model=name == CONFIG)
        if place == self.home and not self.new:
            return
        if self.base is None:
            self._require_rows(place)
            return
        template = _template(folder)
        if self.new:
            extended(folder, self.base, self.new, self.ids)
        else:
            replaced(folder, self.base.folder)
        if self.mode == "union" and template:
            (folder / TEMPLATE).write_text(template, encoding="utf-8")

    def _require_rows(self, place: Path) -> None:
        """Refuse a tokenizer that has tokens beyond the rows, where the base has none to take its place."""
        tokenizer = self.models[place][1]
        ids = {} if tokenizer is None else tokenizer.ids
        if beyond := [token for token, row in ids.items() if row >= self.rows]:
            raise CheckpointError(
                f"the tokenizer in {place} has tokens without a row in the base ({listed(beyond)}), and the base has "
                "no tokenizer. Put its files beside the base's weights"
            )

    def _configure(self, file: Path, place: Path, *, is_model: bool) -> None:
        rows, tokenizer = self.models[place]
        config, counted = configuration(file), []

        def changed(node: dict[str, Any]) -> dict[str, Any]:
            return {key: value(key, entry) for key, entry in node.items()}

        def value(key: str, entry: Any) -> Any:
            if isinstance(entry, dict):
                return changed(entry)
            if key == "vocab_size" and entry == rows:
                counted.append(key)
                return self.rows
            if IDS.search(key):
                return self._renumbered(entry, key, place, tokenizer)
            return entry

        config = changed(config)
        if is_model and not counted:
            if "vocab_size" in config:
                raise CheckpointError(
                    f"{place / CONFIG} declares vocab_size={config['vocab_size']}, and the embedding has {rows} rows: "
                    "one of them is wrong. Correct vocab_size there"
                )
            config["vocab_size"] = self.rows
        if is_model and self.untied:
            config["tie_word_embeddings"] = False
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def _renumbered(self, number: Any, key: str, place: Path, tokenizer: Tokenizer | None) -> Any:
        """Return the id of the same token in the result; of a list, those of its entries."""
        if isinstance(number, list):
            return [self._renumbered(each, key, place, tokenizer) for each in number]
        if place == self.home or type(number) is not int or number < 0:
            return number
        token = None if tokenizer is None else tokenizer.tokens.get(number)
        if token is None or not self.ids:
            if number < self.rows:
                return number
            token = token or f"row {number}"
        if token not in self.ids:
            raise CheckpointError(
                f"{place / CONFIG}: {key} is {number} ({token!r}), and the vocabulary of the result has no such token. "
                "Use vocabulary=union, or files=base"
            )
        return self.ids[token]


def _template(folder: Path) -> str:
    """Return the chat template that was copied into a folder."""
    file = folder / TEMPLATE
    if file.is_file():
        return file.read_text(encoding="utf-8")
    settings = configuration(folder / SETTINGS) if (folder / SETTINGS).is_file() else {}
    template = settings.get("chat_template")
    return template if isinstance(template, str) else ""


def require_one_order(ours: Mapping[str, int], theirs: Mapping[str, int], both: str, task: str) -> list[str]:
    """Refuse tables of one size whose rows belong to different tokens.

    A row whose token is called otherwise in the other model, as reserved ones are, or has no token there, is no
    contradiction; a token that both have in different rows is one.

    Args:
        ours: The base's tokens to their rows.
        theirs: The expert's.
        both: What messages call the two.
        task: The expert's name.

    Returns:
        What a reader should know of tokens that are called otherwise.

    Raises:
        CheckpointError: Naming the first token whose rows differ.
    """
    moved = [token for token in ours.keys() & theirs.keys() if ours[token] != theirs[token]]
    remedy = "vocabulary=base matches rows by token, and so does vocabulary=union, which has every model's"
    if moved:
        token = min(moved, key=ours.__getitem__)
        raise CheckpointError(
            f"{both} have tokenizers of different order: {token!r} has row {ours[token]} in the base and "
            f"{theirs[token]} in {task}, and {len(moved)} tokens have other rows. {remedy}"
        )
    same = len(ours.keys() & theirs.keys())
    if same < LEAST * min(len(ours), len(theirs)):
        only = min(theirs.keys() - ours.keys(), key=theirs.__getitem__)
        raise CheckpointError(
            f"{both} have different tokenizers: {same} tokens are in both, and row {theirs[only]} belongs to {only!r} "
            f"in {task} alone. {remedy}"
        )
    if more := sorted(theirs.keys() - ours.keys(), key=theirs.__getitem__):
        return [
            f"{task}: {len(more)} tokens are called otherwise than the base's or new, and merged by row: {listed(more)}"
        ]
    return []
