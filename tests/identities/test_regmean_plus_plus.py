"""RegMean++: one layer is RegMean, one task is itself, and a deep linear network by hand."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from byom.errors import OptionError
from byom.merge.base import Problem
from byom.merge.regmean import RegMean, regression_mean
from byom.merge.regmean_plus_plus import RegMeanPlusPlus, Stage, layers
from byom.statistics.gram import grams, order
from byom.weights import Weights
from tests.probes import TinyProbe

EXAMPLES = 12


class Blocks(nn.Module):
    """A stem and blocks of two matrices, with a bias and a norm each."""

    def __init__(self, depth):
        super().__init__()
        self.stem = nn.Linear(5, 4, bias=False)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)) for _ in range(depth)
        )

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = x + block(x)
        return x


class ModuleProbe(TinyProbe):
    """A probe that captures Grams, and keeps the states that it was given."""

    def __init__(self, module, *models):
        super().__init__(*models)
        self.module, self.states = module, []

    def grams(self, state, task, split, examples, parameters):
        self.states.append((task, dict(state), set(parameters)))
        self.module.load_state_dict(dict(state))
        return grams(self.module, [self.take(task, split, torch.arange(min(examples, self.count))).inputs], parameters)

    def order(self):
        return order(self.module, [{"x": torch.zeros(1, self.width).double()}])


def module(seed, depth):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = Blocks(depth).double().eval()
        for parameter in made.parameters():
            parameter.data = torch.randn_like(parameter) / 2
        return made


def posed(depth, tasks=2):
    made = {str(t): module(t, depth) for t in range(1, tasks + 1)}
    models = Weights.of(module(0, depth).state_dict()), {t: Weights.of(m.state_dict(), t) for t, m in made.items()}
    probe = ModuleProbe(module(0, depth), *models)
    for task in made:
        x = torch.randn(EXAMPLES, 5, generator=torch.Generator().manual_seed(int(task)), dtype=torch.float64)
        probe._drawn[task, "train"] = probe._all(task, "train")._replace(inputs={"x": x})
    return Problem(*models, probe=probe), made


def test_one_layer_is_regmean():
    problem, made = posed(0)
    held = {
        t: Weights.of(grams(m, [problem.probe.take(t, "train", torch.arange(EXAMPLES)).inputs], ["stem.weight"]))
        for t, m in made.items()
    }
    expected = RegMean()(Problem(problem.pretrained, problem.finetuned, {"gram": held}))
    found = RegMeanPlusPlus()(problem)
    assert_close(found["stem.weight"], expected["stem.weight"])


def test_one_task_gives_its_own_weights():
    problem, made = posed(2, tasks=1)
    found = RegMeanPlusPlus()(problem).state()
    assert_close(found, dict(made["1"].state_dict()), rtol=1e-6, atol=1e-9)


def test_a_deep_model_is_merged_as_by_hand():
    problem, made = posed(2)
    found = RegMeanPlusPlus(examples=8)(problem)
    experts = list(made.values())
    average = {n: sum(e.state_dict()[n] for e in experts) / 2 for n in problem.pretrained}
    runner = Blocks(2).double().eval()
    for prefix in ("stem", "blocks.0", "blocks.1"):
        matrices = [n for n in average if n.startswith(prefix) and average[n].ndim == 2]
        seen = []
        for task, expert in made.items():
            own = {n: v for n, v in expert.state_dict().items() if n.startswith(prefix)}
            runner.load_state_dict(average | own)
            seen.append(grams(runner, [problem.probe.take(task, "train", torch.arange(8)).inputs], matrices))
        for name in matrices:
            stacked = torch.stack([e.state_dict()[name] for e in experts])
            average[name] = regression_mean(name, stacked, torch.stack([s[name] for s in seen]), 0.95, 1e-6)
    assert_close(found.state(), average)


def test_each_task_runs_its_own_layer_on_merged_ones_and_sees_training_inputs_alone():
    problem, _ = posed(2)
    found = RegMeanPlusPlus()(problem)
    states = problem.probe.states
    assert [(task, len(wanted)) for task, _, wanted in states] == [(t, n) for n in (1, 2, 2) for t in ("1", "2")]
    assert problem.probe.seen == {"train"}
    task, state, _ = states[-1]
    assert torch.equal(state["blocks.1.0.bias"], problem.finetuned[task]["blocks.1.0.bias"])
    assert torch.equal(state["blocks.0.1.weight"], found["blocks.0.1.weight"])


def test_what_is_no_linear_map_is_averaged_and_named():
    problem, _ = posed(1)
    names = RegMeanPlusPlus().fallbacks(problem)
    assert names == ["blocks.0.0.bias", "blocks.0.0.weight", "blocks.0.1.bias", "blocks.0.3.bias"]
    found = RegMeanPlusPlus()(problem)
    for name in names:
        assert_close(found[name], sum(expert[name] for expert in problem.finetuned.values()) / 2)


def test_layers_go_by_the_first_number_of_a_name():
    names = ["a.0.q", "a.0.k", "a.0.mlp.3", "a.0.norm", "a.1.q", "stem", "head", "bias"]
    found = layers([["stem"], ["a.0.q", "a.0.k"], ["a.0.mlp.3"], ["a.1.q"], ["head"], ["elsewhere"]], names)
    assert found == [
        Stage(["stem"], ["stem"]),
        Stage(["a.0.q", "a.0.k", "a.0.mlp.3"], ["a.0.k", "a.0.mlp.3", "a.0.norm", "a.0.q"]),
        Stage(["a.1.q"], ["a.1.q"]),
        Stage(["head"], ["head"]),
    ]


def test_a_problem_without_inputs_or_a_value_out_of_range_is_refused():
    problem, _ = posed(0)
    with pytest.raises(OptionError, match="looks at inputs of the tasks"):
        RegMeanPlusPlus()(Problem(problem.pretrained, problem.finetuned))
    with pytest.raises(OptionError, match="merge.examples=0"):
        RegMeanPlusPlus(examples=0)
    with pytest.raises(OptionError, match="merge.off_diagonal=2"):
        RegMeanPlusPlus(off_diagonal=2)
