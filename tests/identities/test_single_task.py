"""Single-task: whole models where one task has no adapter on the reference, adapters beside one model otherwise."""

import pytest
import torch

from byom.checkpoint.bundle import Bundle
from byom.errors import CheckpointError
from byom.merge.base import Problem
from byom.pipeline import measure
from byom.variants.base.delta import Delta
from byom.variants.single_task import SingleTask, SingleTaskAdapters
from byom.weights import Weights
from byom.weights.lowrank import Adapted
from tests.identities.test_lora import SHAPES, WIDTH, adapted, dense, model, pieces
from tests.problems import bits, same

FACTORS = sum(p.left.numel() + p.right.numel() for each in pieces().values() for p in each)


def given(dtype=torch.float32, tasks=(1, 2, 3)):
    base = model(dtype)
    return Problem(base, {f"task{seed}": adapted(base, seed) for seed in tasks})


def test_adapters_cost_one_model_and_their_factors():
    problem = given()
    served = SingleTask().serve(problem, problem.pretrained)
    said = measure.stored(served, problem)
    assert said["parameters"] == problem.pretrained.numel + 3 * (FACTORS + WIDTH)
    assert said["shared_models"] == 1 and served.shared == [problem.pretrained]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_an_adapter_put_back_has_the_bits_of_the_adapted_weights_in_the_dtype_of_the_model(dtype, tmp_path):
    problem = given(dtype)
    bundle = Bundle.pack(SingleTask(), problem.finetuned, problem.pretrained)
    opened = Bundle.open(bundle.save(tmp_path / "bundle"))
    for task, expert in problem.finetuned.items():
        for name in SHAPES:
            expected = bits(expert[name].to(dtype))
            assert bits(bundle.weights(task)[name]) == bits(opened.weights(task)[name]) == expected


def test_what_was_trained_beside_and_below_an_adapter_comes_back():
    base = model()
    both = {"mlp": base["mlp"] * 2, "rest": base["rest"] - 1}  # `mlp` is adapted too
    expert = Adapted(base, pieces(), both)
    delta = SingleTask().serve(Problem(base, {"a": expert}), base).deltas["a"]
    assert same(delta.apply(base), expert)
    assert delta.stored_parameters == FACTORS + base["mlp"].numel() + base["rest"].numel()


def test_a_difference_names_what_packed_it(tmp_path):
    problem = given()
    delta = SingleTask().serve(problem, problem.pretrained).deltas["task2"]
    opened = Delta.open(delta.save(tmp_path / "delta.safetensors"))
    assert opened.variant == SingleTaskAdapters() and same(
        opened.apply(problem.pretrained), problem.finetuned["task2"].materialise()
    )


def test_one_whole_model_among_them_makes_all_of_them_whole():
    problem = given()
    mixed = Problem(problem.pretrained, {**problem.finetuned, "whole": dense(adapted(problem.pretrained, 4))})
    served = SingleTask().serve(mixed, problem.pretrained)
    assert served.shared == [] and {type(delta.variant) for delta in served.deltas.values()} == {SingleTask}
    assert measure.stored(served, mixed)["parameters"] == 4 * problem.pretrained.numel
    assert all(same(served.weights(task), expert) for task, expert in mixed.finetuned.items())


def test_adapters_on_another_model_are_stored_whole():
    problem, other = given(), Weights.of({name: tensor + 1 for name, tensor in model().state().items()})
    served = SingleTask().serve(problem, other)
    assert served.shared == []
    assert all(same(served.weights(task), expert) for task, expert in problem.finetuned.items())


def test_factors_that_are_not_finite_are_refused_by_name():
    problem = given()
    problem.finetuned["task2"].factored["mlp"][0].left[3, 0] = float("inf")
    with pytest.raises(CheckpointError, match="task2: tensor 'mlp'"):
        SingleTask().serve(problem, problem.pretrained)
