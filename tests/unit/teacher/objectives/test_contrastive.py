"""Contrast between sensors: the loss by hand, who may be a negative, and the queue."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fmdeploy.data.format import open_dataset
from fmdeploy.errors import ConfigError
from fmdeploy.models.tokens import backbone_of
from fmdeploy.task import Samples, Task, load_task
from fmdeploy.teacher.objectives.contrastive import Contrastive, ContrastiveConfig, sensors_of
from fmdeploy.teacher.objectives.contrastive_queue import EMPTY, KeyQueue, info_nce, strangers
from support.training_data import TEACHER, write_scenes

SIZES = {key: TEACHER[key] for key in ("dim", "depth", "heads", "stem_width", "width")}
SMALL = {"width": 8, "hidden": 16, "token_width": 4, "queue": 12}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data`."""
    folder = tmp_path_factory.mktemp("contrastive")
    write_scenes(folder / "data")
    return folder


@pytest.fixture(scope="module")
def samples(home: Path) -> Samples:
    """The train split."""
    return load_task("bev-occupancy").samples(open_dataset(home / "data"), "train")


def _unit(*rows: tuple[float, ...]) -> Tensor:
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=-1)


def _made(**options: Any) -> tuple[Task, torch.nn.Module, Contrastive]:
    torch.manual_seed(0)
    task = load_task("bev-occupancy")
    teacher = task.teacher(SIZES)
    return task, teacher, Contrastive(task, teacher, ContrastiveConfig(**{**SMALL, **options}), steps=10)


def _batch(objective: Contrastive, samples: Samples, index: Any) -> dict[str, dict[str, Tensor]]:
    arrays = {"inputs": samples.batch(index)[0], **objective.arrays(samples, index, [])}
    return {kind: {name: torch.from_numpy(x) for name, x in values.items()} for kind, values in arrays.items()}


def test_info_nce_is_what_the_formula_says() -> None:
    query, keys = _unit((1, 0), (0, 1)), _unit((1, 0), (1, 1), (-1, 0))
    allowed = torch.tensor([[True, True, True], [True, True, False]])
    root = np.sqrt(0.5)
    first = -np.log(np.exp(4.0) / (np.exp(4.0) + np.exp(4 * root) + np.exp(-4.0)))
    second = -np.log(np.exp(4 * root) / (1 + np.exp(4 * root)))  # its third key is masked
    found = info_nce(query, keys, torch.tensor([0, 1]), allowed, torch.tensor(4.0))
    assert float(found) == pytest.approx((first + second) / 2, rel=1e-6)


def test_a_masked_key_has_no_say_and_a_query_without_negatives_no_loss() -> None:
    query, positive, scale = _unit((1, 0.5)), torch.tensor([0]), torch.tensor(7.0)
    losses = []
    for third in ((0.2, -1.0), (1.0, 0.4)):
        keys = _unit((1, 0), (0, 1), third)
        losses.append([float(info_nce(query, keys, positive, torch.tensor([mask]), scale))
                       for mask in ([True, True, False], [True, True, True], [False, False, False])])
    assert losses[0][0] == losses[1][0]
    assert losses[0][1] != losses[1][1]
    assert losses[0][2] == losses[1][2] == 0


def test_frames_of_the_same_simulation_and_empty_places_are_no_negatives() -> None:
    allowed = strangers(torch.tensor([3, 5]), torch.tensor([3, 5, 3, EMPTY, 7]))
    assert allowed.tolist() == [[False, True, False, False, True], [True, False, True, False, True]]


def test_the_queue_wraps_and_keeps_the_newest() -> None:
    queue = KeyQueue(2, 5, (1,))
    for start in (0, 3, 6):
        numbers = torch.arange(start, start + 3)
        queue.push(torch.stack((numbers, -numbers)).float()[..., None], numbers)
    assert queue.group_Q.tolist() == [5, 6, 7, 8, 4]
    assert int(queue.head) == 4
    assert queue.keys_SQP[0, :, 0].tolist() == [5, 6, 7, 8, 4]
    assert queue.keys_SQP[1, 0, 0] == -5
    many = torch.arange(100, 112)
    queue.push(torch.stack((many, many)).float()[..., None], many)
    assert sorted(queue.group_Q.tolist()) == [107, 108, 109, 110, 111]
    assert set(queue.state_dict()) == {"keys_SQP", "group_Q", "head"}


def test_the_backbone_sees_one_sensor_at_a_time(samples: Samples, monkeypatch: pytest.MonkeyPatch) -> None:
    _, teacher, objective = _made(fused=False)
    backbone, seen = backbone_of(teacher, where="test"), []
    whole = backbone.tokens

    def noted(*inputs: Tensor) -> Tensor:
        seen.append(inputs)
        return whole(*inputs)

    monkeypatch.setattr(backbone, "tokens", noted)
    batch = _batch(objective, samples, np.arange(3))
    objective.losses(teacher, batch)
    (lidar, camera), = seen
    assert torch.equal(lidar[:3], batch["inputs"]["lidar"])
    assert not lidar[3:].any()
    assert torch.equal(camera[3:], batch["inputs"]["camera"])
    assert not camera[:3].any()


def test_queue_and_key_encoder_move_after_a_step_only(samples: Samples) -> None:
    _, teacher, objective = _made(keep=0.75)
    batch = _batch(objective, samples, np.array([0, 7, 14]))
    assert objective.queue is not None
    objective.losses(teacher, batch)
    assert int(objective.queue.head) == 0
    backbone = backbone_of(teacher, where="test")
    name, weight = next(iter(backbone.named_parameters()))
    before = weight.detach().clone()
    with torch.no_grad():
        weight.add_(1)
    seen = objective.after_step(teacher, 0)
    assert int(objective.queue.head) == 3
    assert objective.queue.group_Q[:3].tolist() == np.asarray(samples.groups)[[0, 7, 14]].tolist()
    kept = objective.target.module.backbone.get_parameter(name)  # type: ignore[union-attr]
    torch.testing.assert_close(kept, before + 0.25)
    assert set(seen) == {"feature_std", "effective_rank", "temperature"}
    assert not any(parameter.requires_grad for parameter in objective.target.parameters())


def test_it_learns_which_views_belong_together(samples: Samples) -> None:
    _, teacher, objective = _made(queue=0, temperature=0.2)
    _, first = np.unique(samples.groups, return_index=True)
    batch = _batch(objective, samples, first[:6])
    trained = [p for p in (*backbone_of(teacher, where="test").parameters(), *objective.parameters())
               if p.requires_grad]
    optimizer, values = torch.optim.Adam(trained, lr=3e-3), []
    for step in range(30):
        loss = sum(objective.losses(teacher, batch).values())
        optimizer.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimizer.step()
        objective.after_step(teacher, step)
        values.append(float(loss.detach()))  # type: ignore[union-attr]
    assert values[0] > 2.5  # close to 2 log 6: nothing is known at first
    assert values[-1] < 0.5 * values[0]


def test_a_task_with_one_sensor_is_refused(home: Path) -> None:
    with pytest.raises(ConfigError, match="has only one"):
        sensors_of(load_task("image-classification"))
    task = load_task("image-classification")
    with pytest.raises(ConfigError, match="selfdistill"):
        Contrastive(task, task.teacher({}), ContrastiveConfig(), steps=1)
