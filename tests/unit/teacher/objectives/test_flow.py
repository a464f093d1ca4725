"""Flow matching: the path, its solvers, a transport that is known, and futures out of a trained teacher."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fmdeploy.artifact import open_artifact
from fmdeploy.data.format import open_dataset
from fmdeploy.errors import ConfigError
from fmdeploy.models.saved import load_model
from fmdeploy.task import load_task
from fmdeploy.teacher.adapt.adapt import adapt
from fmdeploy.teacher.merge import merge
from fmdeploy.teacher.objectives.flow import Flow, FlowConfig, reduced
from fmdeploy.teacher.objectives.flow_field import MEAN, STD, VelocityField, best_line
from fmdeploy.teacher.objectives.flow_path import noise_like, on_path, walk
from fmdeploy.teacher.objectives.flow_scores import future_scores, future_statistics, judge_futures
from fmdeploy.teacher.objectives.store import load_objective
from fmdeploy.teacher.train import train
from support.training_data import TEACHER, write_scenes

SIZES = {key: TEACHER[key] for key in ("dim", "depth", "heads", "stem_width", "width")}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `data` and a `teacher` trained by flow matching."""
    folder = tmp_path_factory.mktemp("flow")
    write_scenes(folder / "data")
    train(data=folder / "data", out=folder / "teacher", steps=60, objective=("flow",), lr=4e-3,
          set=("flow.width=16", "flow.horizons=[0,4]", "flow.steps=3"), **TEACHER)
    return folder


def test_the_path_leads_from_noise_to_data_at_the_velocity_that_is_asked_for() -> None:
    generator = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2, 5, 3, 4, 4, generator=generator, dtype=torch.float64)
    sigma, t = 0.1, torch.rand(5, generator=generator, dtype=torch.float64) * 0.9
    torch.testing.assert_close(on_path(x0, x1, torch.zeros(5), sigma)[0], x0)
    torch.testing.assert_close(on_path(x0, x1, torch.ones(5), sigma)[0], x1 + sigma * x0)
    here, velocity = on_path(x0, x1, t, sigma)
    further, _ = on_path(x0, x1, t + 1e-4, sigma)
    torch.testing.assert_close((further - here) / 1e-4, velocity, rtol=1e-8, atol=1e-8)


def test_solvers_are_of_first_and_second_order() -> None:
    start = torch.ones(1, dtype=torch.float64)

    def error(steps: int, method: str) -> float:
        return abs(float(walk(lambda x, t: x, start, steps=steps, method=method)) - np.e)  # type: ignore[arg-type]

    assert float(walk(lambda x, t: x, start, steps=4, method="euler")) == pytest.approx(1.25**4)
    assert float(walk(lambda x, t: x, start, steps=2, method="heun")) == pytest.approx((1 + 0.5 + 0.125) ** 2)
    assert error(10, "euler") / error(20, "euler") == pytest.approx(2, abs=0.15)
    assert error(10, "heun") / error(20, "heun") == pytest.approx(4, abs=0.4)


def test_the_best_line_is_the_regression_of_velocity_on_the_point() -> None:
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randn(1, 400_000, generator=generator)
    x1 = MEAN + STD * torch.randn(1, 400_000, generator=generator)
    for t in (0.0, 0.3, 0.8):
        point, velocity = on_path(x0, x1, torch.tensor([t]), 0.0)
        line, size, left = best_line(point, torch.tensor([t]))
        slope = float(torch.cov(torch.cat((point, velocity)))[0, 1] / point.var())
        assert float((line[0, 1] - line[0, 0]) / (point[0, 1] - point[0, 0])) == pytest.approx(slope, abs=0.01)
        assert float(left) == pytest.approx(float((velocity - line).std()), rel=0.01)
        assert float(size) == pytest.approx(float(point.std()), rel=0.01)


