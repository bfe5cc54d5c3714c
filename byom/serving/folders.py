"""Bundles of folders: models that transformers builds, one encoder in memory, a head for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from byom.checkpoint.bundle import Bundle
from byom.errors import CheckpointError
from byom.pipeline.device import resolve
from byom.serving.model import Answer, Kind, Model, Served, classified, labelled
from byom.serving.options import Options
from byom.serving.queue import Key
from byom.serving.shells import ENDS, GENERATES, REFERENCE, Shell, Shells, brief

PROCESSORS = ("preprocessor_config.json", "processor_config.json")
LONGEST = 512
"""Tokens of a text where neither tokenizer nor configuration states a limit."""


class FolderModel(Model):
    """A merged model of transformers with one task's weights and head at a time.

    Args:
        folder: The bundle.
        bundle: Its weights.
        options: Device, batch and the length of generated texts.

    Raises:
        CheckpointError: If a configuration, head, tokenizer or image processor is missing, unknown or does not fit.
    """

    def __init__(self, folder: Path, bundle: Bundle, options: Options) -> None:
        self.folder, self.options, self.device = folder, options, resolve(options.device)
        shells = Shells.open(folder, bundle)
        self._shells = shells.of
        for shell in self._shells.values():
            shell.model.eval().to(self.device)
        self._handle = bundle.attach(shells.host, load=True, heads=False)
        self._inner: dict[str, Any] = dict(shells.base.named_parameters(remove_duplicate=False))
        self._held: Key = None
        self.tasks = {task: _served(task, shell.config) for task, shell in self._shells.items()}
        self._reads_images = next(iter(self.tasks.values())).input == "image"
        if len({task.input for task in self.tasks.values()}) > 1:
            raise CheckpointError(f"{folder} holds tasks on texts and tasks on images; pack them apart")
        self._open_inputs()

    @property
    def held(self) -> Key:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The task whose weights the model holds."""
        return self._held

    def switch(self, task: Key) -> None:
        """Give the encoder a task's weights, and what its head has inside of it; see `Model.switch`."""
        self._held = None
        self._handle.switch(task)
        if task is not None:
            with torch.no_grad():
                for name, value in self._shells[task].inside.items():
                    self._inner[name].copy_(value)
        self._held = task

    def prepare(self, item: Any) -> Any:
        """Return an image's pixels ``[C, H, W]``, a text as it is; see `Model.prepare`."""
        if not self._reads_images:
            return item
        return self.processor(images=item, return_tensors="pt")["pixel_values"][0]

    @torch.inference_mode()
    def predict(self, items: Sequence[Any]) -> list[Answer]:
        """Return what the held task's model makes of the items; see `Model.predict`."""
        assert self.held is not None
        shell, task = self._shells[self.held], self.tasks[self.held]
        if self._reads_images:
            dtype = next(shell.model.parameters()).dtype
            inputs, cut = {"pixel_values": torch.stack(list(items)).to(self.device, dtype)}, [False] * len(items)
        else:
            inputs, cut = self._tokens(items)
        answers = self._generated(shell, inputs) if task.kind == "generation" else _read(shell, inputs, task)
        return [one | ({"truncated": True} if long else {}) for one, long in zip(answers, cut, strict=True)]

    def _open_inputs(self) -> None:
        from transformers import AutoImageProcessor, AutoTokenizer

        place, config = str(self.folder / REFERENCE), next(iter(self._shells.values())).config
        try:
            if self._reads_images:
                if not any((self.folder / REFERENCE / name).is_file() for name in PROCESSORS):
                    raise FileNotFoundError(f"there is no {PROCESSORS[0]}")
                self.processor: Any = AutoImageProcessor.from_pretrained(place)
                return
            self.tokenizer: Any = AutoTokenizer.from_pretrained(place)
            if len(self.tokenizer) <= len(self.tokenizer.all_special_ids):  # transformers makes an empty one of nothing
                raise FileNotFoundError("its vocabulary is empty")
        except Exception as error:  # of many kinds, by what is missing or broken
            what = "image processor" if self._reads_images else "tokenizer"
            raise CheckpointError(
                f"{place} has no {what} that transformers can open ({brief(error)}); copy its files there from the "
                "base model's folder"
            ) from error
        generates = any(task.kind == "generation" for task in self.tasks.values())
        decodes = generates and not getattr(config, "is_encoder_decoder", False)
        self.tokenizer.padding_side = "left" if decodes else "right"
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        if self.tokenizer.pad_token is None:
            raise CheckpointError(f"the tokenizer in {place} has neither a padding nor an end token; name a pad_token")
        self.limit = _limit(self.tokenizer, config) - (self.options.max_new_tokens if decodes else 0)
        if self.limit < 1:
            raise CheckpointError(
                f"{place} reads {self.limit + self.options.max_new_tokens} tokens, which leaves no room for "
                f"max_new_tokens={self.options.max_new_tokens} new ones; serve with fewer"
            )

    def _tokens(self, texts: Sequence[str]) -> tuple[dict[str, Tensor], list[bool]]:
        rows = self.tokenizer(list(texts), padding=True, truncation=True, max_length=self.limit, return_tensors="pt")
        lengths = rows["attention_mask"].sum(1).tolist()
        cut = [
            n >= self.limit and len(self.tokenizer(text, verbose=False)["input_ids"]) > self.limit
            for text, n in zip(texts, lengths, strict=True)
        ]
        return {name: rows[name].to(self.device) for name in rows}, cut

    def _generated(self, shell: Shell, inputs: Mapping[str, Tensor]) -> list[Answer]:
        model: Any = shell.model
        known = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        tokens = model.generate(
            **known, max_new_tokens=self.options.max_new_tokens, do_sample=False, num_beams=1, temperature=None,
            top_p=None, top_k=None, pad_token_id=self.tokenizer.pad_token_id,
        )  # fmt: skip
        if not getattr(shell.config, "is_encoder_decoder", False):
            tokens = tokens[:, known["input_ids"].shape[1] :]
        return [{"text": text} for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


def _read(shell: Shell, inputs: Mapping[str, Tensor], task: Served) -> list[Answer]:
    output = shell.model(**inputs)
    if task.kind == "features":
        states = output.last_hidden_state.float()
        if "attention_mask" in inputs:
            weight = inputs["attention_mask"].unsqueeze(-1).float()
            rows = (states * weight).sum(1) / weight.sum(1)
        else:
            rows = states.flatten(2).mean(-1) if states.ndim == 4 else states.mean(1)
        return [{"features": row} for row in rows.cpu().tolist()]
    logits = output.logits.float().cpu()
    if task.kind == "regression":
        return [{"value": row[0] if len(row) == 1 else row} for row in logits.tolist()]
    return labelled(task.labels, logits.sigmoid()) if task.kind == "multi_label" else classified(
        task.labels, logits.softmax(-1)
    )  # fmt: skip


def _served(task: str, config: Any) -> Served:
    name = str(config.architectures[0])
    reads: Any = "image" if name.endswith("ForImageClassification") or hasattr(config, "num_channels") else "text"
    if name.endswith(GENERATES):
        return Served(task, "generation", "text")
    if not name.endswith(ENDS):
        return Served(task, "features", reads)
    kind: Kind = "classification"
    if config.problem_type == "regression" or config.num_labels == 1:
        return Served(task, "regression", reads)
    if config.problem_type == "multi_label_classification":
        kind = "multi_label"
    labels = tuple(str(config.id2label[place]) for place in range(config.num_labels))
    if len(set(labels)) < len(labels):
        raise CheckpointError(f"two classes of task '{task}' have one name in id2label of its config.json; rename one")
    return Served(task, kind, reads, labels)


def _limit(tokenizer: Any, config: Any) -> int:
    positions = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if positions and "roberta" in config.model_type:  # positions are counted from behind the padding index
        positions -= config.pad_token_id + 1
    stated = [n for n in (tokenizer.model_max_length, positions) if n and n < 1e9]
    return int(min(stated)) if stated else LONGEST
