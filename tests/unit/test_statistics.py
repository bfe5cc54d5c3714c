"""Statistics against brute force, on toy modules and on tiny untrained models of every architecture."""

from dataclasses import fields
from itertools import chain

import pytest
import torch
import yaml
from hydra.utils import instantiate
from torch import nn
from torch.nn.functional import normalize
from torch.testing import assert_close

from byom.backbone.encoder import PooledEncoder
from byom.backbone.vit import Vit
from byom.cli import config
from byom.data.splits import Split
from byom.errors import OptionError
from byom.functional.heads import Head
from byom.merge.base import Problem
from byom.merge.regmean import RegMean
from byom.statistics.base import fit, parameters
from byom.statistics.fisher import ESTIMATES, Fisher
from byom.statistics.gram import Gram, GramFitter, grams, order
from byom.statistics.ivon import Ivon
from byom.weights import Weights
from tests.problems import slow

CLASSES, EXAMPLES = 4, 7
NAMES = ("vit", "clip", "bert", "roberta", "t5", "gpt2", "torch")
TEXT = {"vocab_size": 60, "num_hidden_layers": 2, "num_attention_heads": 2}


def transformers_model(name):
    import transformers as hub

    wide = TEXT | {"hidden_size": 8, "intermediate_size": 12}
    if name == "t5":
        return hub.T5EncoderModel(hub.T5Config(vocab_size=60, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_heads=2))
    if name == "gpt2":
        return hub.GPT2Model(hub.GPT2Config(vocab_size=60, n_embd=8, n_layer=2, n_head=2))
    kind, options = {"bert": (hub.BertModel, hub.BertConfig), "roberta": (hub.RobertaModel, hub.RobertaConfig)}[name]
    return kind(options(**wide), add_pooling_layer=False)


