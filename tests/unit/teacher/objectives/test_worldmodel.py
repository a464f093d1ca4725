"""The world model: what it may look at, what it learns, and that rollouts are its one-step predictions in a row."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.data.format import open_dataset
from fmdeploy.errors import ConfigError, DataError
from fmdeploy.models.saved import load_model
from fmdeploy.task import load_task
from fmdeploy.tasks.bev_occupancy_samples import BevSamples
from fmdeploy.teacher.objectives.nextcodes import MAX_FRAMES, ego_action
from fmdeploy.teacher.objectives.pretraining import Pretraining
from fmdeploy.teacher.objectives.registry import choose
from fmdeploy.teacher.objectives.rollout import code_scores, next_logits, predict_future, rollout
from fmdeploy.teacher.objectives.store import load_objective
from fmdeploy.teacher.objectives.worldmodel import KIND, MIRROR_3, WorldModel, WorldModelConfig, constant_motion
from fmdeploy.teacher.train import train
from support.blinking import SETTINGS, SIZES, write_blinking
from support.processes import FMDEPLOY
from support.training_data import write_scenes

ACTIONS = (*SETTINGS, "worldmodel.actions=true")
STEPS = 120
Home = dict[str, Artifact]


def learn(data: Path, out: Path, settings: tuple[str, ...], steps: int = STEPS, **more: Any) -> Artifact:
    return train(data=data, out=out, objective=("worldmodel",), set=settings, steps=steps, **{**SIZES, **more})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    """World models of the two blinking worlds: `clock`, and `driver`, which is told the motion."""
    folder = tmp_path_factory.mktemp("worldmodel")
    write_blinking(folder / "c", "clock")
    write_blinking(folder / "d", "driver")
    return {"clock data": open_artifact(folder / "c"), "driver data": open_artifact(folder / "d"),
            "clock": learn(folder / "c", folder / "clock", SETTINGS),
            "driver": learn(folder / "d", folder / "driver", ACTIONS)}


class World:
    """A trained world model and the test samples."""

    def __init__(self, home: Home, name: str) -> None:
        loaded = load_model(home[name])
        self.teacher = loaded.module
        self.model = cast(WorldModel, load_objective(home[name], loaded, "worldmodel"))
        data = open_dataset(home["clock data" if name == "clock" else "driver data"].root)
        self.samples = cast(BevSamples, loaded.task.samples(data, "test"))
        self.index = np.arange(len(self.samples))
        self.inputs = {k: torch.from_numpy(v) for k, v in self.samples.batch(self.index)[0].items()}
        self.motion = torch.from_numpy(self.samples.motion(self.index, range(1, 9)))
        frames = torch.from_numpy(self.samples.frames(self.index, range(1, 9))).float()
        with torch.no_grad():
            self.state = self.model.tokens(self.teacher, self.inputs)
            self.codes = self.model.vae.codes(frames.flatten(0, 1)).view(len(self.index), 8, -1)


def fresh(**options: Any) -> tuple[WorldModel, Tensor, Tensor]:
    """An untrained model, tokens of three samples and random codes of eight frames."""
    torch.manual_seed(0)
    task = load_task("bev-occupancy")
    teacher = task.teacher({key: SIZES[key] for key in ("dim", "depth", "heads", "stem_width", "width")})
    small: dict[str, Any] = {"codes": 32, "code_dim": 4, "hidden": 16, "width": 16, "depth": 1, "heads": 2}
    model = WorldModel(task, teacher, WorldModelConfig(**{**small, **options}), steps=10).eval()
    return model, torch.randn(3, 65, 16), torch.randint(32, (3, 8, model.config.grid**2))


def test_it_learns_what_the_past_tells(home: Home) -> None:
    world = World(home, "clock")
    with torch.no_grad():
        score = code_scores(world.model, world.state, world.codes)
    counts = torch.bincount(world.codes.flatten()).float()
    unigram = -float(torch.special.xlogy(counts / counts.sum(), counts / counts.sum()).sum())
    still = (world.codes[:, 1:] == world.codes[:, :-1]).float().mean()
    assert score.right_BT.mean() > still + 0.05  # persistence: every second frame differs
    assert score.right_BT.min() > 0.97
    assert score.nats_BT.mean() < 0.5 * unigram
    log = [json.loads(line) for line in home["clock"].path("log.jsonl").read_text().splitlines()]
    assert {"codes", "frames", "commitment", "perplexity", "restarted", "code_accuracy"} <= set(log[-1])
    assert log[-1]["perplexity"] > 1
    first = STEPS // 4  # the tokeniser's share
    assert [record["codes"] for record in log[:first]] == pytest.approx([np.log(16)] * first)
    assert all(record["frames"] == record["commitment"] == 0 for record in log[first:])
    assert log[first - 1]["frames"] < 0.5 * log[0]["frames"]
    assert log[-1]["codes"] < 0.2 * log[first]["codes"]


def test_what_a_step_does_not_train_stays_to_the_last_bit(
    home: Home, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither weight decay nor momentum moves the backbone in the tokeniser's steps, or the tokeniser afterwards."""
    seen: list[dict[str, Tensor]] = []
    after_step = WorldModel.after_step

    def looking(self: WorldModel, teacher: torch.nn.Module, step: int) -> Any:
        told = after_step(self, teacher, step)
        parts = {"backbone": teacher.get_submodule("backbone"), "predictor": self.predictor, "vae": self.vae}
        seen.append({name: parameters_to_vector(part.parameters()).detach() for name, part in parts.items()})
        return told

    monkeypatch.setattr(WorldModel, "after_step", looking)
    made = learn(home["clock data"].root, tmp_path / "t", SETTINGS, steps=8, weight_decay=0.5, accumulation=2)
    first = cast(WorldModel, load_objective(made, load_model(made), "worldmodel")).first_steps
    assert first == 2
    torch.manual_seed(0)
    start = load_task("bev-occupancy").teacher({key: SIZES[key] for key in ("dim", "depth", "heads", "stem_width", "width")})
    assert torch.equal(seen[first - 1]["backbone"], parameters_to_vector(start.get_submodule("backbone").parameters()))
    assert torch.equal(seen[0]["predictor"], seen[first - 1]["predictor"])
    assert torch.equal(seen[first - 1]["vae"], seen[-1]["vae"])
    assert not torch.equal(seen[0]["vae"], seen[first - 1]["vae"])
    for part in ("backbone", "predictor"):
        assert not torch.equal(seen[first - 1][part], seen[-1][part])


