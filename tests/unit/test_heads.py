"""Heads against transformers' own classifiers, against scikit-learn, and through their stored form."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from byom.backbone.encoder import Encoder, PooledEncoder
from byom.data.source.table import Table
from byom.data.splits import Split
from byom.data.suite import Task
from byom.errors import CheckpointError, DataError
from byom.functional import heads
from byom.functional.heads import Answers, Classifier, Head, Regression
from tests.tiny_t5 import tokenizer as words

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
    "max_position_embeddings": 30, "pad_token_id": 0,
}  # fmt: skip
PAIRS = [{"a": "it was a good film", "b": "fine"}, {"a": "poor", "b": "a bad day and a bad mood"}]


def task(**changes):
    return replace(Task("pairs", Table("x", {"train": "x.csv"}), "text", ("no", "yes", "maybe")), **changes)


@pytest.fixture(scope="module", params=["Roberta", "Bert"])
def classifier(request):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{request.param}Config")(**SIZES, num_labels=3)
    return getattr(transformers, f"{request.param}ForSequenceClassification")(config).eval(), request.param.lower()


def own_tensors(model, prefix):
    state = {name.removeprefix(f"{prefix}."): value for name, value in model.state_dict().items()}
    return {name: value for name, value in state.items() if name.startswith(("classifier.", "pooler."))}


def test_a_checkpoints_own_classifier_gives_its_own_logits(classifier):
    model, prefix = classifier
    backbone = Encoder("x", pooling="cls")
    head = backbone.own_head(task(), own_tensors(model, prefix) | {"lm_head.bias": torch.zeros(1)})
    inputs = {"input_ids": torch.tensor([[4, 5, 6, 7]]), "attention_mask": torch.ones(1, 4, dtype=torch.int64)}
    features = PooledEncoder(getattr(model, prefix), "cls")(**inputs)
    assert torch.allclose(head(features), model(**inputs).logits, atol=1e-6)
    assert head.predict(head(features)).tolist() == model(**inputs).logits.argmax(-1).tolist()


def test_a_classifier_that_does_not_fit_is_refused(classifier):
    tensors = own_tensors(*classifier)
    backbone = Encoder("x", pooling="cls")
    last = list(tensors)[-1]
    with pytest.raises(CheckpointError, match="lacks "):
        backbone.own_head(task(), {name: value for name, value in tensors.items() if name != last})
    with pytest.raises(CheckpointError, match="3 outputs where the task has 1"):
        backbone.own_head(task(metric="pearson_spearman"), tensors)
    with pytest.raises(CheckpointError, match="do not fit together"):
        backbone.own_head(task(), tensors | {last: torch.zeros(4)})
    with pytest.raises(CheckpointError, match=r"pooling=mean"):
        Encoder("x", pooling="mean").own_head(task(), tensors)
    assert backbone.own_head(task(), {"lm_head.bias": torch.zeros(1)}) is None


def test_one_output_is_a_number_and_learns_by_squared_error():
    head = Classifier(torch.eye(2), torch.zeros(2), torch.ones(1, 2), torch.zeros(1))
    values = head(torch.tensor([[0.0, 0.0], [9.0, 9.0]]))
    assert head.predict(values).tolist() == pytest.approx([0, 2])
    assert float(head.loss(values, torch.tensor([1.0, 2.0]))) == pytest.approx(0.5)


def test_the_ridge_is_scikit_learns_and_keeps_the_splits_order():
    from sklearn.linear_model import Ridge

    torch.manual_seed(0)
    features, labels = torch.randn(30, 60) * torch.arange(1, 61), 3 + torch.randn(30)
    head = Regression.fit(features, labels)
    x = ((features - features.mean(0)) / features.std(0, correction=0)).double().numpy()
    expected = Ridge(alpha=len(x)).fit(x, labels.double().numpy()).predict(x)
    assert head.predict(head(features)).tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert float(head.loss(head(features), labels)) > 0.01, "noise is not fitted exactly"

    table = torch.nn.Embedding.from_pretrained(features)
    lengths = torch.arange(30) % 4 + 1  # batches come from long to short
    inputs = {
        "input_ids": torch.arange(30).repeat(4, 1).T,
        "attention_mask": (torch.arange(4) < lengths[:, None]).long(),
    }
    encoder = Looked(table)
    made = Encoder("x").head(encoder, task(metric="pearson_spearman"), Split(inputs, labels))
    assert isinstance(made, Regression) and torch.allclose(made.weight, head.weight, atol=1e-6)
    with pytest.raises(DataError, match="its head is fitted to examples"):
        Encoder("x").head(encoder, task(metric="spearman"), Split({k: v[:0] for k, v in inputs.items()}, labels[:0]))


class Looked(torch.nn.Module):
    def __init__(self, table):
        super().__init__()
        self.table = table

    def forward(self, input_ids, attention_mask):
        return self.table(input_ids[:, 0])


@pytest.mark.parametrize(
    "head",
    [
        Head(torch.eye(2), 20.0),
        Classifier(torch.eye(2), torch.zeros(2), torch.ones(3, 2), torch.zeros(3)),
        Regression(torch.ones(2), torch.ones(1)),
        Answers(torch.arange(2)),
        Answers(torch.tensor([1.0, 2.5])),
    ],
)
def test_heads_are_stored_as_tensors(head):
    again = heads.unpack(heads.pack(head))
    assert type(again) is type(head)
    for name, value in vars(head).items():
        assert torch.equal(torch.as_tensor(getattr(again, name)), torch.as_tensor(value))
        assert torch.as_tensor(getattr(again, name)).dtype == torch.as_tensor(value).dtype
    features = torch.tensor([[0.5, -1.0]])
    assert torch.equal(again(features), head(features))


def test_what_is_no_head_is_not_stored():
    with pytest.raises(CheckpointError, match="known heads are"):
        heads.pack(lambda features: features)
    with pytest.raises(CheckpointError, match="are not a head"):
        heads.unpack({"weights": torch.zeros(1)})


def test_pairs_are_one_sequence_with_segments_and_padding_changes_nothing(tmp_path):
    from tokenizers import processors
    from transformers import BertConfig, BertModel

    tokenizer = words(model_input_names=["input_ids", "token_type_ids", "attention_mask"])
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B:1 </s>:1", special_tokens=[("</s>", 1)]
    )
    tokenizer.save_pretrained(tmp_path)
    torch.manual_seed(0)
    BertModel(BertConfig(**SIZES)).save_pretrained(tmp_path)
    backbone = Encoder(str(tmp_path), pooling="cls", max_length=12)
    module, encoded = backbone.load(), backbone.encode(PAIRS)
    assert encoded["token_type_ids"].sum(1).tolist() == [2, 8]
    assert encoded["input_ids"][0, :8].eq(1).sum() == 2, "each text ends"
    whole = module(**encoded)
    for inputs, _, index in Split(encoded, torch.arange(2)).batches(1):
        assert torch.allclose(module(**inputs), whole[index], atol=1e-5)
    flat = {**encoded, "token_type_ids": torch.zeros_like(encoded["token_type_ids"])}
    assert not torch.allclose(module(**flat), whole, atol=1e-3)
    assert "token_type_ids" not in backbone.encode([{"a": "poor"}])
    assert backbone.encode([])["input_ids"].shape == (0, 12)
    with pytest.raises(DataError, match="row of 3 columns"):
        backbone.encode([dict.fromkeys("abc", "it")])
