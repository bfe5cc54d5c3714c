"""Tokenizers on disk: which token has which row, and a tokenizer with further tokens."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from byom.errors import CheckpointError
from byom.storage.folder import parsed

FAST, SETTINGS = "tokenizer.json", "tokenizer_config.json"
FILES = re.compile(
    r"tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt|bpe)"
    r"|merges\.txt|bpe\.codes|.*\.(model|tiktoken)|chat_template\.(jinja|json)|tokenization_\w+\.py"
)
"""Names of the files of a tokenizer."""
VOCABULARIES = re.compile(r"tokenizer\.json|vocab\.(json|txt|bpe)|.*\.(model|tiktoken)")
"""Those without which there is none."""


@dataclass(frozen=True)
class Tokenizer:
    """The tokens of a model.

    Args:
        folder: Where its files lie.
        ids: Token to id.
        added: Those that are matched in the text before it is cut into pieces, to how they are.
    """

    folder: Path
    ids: Mapping[str, int]
    added: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def tokens(self) -> dict[int, str]:
        """Id to token."""
        return {number: token for token, number in sorted(self.ids.items(), reverse=True)}

    @classmethod
    def open(cls, folder: Path | None) -> Tokenizer | None:
        """Read the tokenizer of a folder; None if it has none. No code of the folder is run.

        Raises:
            CheckpointError: If its files cannot be read.
        """
        if folder is None or not any(VOCABULARIES.fullmatch(file.name) for file in folder.iterdir()):
            return None
        try:
            return cls(folder, *(_fast(folder) if (folder / FAST).is_file() else _slow(folder)))
        except CheckpointError:
            raise
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":  # Rust's, of `tokenizers`
                raise
            why = str(error).partition("\n")[0]
            raise CheckpointError(
                f"the tokenizer in {folder} cannot be read ({why}). Save it again with transformers "
                "(tokenizer.save_pretrained), or remove its files, and rows are matched by their place"
            ) from error


def _fast(folder: Path) -> tuple[dict[str, int], dict[str, Any]]:
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / FAST))
    added = {str(each.content): each for each in tokenizer.get_added_tokens_decoder().values()}
    ids = tokenizer.get_vocab(with_added_tokens=True)
    for number, entry in (_settings(folder).get("added_tokens_decoder") or {}).items():
        ids.setdefault(entry["content"], int(number))
        added.setdefault(entry["content"], tokenizers.AddedToken(**_flags(entry)))
    return ids, added


def _slow(folder: Path) -> tuple[dict[str, int], dict[str, Any]]:
    tokenizer = _automatic(folder)
    added = {str(each.content): each for each in tokenizer.added_tokens_decoder.values()}
    return tokenizer.get_vocab(), added


def _automatic(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _settings(folder: Path) -> dict[str, Any]:
    file = folder / SETTINGS
    settings = parsed(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return settings if isinstance(settings, dict) else {}


def _flags(entry: Mapping[str, Any]) -> dict[str, Any]:
    known = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
    return {name: value for name, value in entry.items() if name in known}


def replaced(target: Path, source: Path) -> None:
    """Put the files of one tokenizer in the place of another's.

    Args:
        target: The folder that gets them.
        source: The folder that they are copied from.
    """
    for file in [file for file in target.iterdir() if FILES.fullmatch(file.name)]:
        file.unlink()
    for file in [file for file in source.iterdir() if FILES.fullmatch(file.name) and file.is_file()]:
        shutil.copyfile(file, target / file.name)


def extended(target: Path, own: Tokenizer, new: Sequence[tuple[str, Any]], ids: Mapping[str, int]) -> None:
    """Write a tokenizer with further tokens, in the order of their ids, as transformers opens it.

    Args:
        target: The folder.
        own: The tokenizer.
        new: Token, and how it is matched where a tokenizer added it.
        ids: Every token to the id that it has to have.

    Raises:
        CheckpointError: If tokens get other ids.
    """
    import tokenizers

    replaced(target, own.folder)
    tokens = [tokenizers.AddedToken(token, normalized=False) if how is None else how for token, how in new]
    if (target / FAST).is_file():
        file = str(target / FAST)
        fast = tokenizers.Tokenizer.from_file(file)
        fast.add_tokens(
            [own.added[t] for t in sorted(own.added, key=own.ids.__getitem__) if fast.token_to_id(t) is None]
        )
        fast.add_tokens(tokens)
        fast.save(file)
        _note(target, {ids[str(token.content)]: token for token in tokens})
    else:
        slow = _automatic(target)
        slow.add_tokens(tokens)
        slow.save_pretrained(target)
    found = Tokenizer.open(target)
    if found is None or dict(found.ids) != dict(ids):
        odd = sorted(set(ids.items()) ^ set({} if found is None else found.ids.items()), key=lambda pair: pair[1])
        raise CheckpointError(
            f"the tokenizer of {own.folder} gives new tokens other ids than their rows ({odd[0][0]!r}), as where its "
            "ids have gaps. Use vocabulary=base"
        )


def _note(folder: Path, tokens: Mapping[int, Any]) -> None:
    """List added tokens in the settings too, where they are listed there."""
    settings = _settings(folder)
    if "added_tokens_decoder" not in settings:
        return
    names = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    settings["added_tokens_decoder"] |= {
        str(number): {name: getattr(token, name) for name in names} for number, token in tokens.items()
    }
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (folder / SETTINGS).write_text(text, encoding="utf-8")