def test_a_backbone_rests_only_where_no_objective_trains_it() -> None:
    task = load_task("bev-occupancy")
    teacher = task.teacher({key: SIZES[key] for key in ("dim", "depth", "heads", "stem_width", "width")})
    alone, beside = (Pretraining(task, teacher, choose(names, SETTINGS), steps=8)
                     for names in (("worldmodel",), ("worldmodel", "mae")))
    own = set(cast(WorldModel, beside.each()["worldmodel"]).predictor.parameters())
    assert set(alone.resting(0)) >= set(teacher.get_submodule("backbone").parameters())
    assert set(beside.resting(0)) == own
    assert set(beside.resting(2)) == set(cast(WorldModel, beside.each()["worldmodel"]).vae.parameters())


def test_a_rollout_of_many_steps_stays_on_the_path(home: Home) -> None:
    world = World(home, "clock")
    truth = world.samples.occupancy(world.index, range(1, 9))
    for draws, least in ((0, 0.99), (4, 0.9)):
        said = predict_future(world.model, world.teacher, world.inputs, draws=draws).numpy()
        assert said.shape == truth.shape
        assert ((said > 0.5) == (truth > 0)).mean() > least


def test_a_rollout_along_the_true_codes_is_the_one_step_predictions() -> None:
    for window in (1, 3):
        model, state, codes = fresh(window=window)
        with torch.no_grad():
            forced = rollout(model, state, known_BTG=codes)
            table = model.vae.table().flatten(1)
            for step in range(MAX_FRAMES):
                one = next_logits(model, state, codes[:, :step], None).softmax(-1) @ table
                assert torch.allclose(model.vae.picture(one), forced.planes_BTCHW[:, step], atol=1e-5)
            assert torch.equal(forced.codes_BTG, codes)


