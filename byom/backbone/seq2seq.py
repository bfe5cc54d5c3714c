"""Models that answer in words, through transformers: T5, Flan-T5 and their relatives."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from byom.backbone.base import Reader
from byom.backbone.transformer import Pretrained
from byom.data.source.package import Package
from byom.data.splits import Split
from byom.data.suite import Task
from byom.errors import DataError, OptionError, positive, suggest, whole
from byom.functional.heads import Answers

NO_TOKEN = -100
BUDGET = 1 << 26  # logits held at a time: 256 MB in fp32
KINDS = ("scored", "generated")


class Answering(nn.Module):
    """An encoder-decoder with one number per answer in place of features.

    Args:
        model: A transformers model with a language modelling head.
        tokenizer: Turns generated tokens into text.
        answer: See `Seq2Seq`.
        max_new_tokens: See `Seq2Seq`.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, answer: str, max_new_tokens: int) -> None:
        super().__init__()
        self.model: Any = model
        self.tokenizer = tokenizer
        self.answer = answer
        self.max_new_tokens = max_new_tokens

    def forward(self, input_ids: Tensor, attention_mask: Tensor, answers: Tensor) -> Tensor:
        """Return what `byom.functional.heads.Answers` reads.

        Args:
            input_ids: ``[B, S]``.
            attention_mask: ``[B, S]``.
            answers: Token ids ``[B, C, L]``, the same for every example, filled up with -100.

        Returns:
            Log-likelihoods ``[B, C]``, or in generation ``[B, C + 2]``. Text is generated in evaluation alone, that is
            under ``torch.inference_mode()``: whatever differentiates, or looks at features, gets log-likelihoods.
        """
        if self.answer == "generated" and torch.is_inference_mode_enabled() and not self.training:
            return self._generated(input_ids, attention_mask, answers[0])
        states = self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        row = math.prod((answers.shape[0], answers.shape[2], self.model.config.vocab_size))
        parts = answers.long().split(max(1, BUDGET // row), 1)
        return torch.cat([self._scored(states, attention_mask, part) for part in parts], 1)

    def _scored(self, states: Tensor, mask: Tensor, answers: Tensor) -> Tensor:
        """Return log-likelihoods ``[B, C]``: encoder states are repeated, and answers decoded side by side."""
        count = answers.shape[1]
        targets = answers.flatten(0, 1)
        config = self.model.config
        inputs = torch.cat([torch.full_like(targets[:, :1], config.decoder_start_token_id), targets[:, :-1]], 1)
        logits = self.model(
            encoder_outputs=(states.repeat_interleave(count, 0),),
            attention_mask=mask.repeat_interleave(count, 0),
            decoder_input_ids=inputs.masked_fill(inputs == NO_TOKEN, config.pad_token_id),
            use_cache=False,
        ).logits
        losses = cross_entropy(logits.float().transpose(1, 2), targets, ignore_index=NO_TOKEN, reduction="none")
        return -losses.sum(1).unflatten(0, (-1, count))

    def _generated(self, input_ids: Tensor, attention_mask: Tensor, answers: Tensor) -> Tensor:
        tokens = self.model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            num_beams=1,
        )
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        known = [self.tokenizer.decode(row[row != NO_TOKEN].tolist(), skip_special_tokens=True) for row in answers]
        places = torch.tensor([known.index(text) if text in known else len(known) for text in texts])
        numbers = torch.tensor([[_number(text)] for text in texts])
        return torch.cat([one_hot(places, len(known) + 1).float(), numbers], 1).to(input_ids.device)


@dataclass(frozen=True)
class Seq2Seq(Pretrained):
    """A transformers encoder-decoder that is merged as a whole and answers prompts with the names of classes.

    Args:
        checkpoint: A hub id, a folder, or a folder in an installed package.
        revision: Commit of a hub id.
        max_length: Longest prompt in tokens; the rest is cut off.
        answer: ``scored`` takes the answer that the model finds likeliest: log-probabilities of its tokens, the end of
            sequence included, are summed and not divided by their number, so it is the likeliest of all answers as
            they would be generated. ``generated`` takes the text of greedy decoding, which is right only if it is
            the right answer to the letter. Methods that look at the entropy of outputs see that among the answers
            either way; it says nothing of other texts, which a model may then generate.
        max_new_tokens: When generation stops, the end of sequence included.
        learning_rate: For full fine-tuning.

    Raises:
        OptionError: If a value is out of range.

    References:
        Scaling Instruction-Finetuned Language Models. https://arxiv.org/abs/2210.11416

    Differences:
        FusionBench (https://github.com/tanganke/fusion_bench) generates at most 9 tokens and compares decoded texts,
        as ``generated`` does; a number that cannot be read is 0 there and here, and here also one that is not finite.
        Its labels of STS-B are rounded to one decimal before the correlation is taken; here they are not.
        It hands ``generate`` no attention mask, which transformers 4 derived from padding and 5 does not, so that its
        figures fall with transformers 5; here the mask is given, and answers are those of 4.57 in both.
        ``scored`` meets no text that is not an answer, so it may be above what is published.
    """

    checkpoint: Package | str = "google/flan-t5-base"
    revision: str = "main"
    max_length: int = 512
    answer: Literal["scored", "generated"] = "generated"
    max_new_tokens: int = 9
    learning_rate: float = 5e-5

    answers = True
    modality = "text"
    inner = "model."
    reads_shots = False

    def __post_init__(self) -> None:
        if self.answer not in KINDS:
            raise OptionError(f"backbone.answer={self.answer!r}; {suggest(self.answer, KINDS)}")
        whole("backbone.max_length", self.max_length, 1)
        whole("backbone.max_new_tokens", self.max_new_tokens, 1)
        positive("backbone.learning_rate", self.learning_rate, "1e-4")

    @property
    def encoding(self) -> dict[str, Any]:
        """Tokenizer and length."""
        encoding = {"kind": "prompts", "tokenizer": self._where(), "max_length": self.max_length}
        return encoding | self.tokenizer_contents()

    def encoding_for(self, task: Task) -> Mapping[str, Any]:
        """Return tokenizer and length, and the task's prompt and answers."""
        return self.encoding | {"prompt": task.prompt, "answers": list(task.classes)}

    def encode(self, inputs: Sequence[str | Mapping[str, str]], task: Task | None = None) -> dict[str, Tensor]:
        """Put examples into the task's prompt and tokenise them.

        Args:
            inputs: Rows (column to text), or strings where the prompt has one place.
            task: Its prompt has columns in braces, ``{}`` or ``{text}`` for a string; its classes are the answers.

        Returns:
            ``input_ids`` and ``attention_mask``, int64 ``[N, max_length]``, and ``answers``, int32 ``[N, C, L]``:
            token ids of every answer with the end of sequence, the same for every example, filled up with -100.

        Raises:
            DataError: If the task has no prompt, a row lacks a column of it, or two answers have the same tokens.
        """
        return self.reader().encode(inputs, task)

    def reader(self) -> Reader:
        """Return `encode` with one tokenizer for all calls."""
        from transformers import AutoTokenizer

        tokenizer = self._from(AutoTokenizer)

        def tokens(row: str | Mapping[str, str], task: Task | None) -> int:
            return len(tokenizer(_rendered(self._prompted(task), row), verbose=False)["input_ids"])

        return Reader(lambda inputs, task: self._tokenised(tokenizer, inputs, task), tokens, self.max_length)

    def _prompted(self, task: Task | None) -> Task:
        if task is None or not task.prompt:
            name = task.name if task else "given"
            raise DataError(
                f'task {name} has no prompt, and {type(self).__name__} reads prompts; add e.g. prompt: "Is this '
                'sentence positive or negative? {text}" to its yaml, with the columns of its source in braces'
            )
        return task

    def _tokenised(
        self, tokenizer: Any, inputs: Sequence[str | Mapping[str, str]], given: Task | None
    ) -> dict[str, Tensor]:
        task = self._prompted(given)
        texts = [_rendered(task, row) for row in inputs]
        rows = tokenizer(
            texts or [""], padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        answers = _answers(tokenizer, task).expand(len(texts), -1, -1)
        return {name: rows[name][: len(texts)] for name in ("input_ids", "attention_mask")} | {"answers": answers}

    def require_features(self) -> None:
        """Refuse comparisons of features where text is generated; see `Backbone.require_features`."""
        if self.answer == "generated":
            raise OptionError(
                "this method compares features, and generated answers have none; set backbone.answer=scored"
            )

    def load(self) -> nn.Module:
        """Build the model with its pre-trained weights; see `Backbone.load`."""
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

        model = self._model(AutoModelForSeq2SeqLM)
        return Answering(model, self._from(AutoTokenizer), self.answer, self.max_new_tokens).eval()

    def head(self, encoder: nn.Module, task: Task, shots: Split | None) -> Answers:
        """Make what reads the model's numbers; nothing is learned, so neither encoder nor shots are used.

        Raises:
            DataError: If labels are numbers and a class's name is not a number.
        """
        if not task.regression:
            return Answers(torch.arange(len(task.classes)))
        try:
            return Answers(torch.tensor([float(name) for name in task.classes]))
        except ValueError as error:
            raise DataError(
                f"the labels of task {task.name} are numbers, so its classes must be the numbers that can be answered, "
                f"such as '0.0', '0.2' ... '5.0' ({error})"
            ) from error


def _rendered(task: Task, row: str | Mapping[str, str]) -> str:
    if not any(field is not None for _, field, *_ in Formatter().parse(task.prompt)):
        raise DataError(f"the prompt of task {task.name} has no column in braces: {task.prompt!r}")
    try:
        return task.prompt.format(row, text=row) if isinstance(row, str) else task.prompt.format(**row)
    except (KeyError, IndexError) as error:
        columns = "one text, which is {} or {text} in a prompt" if isinstance(row, str) else f"the columns {list(row)}"
        raise DataError(
            f"the prompt of task {task.name} asks for {error}, and its source gives {columns}; correct either"
        ) from error


def _answers(tokenizer: Any, task: Task) -> Tensor:
    rows = [torch.tensor(ids, dtype=torch.int32) for ids in tokenizer(list(task.classes))["input_ids"]]
    if len({tuple(row.tolist()) for row in rows}) < len(rows):
        raise DataError(f"classes of task {task.name} have the same tokens: {list(task.classes)}; rename one of them")
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=NO_TOKEN)


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        return 0.0
    return value if math.isfinite(value) else 0.0
