"""`Bundle.attach`: a live model is switched in place, gets every bit back, and what does not fit is refused."""

import copy
import random
import re
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

from byom.checkpoint import heads
from byom.checkpoint.bundle import Bundle
from byom.errors import ByomError, CheckpointError, OptionError, WeightsMismatch
from byom.variants.base.delta import Delta
from byom.variants.emr import ElectMaskRescale
from byom.variants.fft import ByomFft
from byom.variants.lora import ByomLora
from byom.variants.single_task import SingleTask
from byom.variants.surgery import RepresentationSurgery
from byom.variants.tall_mask import TallMasks
from byom.variants.twin import TwinMerging
from byom.weights import Weights
from tests.problems import bits

TASKS = ("a", "b")
KINDS = [ByomFft(0.3), TwinMerging(0.3), ByomLora(1), ElectMaskRescale(), TallMasks(), SingleTask()]


class Net(nn.Module):
    """An embedding, a normalisation with running statistics, and an output layer that may be tied."""

    def __init__(self, *, tie=False):
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.norm = nn.BatchNorm1d(6)
        self.layer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 9, bias=False)
        if tie:
            self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.layer(self.norm(self.embed(ids))))


class Outer(nn.Module):
    """A model with a head of its own around a `Net`."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.classifier = nn.Linear(9, 3)

    def forward(self, ids):
        return self.classifier(self.net(ids))


@dataclass(frozen=True)
class Headed(Bundle):
    heads: dict = field(default_factory=dict)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def net(*, tie=False, dtype=torch.float32):
    return Net(tie=tie).to(dtype).eval()


def moved(model, *, apart=()):
    """Return weights near a model's; names in `apart` get values of their own though they are tied."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if model.head.weight is model.embed.weight:
        state["head.weight"] = state["embed.weight"]
    for name in [n for n in state if state[n].is_floating_point() and not (n == "head.weight" and n not in apart)]:
        noise = 0.1 * torch.randn(state[name].shape)
        state[name] = (state[name].float() + noise.abs()).to(state[name].dtype)
    if model.head.weight is model.embed.weight and "head.weight" not in apart:
        state["head.weight"] = state["embed.weight"]
    return Weights.of(state)


def packed(model, variant=None, **others):
    """Return a bundle of two tasks near a model, whose reference is a copy of the model's values."""
    reference = Weights.of(copy.deepcopy(model.state_dict()), "reference")
    tuned = {task: moved(model) for task in TASKS} | others
    return Bundle.pack(variant or ByomFft(0.3), tuned, reference, reference)


