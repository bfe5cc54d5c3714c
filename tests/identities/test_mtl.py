"""Joint fine-tuning as a reference row: what it asks of the pipeline, and what it refuses."""

import pytest
import torch

from byom.errors import CheckpointError, OptionError
from byom.merge.base import Problem
from byom.merge.mtl import JointFineTuning
from byom.weights import Weights


class Trainer:
    """Stands for the pipeline's training: notes the shares it is asked for."""

    def __init__(self, value=2.0):
        self.asked, self.value = [], value

    def joint(self, shares):
        self.asked.append(shares)
        return Weights.of({"w": torch.full((3,), self.value)}, "joint")


def problem(probe, tasks=("a", "b", "c")):
    return Problem(Weights.of({"w": torch.zeros(3)}), {t: Weights.of({"w": torch.ones(3)}) for t in tasks}, probe=probe)


def test_every_task_weighs_alike_unless_told_otherwise():
    trainer = Trainer()
    assert JointFineTuning()(problem(trainer))["w"].tolist() == [2.0] * 3
    assert trainer.asked == [{"a": 1.0, "b": 1.0, "c": 1.0}]


def test_weights_go_to_the_tasks_in_order():
    trainer = Trainer()
    JointFineTuning((0.5, 0.0, 2.0))(problem(trainer))
    assert trainer.asked == [{"a": 0.5, "b": 0.0, "c": 2.0}]


@pytest.mark.parametrize("weights", [(-1.0, 1.0, 1.0), (0.0, 0.0, 0.0)])
def test_weights_out_of_range_are_refused(weights):
    with pytest.raises(OptionError, match="merge.weights"):
        JointFineTuning(weights)


def test_a_wrong_number_of_weights_is_refused():
    with pytest.raises(OptionError, match="2 values for 3 tasks"):
        JointFineTuning((1.0, 2.0))(problem(Trainer()))


def test_it_says_that_it_needs_labels_and_refuses_without_inputs():
    needs = JointFineTuning().needs
    assert needs.labels and needs.joint and needs.words == "weights, labelled train inputs"
    with pytest.raises(OptionError, match="has none"):
        JointFineTuning()(problem(None))


def test_a_joint_model_that_diverged_is_refused():
    with pytest.raises(CheckpointError, match="joint: tensor 'w' has 3 of 3"):
        JointFineTuning()(problem(Trainer(float("nan"))))["w"]