class Layers(nn.Module):
    """torch's own encoder layers, whose fast path calls no module inside."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(60, 8)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 12, batch_first=True) for _ in range(2))

    def forward(self, input_ids, attention_mask):
        states = self.embed(input_ids)
        for layer in self.layers:
            states = layer(states, src_key_padding_mask=attention_mask == 0)
        return (states * attention_mask.unsqueeze(-1)).sum(1) / attention_mask.sum(1, keepdim=True)


def encoder(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if name == "vit":
            return Vit("test_vit", 32, "random").load()
        if name == "clip":
            from open_clip.model import CLIPVisionCfg, _build_vision_tower

            tower = _build_vision_tower(6, CLIPVisionCfg(layers=2, width=8, head_width=4, patch_size=16, image_size=32))
            return Pixels(tower).eval()
        return (Layers() if name == "torch" else PooledEncoder(transformers_model(name), "mean")).eval()


class Pixels(nn.Module):
    def __init__(self, visual):
        super().__init__()
        self.visual = visual

    def forward(self, pixels):
        return self.visual(pixels.float() / 255)


def inputs(name, padding=0):
    generator = torch.Generator().manual_seed(2)
    if name in ("vit", "clip"):
        return {"pixels": torch.randint(0, 256, (EXAMPLES, 3, 32, 32), generator=generator, dtype=torch.uint8)}
    ids = torch.randint(5, 60, (EXAMPLES, 6), generator=generator)
    mask = (torch.arange(6) < torch.randint(2, 7, (EXAMPLES, 1), generator=generator)).long()
    ids, mask = (torch.cat([value, torch.ones(EXAMPLES, padding, dtype=torch.long)], 1) for value in (ids, mask))
    if padding:
        mask[:, -padding:] = 0
    return {"input_ids": torch.where(mask == 1, ids, 1), "attention_mask": mask}


def split(name, padding=0):
    return Split(inputs(name, padding), torch.arange(EXAMPLES) % CLASSES)


def head(module, name):
    width = module(**{k: v[:1] for k, v in inputs(name).items()}).shape[1]
    return Head(normalize(torch.randn(CLASSES, width, generator=torch.Generator().manual_seed(3)), dim=-1), 5.0)


def shuffled(held):
    turn = torch.tensor([3, 1, 6, 0, 5, 2, 4])
    return Split({name: value[turn] for name, value in held.inputs.items()}, held.labels[turn])


@pytest.fixture(autouse=True)
def quiet(recwarn):
    """Transformers whose mask code refuses vmap say so; tests of that are below."""
    import warnings

    warnings.filterwarnings("ignore", "fisher: .* refuses vmap")


# grams


def brute_force(module, held):
    """Capture by hooks on modules, one example at a time and without its padding; attention is computed anew."""
    rows, turned = {}, set()

    def keep(name, x):
        rows.setdefault(name, []).append(x.detach().reshape(-1, x.shape[-1]).double())

    def linear(name):
        return lambda _, args: keep(f"{name}.weight", args[0])

    def attention(name):
        def see(layer, args, kwargs):
            query = args[0] if args else kwargs["query"]
            keep(f"{name}.in_proj_weight", query)
            width, count = layer.embed_dim, layer.num_heads
            q, k, v = (query[0] @ layer.in_proj_weight.T + layer.in_proj_bias).split(width, dim=-1)
            q, k, v = (x.reshape(len(x), count, -1).transpose(0, 1) for x in (q, k, v))
            weights = (q @ k.mT / (width // count) ** 0.5).softmax(-1)
            keep(f"{name}.out_proj.weight", (weights @ v).transpose(0, 1).reshape(-1, width))

        return see

    hooks = []
    for name, layer in module.named_modules():
        if isinstance(layer, nn.MultiheadAttention):
            hooks.append(layer.register_forward_pre_hook(attention(name), with_kwargs=True))
        elif type(layer).__name__ == "Conv1D":
            turned.add(f"{name}.weight")
            hooks.append(layer.register_forward_pre_hook(linear(name)))
        elif isinstance(layer, nn.Linear) and "out_proj" not in name:
            hooks.append(layer.register_forward_pre_hook(linear(name)))
    with torch.no_grad():
        for values, *_ in held.batches(1):
            module(**values)
    for hook in hooks:
        hook.remove()
    found = {name: torch.cat(parts) for name, parts in rows.items()}
    found = {name: x.T @ x / len(x) for name, x in found.items()}
    return {name: gram[None] if name in turned else gram for name, gram in found.items()}


@pytest.mark.parametrize("name", NAMES)
def test_grams_are_those_of_hooks_on_every_linear_map(name):
    module, held = encoder(name), split(name)
    found = fit(module, head(module, name), held, {"gram": Gram(EXAMPLES)}, 3)["gram"]
    expected = brute_force(module, held)
    if name == "clip":
        assert found.pop("visual.proj").shape == (1, 8, 8)  # a bare parameter, not a module
    assert found.keys() == expected.keys()
    for parameter, gram in expected.items():
        assert_close(found[parameter], gram.float(), rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_every_matrix_is_covered_or_no_linear_map(name):
    module = encoder(name)
    matrices = {n for n, p in parameters(module).items() if p.ndim == 2}
    found = grams(module, [inputs(name)], matrices)
    rest = {"embed", "shared", "wte", "wpe", "position", "relative_attention_bias", "class_embedding"}
    assert found and all(any(word in n for word in rest) for n in matrices - set(found))
    if name in ("clip", "torch"):
        attention = [n for n in parameters(module) if n.endswith(("in_proj_weight", "out_proj.weight"))]
        assert len(attention) == 4 and set(attention) <= set(found)


@pytest.mark.parametrize("name", ["bert", "roberta", "t5", "torch"])
def test_padding_changes_no_gram(name):
    module = encoder(name)
    plain, padded = (GramFitter(module) for _ in range(2))
    plain.add(inputs(name))
    padded.add(inputs(name, padding=4))
    assert plain.sums.keys() == padded.sums.keys() and plain.rows == padded.rows
    for parameter, gram in plain.means().items():
        assert_close(padded.means()[parameter], gram, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_capture_changes_neither_features_nor_parameters(name):
    module = encoder(name)
    before = {n: p.clone() for n, p in module.named_parameters()}
    seen, fitter = [], GramFitter(module)
    hook = module.register_forward_hook(lambda *args: seen.append(args[-1]))
    with torch.no_grad():
        module(**inputs(name))
    fitter.add(inputs(name))
    hook.remove()
    assert_close(seen[1], seen[0], rtol=1e-5, atol=1e-6)
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())


@pytest.mark.parametrize("name", NAMES)
def test_order_lists_every_covered_matrix_once_and_inputs_that_are_shared_together(name):
    module = encoder(name)
    groups = order(module, [inputs(name)])
    listed = list(chain(*groups))
    assert len(listed) == len(set(listed)) and set(listed) == set(grams(module, [inputs(name)], listed))
    ends = [[part.rsplit(".", 2)[1] for part in group] for group in groups]
    if name in ("bert", "roberta"):
        assert ends == 2 * [["query", "key", "value"], ["dense"], ["dense"], ["dense"]]
    if name == "t5":
        assert ends == 2 * [["q", "k", "v"], ["o"], ["wi"], ["wo"]]
    numbers = [
        int(next(part for part in group[0].split(".") if part.isdigit()))
        for group in groups
        if group[0] != "visual.proj"
    ]
    assert numbers == sorted(numbers)


def test_attention_to_something_else_is_not_covered_by_one_gram():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x, y):
            return self.attention(x, y, y)[0]

    module = Cross().eval()
    found = grams(module, [{"x": torch.randn(2, 3, 8), "y": torch.randn(2, 5, 8)}], list(parameters(module)))
    assert found.keys() == {"attention.out_proj.weight"}


def test_attention_of_separate_widths_is_covered_three_times():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, kdim=4, vdim=6, batch_first=True)

        def forward(self, x, y, z):
            return self.attention(x, y, z)[0]

    module, x = Cross().eval(), {n: torch.randn(2, 3, width) for n, width in (("x", 8), ("y", 4), ("z", 6))}
    found = grams(module, [x], list(parameters(module)))
    for letter, name in zip("qkv", x, strict=True):
        rows = x[name].reshape(6, -1).double()
        assert_close(found[f"attention.{letter}_proj_weight"], rows.T @ rows / 6)


def test_a_matrix_used_twice_sums_both_uses_and_one_changed_in_place_is_seen_anew():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)

        def forward(self, x):
            y = self.one(self.one(x))
            x.mul_(2)
            return y + self.other(x)

    module, x = Twice().eval(), torch.randn(5, 3)
    rows = torch.cat([x, module.one(x).detach()]).double()
    found = grams(module, [{"x": x.clone()}], ["one.weight", "other.weight"])
    assert_close(found["one.weight"], rows.T @ rows / 10, rtol=1e-6, atol=1e-6)
    assert_close(found["other.weight"], 4 * x.double().T @ x.double() / 5)


@pytest.mark.parametrize("name", NAMES)
def test_regmean_of_each_architecture_falls_back_only_where_nothing_is_linear(name):
    base, other = encoder(name), encoder(name)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.01)
    states = {task: Weights.of(m.state_dict(), task) for task, m in (("a", base), ("b", other))}
    found = {
        task: Weights.of(fit(m, head(m, name), split(name), {"gram": Gram(EXAMPLES)}, 7)["gram"])
        for task, m in (("a", base), ("b", other))
    }
    problem = Problem(states["a"], states, {"gram": found})
    merged = RegMean()(problem).state()
    assert all(merged[n].isfinite().all() for n in merged)
    averaged = RegMean().fallbacks(problem)
    assert not set(averaged) & set(found["a"]) and len(averaged) + len(found["a"]) == len(states["a"].mergeable())


# fisher


def slowly(module, readout, held, estimate):
    """One example, one class and one backward pass at a time."""
    named = parameters(module)
    sums = {n: torch.zeros_like(p, dtype=torch.float64) for n, p in named.items()}
    for values, labels, _ in held.batches(1):
        logs = readout(module(**values))[0].log_softmax(-1)
        chosen = range(CLASSES) if estimate == "exact" else labels.tolist()
        for c in chosen:
            found = torch.autograd.grad(logs[c], list(named.values()), retain_graph=True, allow_unused=True)
            weight = float(logs[c].detach().exp()) if estimate == "exact" else 1.0
            for n, g in zip(named, found, strict=True):
                sums[n] += 0 if g is None else weight * g.double().square()
    return {n: value / len(held) for n, value in sums.items()}


@pytest.mark.parametrize("estimate", ["exact", "empirical"])
@pytest.mark.parametrize("name", NAMES)
def test_fisher_is_that_of_single_backward_passes(name, estimate):
    module, held = encoder(name), split(name)
    readout = head(module, name)
    found = fit(module, readout, held, {"fisher": Fisher(EXAMPLES, estimate=estimate)}, 3)["fisher"]
    expected = slowly(module, readout, held, estimate)
    assert found.keys() == expected.keys() and any(value.any() for value in found.values())
    for n, value in expected.items():
        assert_close(found[n].double(), value, rtol=1e-3, atol=1e-5 * float(value.max()) + 1e-12)


def logistic(features=3, seed=0):
    generator = torch.Generator().manual_seed(seed)

    class Logistic(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(features, generator=generator))

        def forward(self, x):
            logit = x.to(self.w) @ self.w
            return torch.stack([logit, torch.zeros_like(logit)], 1)

    x = torch.randn(400, features, generator=generator)
    module = Logistic().eval()
    p = torch.sigmoid(x @ module.w).detach()
    labels = (torch.rand(400, generator=generator) > p).long()
    return module, Split({"x": x}, labels), (p * (1 - p)).unsqueeze(1) * x.square()


def test_exact_fisher_of_a_logistic_model_is_its_formula():
    module, held, terms = logistic()
    found = fit(module, lambda logits: logits, held, {"fisher": Fisher(400, estimate="exact")}, 64)["fisher"]
    assert_close(found["w"], terms.mean(0), rtol=1e-5, atol=1e-8)


def test_golden_the_fisher_is_one_where_the_square_root_trick_gives_zero():
    module = logistic(1)[0]
    with torch.no_grad():
        module.w.zero_()
    held = Split({"x": torch.tensor([[2.0]])}, torch.tensor([0]))
    for estimate in ESTIMATES:
        found = fit(module, lambda logits: logits, held, {"fisher": Fisher(1, estimate=estimate)}, 1)["fisher"]
        assert_close(found["w"], torch.tensor([1.0]))


def test_sampled_fisher_is_unbiased():
    module, held, _ = logistic()
    exact, sampled = Fisher(400, estimate="exact"), Fisher(400, samples=300)
    found = fit(module, lambda logits: logits, held, {"exact": exact, "sampled": sampled}, 400)
    assert_close(found["sampled"]["w"], found["exact"]["w"], rtol=0.02, atol=0)


def test_sampled_labels_depend_on_seed_and_place():
    module, held, _ = logistic()
    drawn = {str(s): Fisher(100, seed=s) for s in (0, 1)}
    found = fit(module, lambda logits: logits, held, drawn, 100)
    assert not torch.equal(found["0"]["w"], found["1"]["w"])


def test_a_module_that_refuses_vmap_is_said_and_gets_the_same_values():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, CLASSES)

        def forward(self, x):
            return self.fc(x) if x.sum() < 1e9 else x

    held = Split({"x": torch.randn(5, 3)}, torch.arange(5) % CLASSES)
    module = Fickle().eval()
    with pytest.warns(UserWarning, match="Fickle refuses vmap .* one example at a time"):
        found = fit(module, lambda x: x, held, {"f": Fisher(5, estimate="exact")}, 5)["f"]
    expected = slowly(module, lambda x: x, held, "exact")
    for n, value in expected.items():
        assert_close(found[n].double(), value, rtol=1e-4, atol=1e-9)


def test_half_precision_models_get_a_fisher_in_single_precision():
    module, held, terms = logistic()
    module.w.data = module.w.data.bfloat16()

    found = fit(module, lambda logits: logits.float(), held, {"fisher": Fisher(400, estimate="exact")}, 400)["fisher"]
    assert found["w"].dtype == torch.float32
    assert_close(found["w"], terms.mean(0), rtol=0.05, atol=0)


# every statistic


@pytest.mark.parametrize(
    "statistic", [Gram(), *(Fisher(estimate=e) for e in ESTIMATES), Ivon(steps=3, batch_size=4)], ids=str
)
@pytest.mark.parametrize("name", ["vit", *slow("t5")])
def test_a_statistic_depends_neither_on_batches_nor_on_order(name, statistic):
    module = encoder(name)
    readout = head(module, name)
    found = [fit(module, readout, split(name), {"s": statistic}, size)["s"] for size in (1, 3, EXAMPLES)]
    if "sampled" not in str(statistic) and not isinstance(statistic, Ivon):  # these key on places
        found.append(fit(module, readout, shuffled(split(name)), {"s": statistic}, 3)["s"])
    for other in found[1:]:
        for n, value in found[0].items():
            assert_close(other[n], value, rtol=1e-3, atol=2e-5 * float(value.abs().max()) + 1e-12)


def test_statistics_of_one_pass_are_those_of_separate_passes_and_take_the_first_examples():
    module, held = encoder("t5"), split("t5")
    readout = head(module, "t5")
    wanted = {"a": Gram(3), "b": Gram(100), "c": Fisher(4, estimate="empirical")}
    together = fit(module, readout, held, wanted, 2)
    first = Split({n: v[:3] for n, v in held.inputs.items()}, held.labels[:3])
    alone = {n: fit(module, readout, held, {n: s}, 7)[n] for n, s in wanted.items()}
    alone["a"] = fit(module, readout, first, {"a": Gram(100)}, 7)["a"]
    for n, values in alone.items():
        for parameter, value in values.items():
            assert_close(together[n][parameter], value, rtol=1e-4, atol=1e-5 * float(value.abs().max()))


@pytest.mark.parametrize("statistic", [Gram(), Fisher(), Ivon(steps=2)], ids=str)
def test_fitting_leaves_the_model_as_it_was_and_draws_from_no_shared_generator(statistic):
    module = encoder("vit")
    before = {n: p.clone() for n, p in module.named_parameters()}
    generator = torch.get_rng_state()
    fit(module, head(module, "vit"), split("vit"), {"s": statistic}, 7)
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(p, before[n]) and p.grad is None for n, p in module.named_parameters())
    assert not module.training


def test_tied_parameters_are_one_under_their_canonical_name():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.z = nn.Linear(3, 3, bias=False)
            self.a = self.z

        def forward(self, x):
            return self.a(torch.tanh(self.z(x)))

    module, held = Tied().eval(), Split({"x": torch.randn(4, 3)}, torch.tensor([0, 1, 2, 0]))
    wanted = {"gram": Gram(), "fisher": Fisher(estimate="empirical"), "ivon": Ivon(steps=2)}
    found = fit(module, lambda x: x, held, wanted, 4)
    assert all(values.keys() == {"a.weight"} for values in found.values())
    assert Weights.of(module.state_dict()).canonical() == ["a.weight"]
    expected = slowly(module, lambda x: x, held, "empirical")["a.weight"]
    assert_close(found["fisher"]["a.weight"].double(), expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", ["fisher", "gram", "ivon"])
def test_the_yaml_states_every_field_with_the_default_of_the_class(name):
    stated = yaml.safe_load((config.folder() / "statistic" / f"{name}.yaml").read_text())
    built = instantiate(stated)
    assert built == type(built)()
    assert set(stated) - {"_target_"} == {f.name for f in fields(built)}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: Gram(0), "statistic.examples=0"),
        (lambda: Gram(split="test"), "may not be looked at"),
        (lambda: Fisher(estimate="sqrt"), "exact, sampled or empirical"),
        (lambda: Fisher(samples=0), "statistic.samples=0"),
        (lambda: Ivon(steps=0), "statistic.steps"),
        (lambda: Ivon(ess=0), "statistic.ess"),
        (lambda: Ivon(retention=1), "statistic.retention"),
    ],
)
def test_a_value_out_of_range_is_refused(make, said):
    with pytest.raises(OptionError, match=said):
        make()


# ivon


@pytest.mark.slow
def test_ivon_finds_the_hessian_of_a_logistic_model():
    pytest.importorskip("ivon")
    module, held, terms = logistic()
    what = Ivon(400, steps=4000, batch_size=400, ess=100, initial=0.2, retention=0.999, weight_decay=0.0)
    found = fit(module, lambda logits: logits, held, {"ivon": what}, 400)["ivon"]
    assert_close(found["w"] / what.ess, terms.mean(0), rtol=0.2, atol=0)


def test_ivon_without_its_package_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "ivon", None)
    with pytest.raises(OptionError, match="pip install ivon-opt"):
        Ivon().start(nn.Linear(2, 2), lambda x: x)


def test_fisher_of_a_regression_is_the_squared_gradient_of_its_prediction():

    torch.manual_seed(0)
    net = torch.nn.Linear(3, 2)
    net.forward = lambda pixels, call=net.forward: call(pixels)
    head = torch.nn.Linear(2, 1)
    inputs, labels = torch.randn(5, 3), torch.randn(5)
    split = Split({"pixels": inputs}, labels)
    expected = torch.stack([torch.outer(head.weight[0], x).square() for x in inputs]).mean(0).detach()
    for estimate in ("exact", "sampled"):
        found = fit(net, head, split, {"fisher": Fisher(estimate=estimate)}, 2)["fisher"]
        assert torch.allclose(found["weight"], expected, rtol=1e-5)
    residuals = (head(net(inputs))[:, 0] - labels).detach().square()
    empirical = fit(net, head, split, {"fisher": Fisher(estimate="empirical")}, 2)["fisher"]["weight"]
    weighted = torch.stack(
        [r * torch.outer(head.weight[0], x).square() for r, x in zip(residuals, inputs, strict=True)]
    ).mean(0)
    assert torch.allclose(empirical, weighted.detach(), rtol=1e-5)