def test_training_sees_what_inference_computes() -> None:
    model, state, codes = fresh(window=3)
    first = torch.tensor([1, 1, 1])
    before = torch.cat((codes[:, 7:], codes[:, :2]), dim=1)  # what stands for the present is ignored
    with torch.no_grad():
        taught = model.predict(state, before, first == 1, first, None)
        for step in range(3):
            assert torch.allclose(taught[:, step], next_logits(model, state, codes[:, :step], None), atol=1e-5)


def test_no_frame_sees_a_later_one_and_all_see_the_past() -> None:
    model, state, codes = fresh(window=3)
    first = torch.tensor([2, 3, 4])
    with torch.no_grad():
        old = model.predict(state, codes[:, :3], first < 0, first, None)
        for changed in range(3):
            other = codes[:, :3].clone()
            other[:, changed] = (other[:, changed] + 1) % 32
            new = model.predict(state, other, first < 0, first, None)
            moved = (new - old).abs().amax((0, 2, 3)) > 1e-6
            assert moved.tolist() == [step >= changed for step in range(3)]
        new = model.predict(state.roll(1, 0), codes[:, :3], first < 0, first, None)
        assert ((new - old).abs().amax((0, 2, 3)) > 1e-6).all()


def test_codes_lie_over_the_tokens_of_their_own_place() -> None:
    model, _, _ = fresh(grid=16)
    grid = torch.arange(256.0).view(1, 1, 256, 1)
    places = model._to_places(grid)
    assert places.shape == (1, 1, 64, 4)
    assert places[0, 0, 9].tolist() == [34, 35, 50, 51]  # row 1, column 1 of the tokens: rows and columns 2 and 3
    assert torch.equal(model._to_grid(places[..., None]), grid)


def test_the_present_frame_is_not_given(home: Home) -> None:
    """The first frame is predicted from the backbone's tokens alone: so they must hold the past."""
    world = World(home, "clock")
    blind = torch.zeros_like(world.state)
    with torch.no_grad():
        seen = code_scores(world.model, world.state, world.codes[:, :1])
        unseen = code_scores(world.model, blind, world.codes[:, :1])
    assert unseen.nats_BT.mean() > seen.nats_BT.mean() + 0.05


def test_actions_change_predictions_where_they_are_enabled(home: Home) -> None:
    world, nats = World(home, "driver"), {}
    with torch.no_grad():
        for name, motion in (("true", world.motion), ("others", 3 - world.motion)):
            nats[name] = code_scores(world.model, world.state, world.codes, motion).nats_BT.mean()
        with pytest.raises(ConfigError, match="must be told"):
            rollout(world.model, world.state)
        deaf, state, _ = fresh()
        said = [rollout(deaf, state, motion_BT3=motion, draws=1).occupied_BTHW for motion in (None, world.motion[:3])]
    assert nats["others"] > nats["true"] + 0.1
    assert torch.equal(*said)


def test_draws_are_repeatable_and_differ_by_seed() -> None:
    model, state, _ = fresh()
    with torch.no_grad():
        one, same, other = (rollout(model, state, frames=2, draws=1, seed=seed).codes_BTG for seed in (0, 0, 1))
        part = rollout(model, state[1:2], frames=2, draws=1, seed=0).codes_BTG
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(part, one[1:2])


def test_draws_follow_the_probabilities() -> None:
    model, state, _ = fresh()
    with torch.no_grad():
        chance = next_logits(model, state, torch.zeros(3, 0, 256, dtype=torch.long), None).softmax(-1).mean((0, 1))
        drawn = torch.cat([rollout(model, state, frames=1, draws=1, seed=s).codes_BTG for s in range(30)])
    share = torch.bincount(drawn.flatten(), minlength=32) / drawn.numel()
    assert (share - chance).abs().max() < 0.01


def test_ego_action_adds_up_the_way() -> None:
    turn = np.pi / 2
    motion = torch.tensor([[[2.0, 0, turn], [3.0, 0, 0], [1.0, 1.0, 0]]])  # 2 ahead, then left: 3 that way, and on
    pose = (ego_action(motion)[0, :, 3:] * torch.tensor([12.0, 3.0, 0.5])).numpy()
    np.testing.assert_allclose(pose, [[2, 0, turn], [2, 3, turn], [1, 4, turn]], atol=1e-5)
    assert constant_motion(motion[:, 0], 4).shape == (1, 4, 3)