def holds(model, weights, start=""):
    state = model.state_dict()
    return all(bits(state[start + name]) == bits(weights[name]) for name in weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", KINDS, ids=lambda v: type(v).__name__)
def test_after_many_switches_every_bit_is_the_tasks(variant, dtype):
    model = net(dtype=dtype)
    bundle = packed(model, variant)
    handle, draw = bundle.attach(model), random.Random(0)
    for turn in range(1000 if type(variant) is ByomFft and dtype is torch.float32 else 60):
        task = draw.choice([None, *TASKS])
        handle.switch(task)
        if turn % 50 < 5:
            assert holds(model, bundle.weights(task) if task else bundle.reference) and handle.task == task
    handle.detach()
    assert holds(model, bundle.reference)


def test_a_context_brings_the_task_before_back():
    model = net()
    bundle = packed(model)
    handle = bundle.attach(model)
    handle.switch("a")
    with handle.switch("b") as inner:
        assert inner is handle and holds(model, bundle.weights("b"))
        with handle.switch(None):
            assert handle.task is None and holds(model, bundle.reference)
        assert handle.task == "b" and holds(model, bundle.weights("b"))
    assert handle.task == "a" and holds(model, bundle.weights("a"))
    with pytest.raises(KeyError), handle.switch("b"):
        raise KeyError
    assert handle.task == "a" and holds(model, bundle.weights("a"))


def test_tensors_stay_the_same_objects_and_gradients_stay_off_the_road():
    model = net()
    bundle = packed(model, TwinMerging(0.3))
    before = {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    bundle.attach(model).switch("a")
    assert before == {name: (id(p), p.data_ptr(), p.requires_grad) for name, p in model.named_parameters()}
    assert all(p.grad_fn is None for p in model.parameters())


def test_large_tensors_are_changed_in_pieces(monkeypatch):
    monkeypatch.setattr("byom.checkpoint.changes.PIECE", 7)
    model = net()
    bundle = packed(model, ByomFft(0.5))
    handle = bundle.attach(model)
    for task in ("a", "b", None, "b", "a"):
        handle.switch(task)
        assert holds(model, bundle.weights(task) if task else bundle.reference)


@pytest.mark.parametrize("variant", KINDS, ids=lambda v: type(v).__name__)
def test_a_model_of_another_dtype_gets_the_bits_that_casting_gives(variant):
    model = net()
    bundle = packed(model, variant)
    handle = bundle.attach(model.to(torch.bfloat16))
    for task in ("a", "b"):
        handle.switch(task)
        assert holds(model, bundle.weights(task).to(torch.bfloat16))


def test_a_value_beyond_the_models_dtype_is_refused_before_anything_changes():
    model = net()
    large = Weights.of({n: t * (1e6 if n == "layer.weight" else 1) for n, t in model.state_dict().items()})
    bundle = packed(model, ByomFft(0.3), large=large)
    handle = bundle.attach(model.half())
    with pytest.raises(CheckpointError, match=r"'layer\.weight' has values up to .*float16.*bfloat16"):
        handle.switch("large")
    assert handle.task is None and holds(model, bundle.reference.to(torch.float16))


def test_one_tensor_in_another_layout_is_written_whole():
    model = net()
    bundle = packed(model, ByomFft(0.5))
    model.layer.weight.data = model.layer.weight.data.T.contiguous().T
    handle = bundle.attach(model)
    for task in ("a", "b", None):
        handle.switch(task)
        assert holds(model, bundle.weights(task) if task else bundle.reference)
    assert not model.layer.weight.is_contiguous()


# what a handle says and keeps


def test_the_road_is_said():
    model = net()
    entries, whole = (packed(model, variant).attach(model).road("a") for variant in (ByomFft(0.1), SingleTask()))
    assert re.fullmatch(r"BYOM-FFT: \d+ entries of \d tensors in place and 2 tensors whole", entries)  # running ones
    assert whole == "Single-task: 8 tensors whole"
    delta = Delta(RepresentationSurgery(), {"@readout": {"down": torch.zeros(1, 2), "up": torch.zeros(2, 1)}})
    corrected = Bundle(packed(model).reference, {"a": delta}).attach(model)
    assert corrected.road("a").endswith("no weights change; its correction of features is no weight: apply "
                                        "Delta.readout to the head")  # fmt: skip


def test_positions_take_four_bytes_an_entry_and_can_be_bounded():
    model = net()
    bundle = packed(model, ByomFft(0.3))
    free, bound = bundle.attach(model), bundle.attach(model, cache_bytes=0)
    count = {t: sum(len(p.get("values", [])) for p in delta.parts.values()) for t, delta in bundle.deltas.items()}
    for task in TASKS:
        free.road(task)
    assert free.cached_bytes == 4 * sum(count.values()) > 0 == free.saved_bytes
    for task in ("a", "b", "a", None):
        bound.switch(task)
        assert holds(model, bundle.weights(task) if task else bundle.reference)
        assert bound.cached_bytes == bound.saved_bytes == (4 * count[task] if task else 0)
    with pytest.raises(OptionError, match="cache_bytes=-1 must be a whole number"):
        bundle.attach(model, cache_bytes=-1)


def test_a_detached_handle_says_so():
    model = net()
    handle = packed(model).attach(model)
    handle.switch("a")
    assert repr(handle) == "Attached(task='a', 2 tasks, 9 tensors)"
    handle.detach()
    assert repr(handle) == "Attached(the handle was detached; attach the bundle again)"
    for use in (handle.detach, lambda: handle.switch("a"), lambda: handle.task, lambda: handle.road("a")):
        with pytest.raises(OptionError, match="detached; attach the bundle again"):
            use()


def test_an_unknown_task_is_refused():
    model = net()
    handle = packed(model).attach(model)
    with pytest.raises(OptionError, match="no task 'c'.*Known: a, b"):
        handle.switch("c")
    handle.switch("a")


# names


def wrapped(model):
    return {
        "compiled": lambda: torch.compile(model, backend="eager"),
        "parallel": lambda: nn.DataParallel(model),
        "outer": lambda: Outer(model),
        "compiled outer": lambda: torch.compile(Outer(model), backend="eager"),
    }


@pytest.mark.parametrize("kind", wrapped(None))
def test_wrapped_and_outer_models_are_switched(kind):
    model = net()
    bundle = packed(model)
    handle = bundle.attach(wrapped(model)[kind]())
    handle.switch("a")
    assert holds(model, bundle.weights("a"))


def test_a_reference_with_the_names_of_an_outer_model_fits_its_inner_one():
    model = net()
    state = {f"net.{name}": tensor.clone() for name, tensor in model.state_dict().items()}
    tuned = Weights.of({name: tensor + 1 for name, tensor in state.items() if tensor.is_floating_point()} |
                       {name: tensor for name, tensor in state.items() if not tensor.is_floating_point()})  # fmt: skip
    bundle = Bundle.pack(ByomFft(0.5), {"a": tuned}, Weights.of(state))
    bundle.attach(model).switch("a")
    assert all(bits(model.state_dict()[name.removeprefix("net.")]) == bits(bundle.weights("a")[name]) for name in tuned)


def test_names_that_fit_twice_are_refused():
    twins = nn.ModuleDict({"left": net(), "right": net()})
    with pytest.raises(CheckpointError, match=r"in 2 ways, under 'left\.', 'right\.'; attach the inner module"):
        packed(twins["left"]).attach(twins)


def test_a_module_that_is_registered_twice_is_one():
    outer = Outer(net())
    outer.again = outer.net
    bundle = packed(outer.net)
    bundle.attach(outer).switch("a")
    assert holds(outer, bundle.weights("a"), "again.")


def test_a_tied_tensor_needs_one_of_its_names():
    model = net(tie=True)
    bundle, inner = packed(model, ByomFft(0.5)), copy.deepcopy(model)
    del inner.head
    handle = bundle.attach(inner)
    handle.switch("a")
    assert all(bits(t) == bits(bundle.weights("a")[n]) for n, t in inner.state_dict().items())
    untied = ByomFft(0.5).delta(moved(model, apart=("head.weight",)), bundle.reference)
    handle = Bundle(bundle.reference, {"c": untied}).attach(inner, load=True)
    with pytest.raises(CheckpointError, match=r"task 'c' changes head\.weight, which the model .* does not have"):
        handle.switch("c")


def test_switching_works_in_inference_mode():
    model = net()
    bundle = packed(model, TwinMerging(0.3))
    handle = bundle.attach(model)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        for task in TASKS:
            with mode():
                handle.switch(task)
            assert holds(model, bundle.weights(task))
    handle.switch(None)
    assert not any(tensor.is_inference() for tensor in model.state_dict().values())


def test_a_model_that_lacks_a_tensor_is_refused():
    bundle, model = packed(net()), Outer(net())
    del model.net.layer
    with pytest.raises(WeightsMismatch, match=r"lacks layer\.bias, layer\.weight of reference"):
        bundle.attach(model)


def test_another_shape_is_refused():
    bundle, model = packed(net()), net()
    model.layer = nn.Linear(6, 5)
    with pytest.raises(WeightsMismatch, match=r"'layer\.bias' is \(5,\) in the model and \(6,\) in reference"):
        bundle.attach(model)


# values


def test_a_model_with_other_values_is_refused_or_filled():
    model, other = net(), net()
    bundle = packed(model)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(CheckpointError, match=r"'embed\.weight' does not have the values of .*load=True"):
        bundle.attach(other)
    assert holds(other, Weights.of(before))
    handle = bundle.attach(other, load=True)
    assert holds(other, bundle.reference)
    handle.switch("b")
    assert holds(other, bundle.weights("b"))


@pytest.mark.parametrize("load", [False, True])
def test_a_bundle_in_the_models_own_memory_is_refused(load):
    model = net()
    reference = Weights.of(model.state_dict(), "reference")
    copied = Weights.of(copy.deepcopy(model.state_dict()))
    bundle = Bundle.pack(ByomFft(0.3), {"a": moved(model)}, reference)
    with pytest.raises(CheckpointError, match=r"reference: tensor 'embed\.weight' lies in the memory of the model"):
        bundle.attach(model, load=load)
    stored = Bundle.pack(SingleTask(), {"a": reference}, copied)
    with pytest.raises(CheckpointError, match="what task 'a' stores of '.*' lies in the memory of the model"):
        stored.attach(model, load=load)
    assert holds(model, copied)


@pytest.mark.parametrize("change", ["train", "cast", "layout", "another handle"])
def test_a_model_that_was_changed_since_is_refused(change):
    model = net()
    bundle = packed(model)
    handle, other = bundle.attach(model), bundle.attach(model)
    handle.switch("a")
    if change == "train":
        with torch.no_grad():
            model.layer.bias.add_(1)
    elif change == "cast":
        model.bfloat16()
    elif change == "layout":
        model.layer.weight.data = model.layer.weight.data.T.contiguous().T
    else:
        handle.switch(None)
        other.switch("b")
    with pytest.raises(CheckpointError, match="changed since the last switch.*load=True"):
        handle.switch("b")
    bundle.attach(model, load=True).switch("b")
    assert holds(model, bundle.weights("b").to(model.layer.bias.dtype))


def test_a_model_that_was_written_the_same_values_is_not_changed():
    model = net()
    bundle = packed(model)
    handle = bundle.attach(model)
    handle.switch("a")
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    handle.switch("b")
    assert holds(model, bundle.weights("b"))


# ties


@pytest.mark.parametrize("variant", [ByomFft(0.3), SingleTask()], ids=lambda v: type(v).__name__)
def test_tied_tensors_are_one(variant):
    model = net(tie=True)
    bundle = packed(model, variant)
    assert bundle.reference.ties == {"head.weight": "embed.weight"}
    handle = bundle.attach(model)
    handle.switch("a")
    assert holds(model, bundle.weights("a")) and model.head.weight is model.embed.weight
    handle.detach()
    assert holds(model, bundle.reference)


def test_a_model_that_does_not_tie_gets_both_tensors():
    model = net(tie=True)
    bundle = packed(model)
    apart = net()
    apart.load_state_dict(model.state_dict())
    bundle.attach(apart).switch("a")
    assert holds(apart, bundle.weights("a")) and apart.head.weight is not apart.embed.weight


@pytest.mark.parametrize("variant", [ByomFft(0.5), SingleTask()], ids=lambda v: type(v).__name__)
def test_a_task_that_unties_is_refused_by_a_tied_model_and_fits_another(variant):
    model = net(tie=True)
    bundle = packed(model, variant, c=moved(model, apart=("head.weight",)))
    handle = bundle.attach(model)
    handle.switch("a")
    with pytest.raises(CheckpointError, match=r"'embed\.weight' and 'head\.weight' are one tensor.*task 'c'.*untie"):
        handle.switch("c")
    assert handle.task == "a" and holds(model, bundle.weights("a"))
    apart = net()
    apart.load_state_dict(bundle.reference.state())
    free = bundle.attach(apart)
    for task in ("c", "a", "c", None):
        free.switch(task)
        assert holds(apart, bundle.weights(task) if task else bundle.reference)


def test_a_tied_model_cannot_be_filled_with_what_is_not_tied():
    with pytest.raises(CheckpointError, match=r"'embed\.weight' and 'head\.weight' are one tensor in the model"):
        packed(net()).attach(net(tie=True), load=True)


# compiled modules


def test_a_compiled_graph_sees_the_switch():
    model, ids = net(), torch.arange(9)
    bundle = packed(model)
    compiled = torch.compile(model, backend="eager")
    handle = bundle.attach(compiled)
    with torch.no_grad():
        for task in ("a", "b"):
            handle.switch(task)
            assert torch.equal(compiled(ids), model(ids))
            expected = net()
            expected.load_state_dict(bundle.weights(task).state())
            assert torch.equal(compiled(ids), expected(ids))


# models that cannot be written


def test_models_without_values_are_refused():
    model = net()
    bundle = packed(model)
    with pytest.raises(CheckpointError, match=r"meta device"):
        bundle.attach(copy.deepcopy(model).to("meta"))
    frozen = copy.deepcopy(model)
    with torch.inference_mode():
        frozen.layer.weight = nn.Parameter(model.layer.weight.clone(), requires_grad=False)
    with pytest.raises(CheckpointError, match=r"the model's layer\.weight were made in torch\.inference_mode"):
        bundle.attach(frozen)


def test_a_sharded_model_is_refused():
    class FullyShardedDataParallel(Outer):
        pass

    with pytest.raises(CheckpointError, match="wrapped by FSDP"):
        packed(net()).attach(FullyShardedDataParallel(net()))


def test_a_quantised_model_is_refused():
    model = net()
    bundle = packed(model)
    for shape in ((6, 6), (18, 1)):
        model.layer.weight = nn.Parameter(torch.zeros(shape, dtype=torch.int8), requires_grad=False)
        with pytest.raises(CheckpointError, match=r"'layer\.weight' is torch\.int8 in the model.*quantis"):
            bundle.attach(model)


# a switch that fails


class Torn(Exception):
    pass


def torn(monkeypatch, after, handle):
    """Let the tensor that comes after some others fail to be written."""
    original, left = type(handle)._move, [after]

    def move(self, *arguments):
        if not left[0]:
            raise Torn
        left[0] -= 1
        original(self, *arguments)

    monkeypatch.setattr(type(handle), "_move", move)


@pytest.mark.parametrize("variant", [TwinMerging(0.3), SingleTask()], ids=lambda v: type(v).__name__)
def test_a_switch_that_fails_leaves_the_reference(variant, monkeypatch):
    model = net()
    bundle = packed(model, variant)
    handle = bundle.attach(model)
    handle.switch("a")
    with monkeypatch.context() as patch:
        torn(patch, 3, handle)
        with pytest.raises(Torn):
            handle.switch("b")
    assert handle.task is None and holds(model, bundle.reference)
    handle.switch("b")
    assert holds(model, bundle.weights("b"))


def test_a_switch_that_cannot_be_mended_is_not_passed_over(monkeypatch):
    model = net()
    bundle = packed(model)
    handle = bundle.attach(model)
    with monkeypatch.context() as patch:
        torn(patch, 1, handle)
        patch.setattr("byom.checkpoint.slots.Slot.fill", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            handle.switch("a")
    for use in (lambda: handle.switch("a"), handle.detach, lambda: handle.task):
        with pytest.raises(ByomError, match="switch to 'a' was cut short.*load=True"):
            use()
    bundle.attach(model, load=True).switch("a")
    assert holds(model, bundle.weights("a"))


# heads


def headed(model, **given):
    plain = packed(model.net)
    return Headed(plain.reference, plain.deltas, plain.base, heads={t: Weights.of(h, t) for t, h in given.items()})


def drawn(classes):
    return {"classifier.weight": torch.randn(classes, 9), "classifier.bias": torch.randn(classes)}


def test_heads_of_every_size_come_and_go():
    model = Outer(net())
    own = copy.deepcopy(model.classifier.state_dict())
    given = {"a": drawn(3), "b": drawn(5)}
    bundle = headed(model, **given)
    handle = bundle.attach(model)
    for task in ("a", "b", "a", None, "b", None):
        handle.switch(task)
        expected = given[task] if task else {f"classifier.{name}": tensor for name, tensor in own.items()}
        assert all(bits(model.state_dict()[name]) == bits(tensor) for name, tensor in expected.items())
        assert holds(model, bundle.weights(task) if task else bundle.reference, "net.")
    handle.switch("b")
    model.classifier.weight.data.zero_()
    handle.switch(None)
    handle.switch("b")
    assert bits(model.classifier.weight.detach()) == bits(given["b"]["classifier.weight"])


def test_heads_can_be_left_out_and_must_have_a_place():
    model = Outer(net())
    bundle = headed(model, a=drawn(3))
    own = copy.deepcopy(model.classifier.state_dict())
    bundle.attach(model, heads=False).switch("a")
    assert all(bits(model.classifier.state_dict()[name]) == bits(tensor) for name, tensor in own.items())
    inner = bundle.attach(net(), load=True)
    with pytest.raises(CheckpointError, match=r"has no 'classifier\.bias' for it.*heads=False"):
        inner.switch("a")
    assert inner.task is None


def test_a_head_that_is_a_shared_tensor_is_refused():
    model = Outer(net())
    bundle = headed(model, a={"net.layer.bias": torch.zeros(6)})
    with pytest.raises(CheckpointError, match=r"'net\.layer\.bias' of the head of task 'a' is 'layer\.bias' of the sh"):
        bundle.attach(model).switch("a")


def test_a_head_of_another_size_is_refused_by_a_compiled_model():
    model = Outer(net())
    bundle = headed(model, a=drawn(3), b=drawn(5))
    handle = bundle.attach(torch.compile(model, backend="eager"))
    handle.switch("a")
    with pytest.raises(CheckpointError, match=r"is \(5,\), and \(3,\) in the model, which torch\.compile compiled"):
        handle.switch("b")
    assert handle.task == "a"


def test_a_switch_that_fails_in_a_head_puts_the_models_own_back(monkeypatch):
    model = Outer(net())
    own = copy.deepcopy(model.state_dict())
    handle = headed(model, a=drawn(3), b=drawn(5)).attach(model)
    handle.switch("a")
    original, calls = heads._put, []

    def put(*arguments):
        calls.append(arguments)
        if len(calls) == 4:  # two of task a's were put back, and one of task b's is in place
            raise Torn
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(heads, "_put", put)
        with pytest.raises(Torn):
            handle.switch("b")
    assert handle.task is None and holds(model, Weights.of(own))
