"""Values that come out are values that a model can compute with, in the precision that was promised."""

import pytest
import torch
from torch import nn

from byom.checkpoint.bundle import Bundle
from byom.errors import CheckpointError, OptionError
from byom.merge.base import Problem
from byom.merge.pretrained import Pretrained
from byom.merge.task_arithmetic import TaskArithmetic
from byom.variants.base import PackingVariant
from byom.variants.emr import ElectMaskRescale
from byom.variants.fft import ByomFft
from byom.variants.lora import ByomLora
from byom.variants.post_pruning import PostPruning
from byom.weights import Weights
from tests.problems import bits, models, options, posed, problem, rows

METHODS, VARIANTS = options("merge"), options("byom")
STATISTICS = ("norm.running_mean", "norm.running_var")


def normalised(seed):
    """Return a network's state with running statistics as training leaves them: variances that differ a lot."""
    torch.manual_seed(seed)
    net = nn.ModuleDict({"layer": nn.Linear(5, 6), "norm": nn.BatchNorm1d(6)})
    net["norm"].running_var.copy_(torch.rand(6) * (0.2 if seed else 4))
    net["norm"].running_mean.copy_(torch.randn(6))
    net["norm"].num_batches_tracked.fill_(seed)
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    if seed:
        base = normalised(0)
        state |= {n: base[n] + 0.05 * torch.randn_like(base[n]) for n in base if n.startswith("layer")}
    return state


def networks():
    experts = {f"task{t}": Weights.of(normalised(t), f"task{t}") for t in (1, 2, 3)}
    return posed(Weights.of(normalised(0), "pre-trained"), experts)


@pytest.mark.parametrize("option", rows("merge"))
def test_running_statistics_are_averaged_by_every_method_and_named(option):
    method = METHODS[option]
    given = networks()
    merged = method(given)
    if not method.merges:
        assert all(bits(merged[name]) == bits(given.pretrained[name]) for name in STATISTICS)
        return
    for name in STATISTICS:
        mean = torch.stack([expert[name] for expert in given.finetuned.values()]).mean(0)
        torch.testing.assert_close(merged[name], mean)
        assert name in method.fallbacks(given)
    assert (merged["norm.running_var"] > 0).all()
    assert merged["norm.num_batches_tracked"] == 0


def test_a_network_with_batch_normalisation_computes_after_task_arithmetic():
    net = nn.Sequential()
    net.add_module("layer", nn.Linear(5, 6))
    net.add_module("norm", nn.BatchNorm1d(6))
    net.load_state_dict(TaskArithmetic(scale=1.0)(networks()).state())
    assert net.eval()(torch.randn(4, 5)).isfinite().all()


@pytest.mark.parametrize("option", rows("byom"))
def test_tasks_keep_running_statistics_that_can_be_divided_by(option):
    given, variant = networks(), VARIANTS[option]
    reference = given.pretrained if variant.on == "pretrained" else TaskArithmetic(scale=1.0)(given)
    served = variant.serve(given, reference)
    for task, expert in given.finetuned.items():
        assert (served.weights(task)["norm.running_var"] > 0).all()
        if isinstance(variant, PackingVariant):
            assert bits(served.weights(task)["norm.running_var"]) == bits(expert["norm.running_var"])


def test_a_result_beyond_its_dtype_is_refused_and_a_wider_one_is_written(tmp_path):
    base = Weights.of({"a": torch.tensor([100.0, 1.0], dtype=torch.float16)})
    tuned = Weights.of({"a": torch.tensor([60000.0, 1.0], dtype=torch.float16)})
    merged = TaskArithmetic(scale=2.0)(Problem(base, {"x": tuned}))
    for write in (lambda: merged["a"], lambda: merged.save(tmp_path / "out"), merged.state):
        with pytest.raises(CheckpointError, match=r"'a' has values up to 1\.2e\+05, and float16 holds 6.*dtype"):
            write()
    assert not (tmp_path / "out").exists()
    for dtype in (torch.float32, torch.bfloat16):
        opened = Weights.open(merged.save(tmp_path / "out", dtype=dtype))
        assert opened.dtype("a") == dtype
        torch.testing.assert_close(opened["a"].float(), torch.tensor([119900.0, 1.0]), rtol=4e-3, atol=0)
    with pytest.raises(OptionError, match="not a floating-point dtype"):
        merged.save(tmp_path / "out", dtype=torch.int8)