def test_mirroring_turns_pictures_and_motion_alike(home: Home) -> None:
    data = open_dataset(home["driver data"].root)
    samples, model = load_task("bev-occupancy").samples(data, "train"), fresh(actions=True)[0]
    index, rngs = np.arange(4), [np.random.default_rng(k) for k in range(4)]
    drawn = dict(model.arrays(samples, index, rngs))
    fixed = drawn.pop(f"{KIND}.fixed")
    assert model.unmirrored == {f"{KIND}.fixed"}
    assert set(fixed) == {"first", "blank", "draw"}
    kind = {"planes": drawn[KIND]["planes"], "motion": drawn[KIND]["motion"] + np.float32(0.25)}
    turned = model.task.flip(kind, np.array([True, False, True, False]))
    assert (turned["planes"][0] == kind["planes"][0, :, :, ::-1]).all()
    assert (turned["planes"][1] == kind["planes"][1]).all()
    plain = drawn[KIND]["motion"]
    np.testing.assert_array_equal(plain[..., 1], plain[..., 0] * MIRROR_3)
    np.testing.assert_array_equal(turned["motion"][0, ..., 0], kind["motion"][0, ..., 1])
    np.testing.assert_array_equal(turned["motion"][1, ..., 0], kind["motion"][1, ..., 0])


def test_what_cannot_be_is_refused(tmp_path: Path, home: Home) -> None:
    with pytest.raises(ConfigError, match="multiple of heads"):
        fresh(width=18, heads=4)
    model, state, _ = fresh()
    with pytest.raises(ConfigError, match="does not look as far"):
        rollout(model, state, frames=9)
    write_scenes(tmp_path / "still")  # has no ego_motion
    with pytest.raises(DataError, match="ego_motion"):
        learn(tmp_path / "still", tmp_path / "t", ACTIONS, steps=1)
    with pytest.raises(ConfigError, match="no such option|extra|codez|not permitted"):
        learn(home["clock data"].root, tmp_path / "t", ("worldmodel.codez=2",), steps=1)


def test_killed_and_resumed_it_is_the_same_to_the_last_bit(tmp_path: Path, home: Home) -> None:
    data = home["driver data"].root
    options = [part for setting in ACTIONS for part in ("--set", setting)]
    options += [part for key, value in SIZES.items() for part in (f"--{key.replace('_', '-')}", str(value))]
    argv = [*FMDEPLOY, "teacher", "train", "--data", str(data), "--out", str(tmp_path / "out"), "--objective",
            "worldmodel", "--steps", "60", "--checkpoint-every", "4", *options]
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    while child.poll() is None and not list((tmp_path / ".out.partial").glob("work/teacher/checkpoint-*.safetensors")):
        time.sleep(0.005)
    os.killpg(child.pid, signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole = learn(data, tmp_path / "whole", ACTIONS, steps=60)
    assert open_artifact(tmp_path / "out").digest == whole.digest
    weights = whole.tensors("objectives/worldmodel.safetensors")
    assert {"vae.book.codebook_KD", "vae.book.count_K", "vae.book.sum_KD"} <= set(weights)


@pytest.mark.slow
def test_two_processes_compute_what_one_does(tmp_path: Path, home: Home) -> None:
    """Tolerances as in tests/integration/test_training_two_processes.py."""
    options = {"data": str(home["driver data"].root), "objective": ["worldmodel"], "set": list(ACTIONS), "steps": 8,
               **SIZES, "lr": 1e-4}  # Adam turns the noise of a zero gradient into a step of the learning rate
    script = "import json, sys\nfrom fmdeploy.teacher.train import train\ntrain(**json.loads(sys.argv[1]))\n"
    (tmp_path / "script.py").write_text(script)
    train(out=tmp_path / "one", **options)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               str(tmp_path / "script.py"), json.dumps({**options, "out": str(tmp_path / "two")})]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    logs = [[json.loads(line) for line in open_artifact(tmp_path / name).path("log.jsonl").read_text().splitlines()]
            for name in ("one", "two")]
    for ours, theirs in zip(*logs, strict=True):
        for part in ("codes", "frames", "commitment", "perplexity", "restarted"):
            assert ours[part] == pytest.approx(theirs[part], rel=1e-3, abs=1e-5), (ours["step"], part)
