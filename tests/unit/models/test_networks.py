"""Built-in networks: shapes, sizes, and that the student is what TensorRT and INT8 want."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from fmdeploy.errors import ConfigError
from fmdeploy.models import example_inputs, input_list, named_outputs, num_parameters, predictor
from fmdeploy.models.recompute import checkpoint_activations
from fmdeploy.models.transformer import transformer_blocks
from fmdeploy.tasks.bev_occupancy import BevOccupancy
from fmdeploy.tasks.image_classification import ImageClassification

BEV = BevOccupancy()
SMALL = {"dim": 16, "depth": 1, "heads": 2, "stem_width": 8, "width": 16}


def test_the_student_has_a_tenth_of_the_teachers_parameters() -> None:
    teacher, student = num_parameters(BEV.teacher({})), num_parameters(BEV.student("cnn", {}))
    assert 1_900_000 < teacher < 2_500_000
    assert student <= teacher / 10


@pytest.mark.parametrize("name", ["cnn", "vit"])
def test_students_return_the_tasks_outputs(name: str) -> None:
    student = BEV.student(name, {}).eval()
    named = named_outputs(BEV.io, student(*example_inputs(BEV.io, batch=2)))
    assert {key: tuple(value.shape) for key, value in named.items()} == {"bev": (2, 5, 64, 64), "scene": (2, 8)}
    assert isinstance(dict(student.named_modules())[BEV.student_layer], nn.Module)


def test_the_cnn_is_traceable_and_its_residuals_are_plain_adds_before_relu() -> None:
    graph = fx.symbolic_trace(BEV.student("cnn", {}))
    adds = [node for node in graph.graph.nodes if node.op == "call_function" and "add" in str(node.target)]
    modules = dict(graph.named_modules())
    assert len(adds) == 1 + 1 + 2 + 1  # stem, skip, trunk, refine
    for node in adds:
        (user,) = node.users
        assert isinstance(modules[str(user.target)], nn.ReLU)


def test_the_cnn_holds_only_operators_with_int8_kernels_and_widths_of_16() -> None:
    student = BEV.student("cnn", {})
    leaves = {type(m) for m in student.modules() if not list(m.children())}
    assert leaves == {
        nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Upsample, nn.ConvTranspose2d, nn.AdaptiveAvgPool2d, nn.Linear
    }
    convs = [m for m in student.modules() if isinstance(m, nn.Conv2d)]
    assert all(m.out_channels % 16 == 0 for m in convs)
    assert all(m.groups == 1 for m in convs)


def test_the_teacher_has_no_batch_statistics() -> None:
    assert not [m for m in BEV.teacher(SMALL).modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def test_activation_checkpointing_changes_memory_not_gradients() -> None:
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        teacher = BEV.teacher({**SMALL, "activation_checkpointing": recompute})
        inputs = [torch.rand(2, *spec.shape, generator=torch.Generator().manual_seed(1)) for spec in BEV.io.inputs]
        bev, scene = teacher(*inputs)
        (bev.square().mean() + scene.square().mean()).backward()
        gradients.append({name: p.grad for name, p in teacher.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient is not None, name
        torch.testing.assert_close(gradient, gradients[1][name])


def test_a_network_that_cannot_recompute_says_so() -> None:
    checkpoint_activations(nn.Linear(2, 2), None)
    checkpoint_activations(nn.Linear(2, 2), False)
    with pytest.raises(ConfigError, match="no part of this network can recompute its activations"):
        checkpoint_activations(nn.Linear(2, 2), True)


def test_blocks_are_recomputed_one_by_one() -> None:
    """Each when its turn comes in the backward pass: together they would all be in memory again."""
    teacher, ran = BEV.teacher({**SMALL, "depth": 3, "activation_checkpointing": True}), []
    for number, block in enumerate(transformer_blocks(teacher).values()):
        block.register_forward_pre_hook(lambda module, inputs, number=number: ran.append(number))
    bev, scene = teacher(*example_inputs(BEV.io))
    assert ran == [0, 1, 2]
    (bev.square().mean() + scene.square().mean()).backward()
    assert ran == [0, 1, 2, 2, 1, 0]


def test_the_teachers_layer_gives_a_map_that_can_be_mirrored() -> None:
    teacher = BEV.teacher(SMALL)
    shapes: list[tuple[int, ...]] = []
    teacher.get_submodule(BEV.teacher_layer).register_forward_hook(lambda m, i, output: shapes.append(output.shape))
    teacher(*example_inputs(BEV.io))
    assert shapes == [(1, 16, 8, 8)]


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match="multiple of heads"):
        BEV.teacher({"dim": 20, "heads": 3})
    with pytest.raises(ConfigError, match="did you mean 'width'"):
        BEV.teacher({"widht": 16})


def test_classifiers_return_logits() -> None:
    task = ImageClassification()
    for network in (task.teacher({"dim": 16, "depth": 1}), task.student("cnn", {"width": 16})):
        assert named_outputs(task.io, network(*example_inputs(task.io, 2)))["logits"].shape == (2, 10)


def test_a_network_with_another_number_of_outputs_is_refused() -> None:
    with pytest.raises(Exception, match=r"expected bev, scene, found 1"):
        named_outputs(BEV.io, torch.zeros(1, 5, 64, 64))


def test_predictor_is_the_network_in_evaluation_mode() -> None:
    task = ImageClassification()
    student = task.student("cnn", {"width": 16})
    image = torch.rand(3, 3, 32, 32)
    found = predictor(student, task.io)({"image": image.numpy()})["logits"]
    with torch.no_grad():
        expected = student.eval()(*input_list(task.io, {"image": image}))
    assert found.tobytes() == expected.numpy().tobytes()