def test_a_known_transport_is_learned_and_samples_have_its_moments() -> None:
    """Each cell is 1 with a chance of 0.2 or of 0.7, as the tokens tell, else -1: no average is a sample of it."""
    torch.manual_seed(0)
    field = VelocityField(1, dim=8, side=2, cells=8, width=16)
    optimizer = torch.optim.Adam(field.parameters(), lr=5e-3)
    rate, codes = torch.tensor([0.2, 0.7]), torch.randn(2, 1, 8).expand(2, 4, 8)
    for step in range(240):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 240)
        kind = torch.randint(0, 2, (64,))
        data = 2.0 * (torch.rand(64, 1, 8, 8) < rate[kind].view(-1, 1, 1, 1)) - 1
        point, velocity = on_path(torch.randn_like(data), data, t := torch.rand(64), 1e-3)
        loss = ((field(point, t, codes[kind]) - velocity) / best_line(point, t)[2]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    kind = torch.arange(128) % 2
    noise = noise_like((128, 1, 8, 8), seed=1, device=kind.device)
    with torch.no_grad():
        drawn = walk(lambda x, t: field(x, t, codes[kind]), noise, steps=10)
    for which in (0, 1):
        found, share = drawn[kind == which], float(rate[which])
        assert float((found > 0).float().mean()) == pytest.approx(share, abs=0.05)
        assert float(found.mean()) == pytest.approx(2 * share - 1, abs=0.1)
        assert float(found.std()) == pytest.approx(2 * np.sqrt(share * (1 - share)), abs=0.15)


def test_the_future_is_what_sensors_see_later(home: Path) -> None:
    task = load_task("bev-occupancy")
    samples = task.samples(open_dataset(home / "data"), "train")
    flow = Flow(task, task.teacher(SIZES), FlowConfig(horizons=(0, 4), width=16, draws=3), steps=1)
    index = np.array([0, 5, 11])
    found = flow.arrays(samples, index, [np.random.default_rng(n) for n in range(3)])["flow"]
    later = samples.frames(index, (4,))[:, 0]  # type: ignore[attr-defined]
    seen = later[:, 0] | later[:, 2]
    for row, column in ((0, 0), (9, 30), (31, 17)):
        block = seen[:, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert (found["future"][:, 1, row, column] == block.max((1, 2))).all()
    assert found["noise"].shape == (3, 6, 32, 32)
    assert abs(found["noise"].mean()) < 0.05
    assert ((found["time"] * 3).astype(int) == [0, 1, 2]).all()  # one in each third of the path
    again = flow.arrays(samples, index[1:], [np.random.default_rng(n) for n in (1, 2)])["flow"]
    assert (again["noise"] == found["noise"][1:]).all()
    assert (again["time"] == found["time"][1:]).all()


def test_it_learns_and_stays_with_the_teacher(home: Path) -> None:
    teacher = open_artifact(home / "teacher")
    curve = [value for _, value in teacher.json("curve.json")["loss"]]
    assert np.mean(curve[-10:]) < 0.93 * np.mean(curve[:10])
    loaded = load_model(teacher)
    flow = load_objective(teacher, loaded, "flow")
    assert isinstance(flow, Flow)
    assert flow.config.horizons == (0, 4)
    samples = loaded.task.samples(open_dataset(home / "data"), "val")
    inputs = {name: torch.from_numpy(x) for name, x in samples.batch(np.arange(4))[0].items()}
    chance = flow.predict_future(loaded.module, inputs, samples=4, seed=3)
    assert chance.shape == (4, 2, 32, 32)
    assert set((chance * 4).flatten().tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0}
    assert torch.equal(chance, flow.predict_future(loaded.module, inputs, samples=4, seed=3))
    assert not torch.equal(chance, flow.predict_future(loaded.module, inputs, samples=4, seed=4))
    scores = judge_futures(flow, loaded.module, samples, np.arange(6), futures=4)
    assert set(scores) == {"flow", "copy", "rate"}
    assert 0 < scores["flow"]["brier"] < 0.25
    assert 0 <= scores["flow"]["ece"] <= 1


@pytest.mark.parametrize(("method", "stays"), [("head", True), ("lora", False)])
def test_a_merged_teacher_keeps_it_where_the_backbone_is_the_same(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: str, stays: bool
) -> None:
    also = () if method == "head" else ("head",)  # the heads were never trained
    adapt(teacher=home / "teacher", data=home / "data", out=tmp_path / "a", method=method, also=also, steps=1, batch=4,
          precision="fp32")
    capsys.readouterr()
    merged = merge(teacher=home / "teacher", adapter=tmp_path / "a", out=tmp_path / "m")
    said = [line for line in capsys.readouterr().err.splitlines() if "flow" in line]
    assert merged.has("objectives.json") is stays
    if stays:
        teacher, name = open_artifact(home / "teacher"), "objectives/flow.safetensors"
        assert merged.path(name).read_bytes() == teacher.path(name).read_bytes()
        assert isinstance(load_objective(merged, load_model(merged), "flow"), Flow)
        assert not said
    else:
        assert len(said) == 1
        assert said[0].startswith(f"{home / 'teacher'}: its flow is left out: it reads the features of the old")


def test_a_run_that_starts_from_it_says_what_becomes_of_it(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"data": home / "data", "init": home / "teacher", "steps": 1, "batch": 4, "precision": "fp32"}
    tuned = train(out=tmp_path / "tuned", **options)
    assert not tuned.has("objectives.json")
    assert "which this run changes: it is left out; --objective flow trains a new one" in capsys.readouterr().err
    again = train(out=tmp_path / "again", objective=("flow",), **options)
    assert again.has("objectives.json")
    assert "which this run changes: it starts from fresh weights" in capsys.readouterr().err


def test_scores_are_what_the_formulas_say() -> None:
    truth = np.zeros((2, 1, 2, 2))
    truth[0, 0, 0] = 1
    chance = np.array([[[[0.75, 0.25], [0.75, 0.0]]], [[[0.0, 0.0], [0.0, 0.0]]]])
    found = future_scores(chance, truth)
    assert found["iou"] == pytest.approx(1 / 3)
    assert found["soft_iou"] == pytest.approx(1.0 / (1.75 + 2 - 1.0), abs=1e-4)
    assert found["brier"] == pytest.approx((0.0625 + 0.5625 + 0.5625) / 8, abs=1e-4)
    assert found["ece"] == pytest.approx((0.75 + abs(1.5 - 1)) / 8, abs=1e-4)  # bins of 0.25 and of 0.75
    assert future_scores(truth, truth)["iou"] == 1
    assert future_statistics(chance, truth)["brier"].shape == (2, 2)


def test_reduction_keeps_whatever_is_anywhere_in_a_block() -> None:
    planes = np.zeros((1, 1, 4, 4), np.uint8)
    planes[0, 0, 3, 0] = 1
    assert reduced(planes, 2).tolist() == [[[[0, 0], [1, 0]]]]


def test_what_does_not_fit_is_refused(home: Path) -> None:
    task = load_task("bev-occupancy")
    with pytest.raises(ConfigError, match="does not divide"):
        Flow(task, task.teacher(SIZES), FlowConfig(reduce=8), steps=1)
    with pytest.raises(ConfigError, match="frames from 0 to 8"):
        train(data=home / "data", out=home / "none", steps=1, objective=("flow",), set=("flow.horizons=[9]",))
    flow = Flow(task, task.teacher(SIZES), FlowConfig(width=16), steps=1)
    with pytest.raises(ConfigError, match="needs the frames after each sample"):
        flow.observed(object(), np.arange(1))  # type: ignore[arg-type]