def test_a_result_that_is_not_finite_is_not_written(tmp_path):
    folder = Weights.of({"a": torch.ones(2)}).save(tmp_path / "out")
    broken = Weights.of({"a": torch.ones(2)}).derived(lambda name: torch.tensor([1.0, float("nan")]), "merged")
    with pytest.raises(CheckpointError, match=r"merged: tensor 'a' came out with values that are NaN"):
        broken.save(folder)
    assert bits(Weights.open(folder)["a"]) == bits(torch.ones(2))


def test_a_mask_of_minus_infinity_can_be_written(tmp_path):
    mask = torch.full((3, 3), -float("inf")).triu(1)
    assert bits(Weights.open(Weights.of({"mask": mask}).save(tmp_path))["mask"]) == bits(mask)


@pytest.mark.parametrize("variant", [ByomFft(density=1.0), PostPruning(density=1.0)])
def test_experts_come_back_in_the_precision_of_the_base(variant):
    base, tuned = models(2)
    half = {n: t.bfloat16() if t.is_floating_point() else t for n, t in base.items()}
    half["head"] = half["embed"]
    given = problem(half, tuned)
    reference = (Pretrained() if variant.on == "pretrained" else TaskArithmetic())(given)
    for task, expert in given.finetuned.items():
        served = variant.serve(given, reference).weights(task)
        assert all(bits(served[n]) == bits(expert[n].to(given.pretrained.dtype(n))) for n in served.mergeable())
    wide = posed(given.pretrained.to(torch.float32), given.finetuned)  # the remedy
    reference = (Pretrained() if variant.on == "pretrained" else TaskArithmetic())(wide)
    for task, expert in wide.finetuned.items():
        served = variant.serve(wide, reference).weights(task)
        assert all(bits(served[n]) == bits(expert[n]) for n in served.mergeable())


@pytest.mark.parametrize("variant", [PostPruning(1.0), ByomFft(1.0), ByomLora(rank=4)], ids=["pruned", "fft", "lora"])
def test_a_task_beyond_the_dtype_of_the_base_is_refused(variant):
    base, task = Weights.of({"w": torch.ones(4, 4).half()}, "base"), Weights.of({"w": torch.full((4, 4), 1e5)}, "task")
    with pytest.raises(CheckpointError, match=r"task: tensor 'w' has values up to 1e\+05.*base.to\(torch.float32\)"):
        Bundle.pack(variant, {"task": task}, base)
    served = Bundle.pack(variant, {"task": task}, base.to(torch.float32)).weights("task")
    assert torch.allclose(served["w"], task["w"])


def test_emr_keeps_running_statistics_of_each_task():
    means = {"base": 50.0, "one": 0.1, "other": 0.4}
    of = {
        who: Weights.of({"bn.running_var": torch.full((2,), v), "w": torch.full((2,), v)}) for who, v in means.items()
    }
    tasks = {"one": of["one"], "other": of["other"]}
    bundle = Bundle.pack(ElectMaskRescale(), tasks, of["base"])
    assert all(torch.equal(bundle.weights(t)["bn.running_var"], tasks[t]["bn.running_var"]) for t in tasks)


def test_one_value_at_any_stride_is_one_value(tmp_path):
    odd = torch.arange(300.0)[7:].as_strided((1,), (255,), 7)
    given = Weights.of({"a": odd, "b": torch.ones(2)})
    assert given.fingerprint() == Weights.of({"a": torch.tensor([7.0]), "b": torch.ones(2)}).fingerprint()
    assert bits(Weights.open(given.save(tmp_path / "out"))["a"]) == bits(torch.tensor([7.0]))
