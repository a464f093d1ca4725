"""The depthwise students: shapes, what they are made of, and that they trace, save and quantise like the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fmdeploy.models import example_inputs, named_outputs, num_parameters
from fmdeploy.quantize.build import tracing_example
from fmdeploy.quantize.trace import float_graph
from fmdeploy.task import Task
from fmdeploy.tasks.bev_occupancy import BevOccupancy
from fmdeploy.tasks.image_classification import ImageClassification


class Images(ImageClassification):
    def teacher(self, options: object) -> nn.Module:
        raise NotImplementedError


@pytest.mark.parametrize("task", [BevOccupancy(), Images()], ids=["bev", "images"])
def test_depthwise_students_fit_the_task_and_trace(task: Task) -> None:
    student = task.student("depthwise", {}).eval()
    named = named_outputs(task.io, student(*example_inputs(task.io, 2)))
    assert {name: tuple(v.shape) for name, v in named.items()} == {o.name: (2, *o.shape) for o in task.io.outputs}
    assert isinstance(student.get_submodule(task.student_layer), nn.Module)
    graph = float_graph(student, tracing_example(task.io), "fx")
    assert not [m for m in graph.modules() if isinstance(m, nn.BatchNorm2d)], "every BatchNorm is folded"
    grouped = [m for m in graph.modules() if isinstance(m, nn.Conv2d) and m.groups > 1]
    assert len(grouped) >= 4
    assert all(m.groups == m.in_channels == m.out_channels for m in grouped)
    rebuild: Any = student.rebuild
    again = task.student(rebuild[0], rebuild[1])
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in student.state_dict().items()}


def test_it_is_less_than_half_of_the_dense_student() -> None:
    task = BevOccupancy()
    assert num_parameters(task.student("depthwise", {})) < num_parameters(task.student("cnn", {})) / 2


def test_sizes_and_activation_can_be_chosen() -> None:
    task = BevOccupancy()
    student = task.student("depthwise", {"width": 16, "dilations": [1], "activation": "relu6", "expand": 2})
    leaves = {type(m) for m in student.modules()}
    assert nn.ReLU6 in leaves
    assert nn.SiLU not in leaves
    with torch.no_grad():
        assert student.eval()(*example_inputs(task.io))[0].shape == (1, 5, 64, 64)
