"""The collapse monitor: its two numbers, its patience, and that it survives a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fmdeploy.task import load_task
from fmdeploy.teacher.objectives.base import CollapsedError
from fmdeploy.teacher.objectives.collapse import (
    CollapseConfig,
    CollapseMonitor,
    effective_rank,
    naming_checkpoint,
    spread,
)
from fmdeploy.teacher.objectives.jepa import Jepa
from fmdeploy.teacher.objectives.mae import MaskedReconstruction
from fmdeploy.teacher.objectives.pretraining import Pretraining
from fmdeploy.teacher.objectives.registry import choose
from support.training_data import TEACHER

EACH_STEP = CollapseConfig(watch_every=1, patience=3)


def _noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _see_the_same(monitor: CollapseMonitor, steps: range) -> None:
    for step in steps:
        monitor.see(torch.ones(16, 4, 8))
        monitor.report(step)


def test_effective_rank_of_equal_singular_values_is_their_number() -> None:
    assert float(effective_rank(torch.ones(7))) == pytest.approx(7)
    assert float(effective_rank(torch.tensor([3.0, 0.0, 0.0]))) == pytest.approx(1)
    # exp(ln 2 · ...) by hand: shares 1/2, 1/4, 1/4 have entropy 1.5 ln 2.
    assert float(effective_rank(torch.tensor([2.0, 1.0, 1.0]))) == pytest.approx(2**1.5)
    assert float(effective_rank(torch.zeros(3))) == 0


def test_isotropic_noise_has_full_spread_and_rank() -> None:
    std, rank = spread([_noise(4096, 16)])
    assert float(std) == pytest.approx(1, abs=1e-3)
    assert float(rank) == pytest.approx(16, rel=0.01)


def test_features_in_a_plane_have_rank_two() -> None:
    _, rank = spread([_noise(4096, 2) @ torch.linalg.qr(_noise(16, 16))[0][:2]])
    assert float(rank) == pytest.approx(2, rel=0.01)


def test_positions_do_not_hide_a_collapse() -> None:
    """Tokens of different places differ, but every input gets the same ones."""
    positions_ND = _noise(64, 16)
    std, rank = spread([positions_ND.expand(8, 64, 16) + 1e-4 * _noise(8, 64, 16, seed=1)])
    assert float(std) < 1e-3
    assert float(rank) > 10  # noise has every direction: this is why both numbers are needed
    constant, nothing = spread([positions_ND.expand(8, 64, 16)])
    assert float(constant) == pytest.approx(0, abs=1e-9)
    assert float(nothing) == 0


def test_spread_is_independent_of_scale_and_of_cutting() -> None:
    x_BND = _noise(8, 4, 6) + 3
    whole = spread([x_BND])
    for other in (spread([100 * x_BND]), spread([x_BND[:3], x_BND[3:]])):
        assert [float(v) for v in other] == pytest.approx([float(v) for v in whole])


def test_it_stops_after_its_patience_and_says_why() -> None:
    monitor = CollapseMonitor(EACH_STEP, advice="Raise the decay")
    for step in range(5):
        monitor.see(_noise(16, 4, 8, seed=step))
        monitor.report(step)
    with pytest.raises(CollapsedError, match=r"collapsed at step 7.*feature_std >= 0\.02.*3 looks.*Raise the decay") as e:
        _see_the_same(monitor, range(5, 20))
    assert e.value.healthy_steps == 5


def test_one_bad_look_is_forgiven() -> None:
    monitor = CollapseMonitor(EACH_STEP)
    for step in range(12):
        monitor.see(torch.ones(16, 4, 8) if step % 3 else _noise(16, 4, 8, seed=step))
        monitor.report(step)
    assert int(monitor.strikes) == 2


def test_a_line_in_feature_space_is_a_collapse_too() -> None:
    monitor = CollapseMonitor(CollapseConfig(watch_every=1, patience=1))
    monitor.see(_noise(16, 4, 1) * torch.ones(8))
    with pytest.raises(CollapsedError, match="effective_rank"):
        monitor.report(0)


def test_losing_nearly_all_dimensions_one_began_with_is_a_collapse() -> None:
    """Three of a hundred directions are no line, and inputs still differ; measured on JEPA as it once was: 156 to 5."""
    monitor = CollapseMonitor(EACH_STEP)
    monitor.see(_noise(64, 64, 100))
    assert float(monitor.report(0)["effective_rank"]) > 90
    monitor.see(_noise(64, 64, 20) @ _noise(20, 100, seed=1))
    monitor.report(1)
    assert int(monitor.strikes) == 0
    restored = CollapseMonitor(EACH_STEP)
    restored.load_state_dict(monitor.state_dict())
    for step in range(2, 4):
        restored.see(_noise(64, 64, 3) @ _noise(3, 100, seed=1))
        restored.report(step)
    restored.see(_noise(64, 64, 3) @ _noise(3, 100, seed=1))
    with pytest.raises(CollapsedError, match=r"effective_rank >= 4\.9"):
        restored.report(4)


def test_it_measures_every_so_often_and_repeats_itself_between() -> None:
    monitor = CollapseMonitor(CollapseConfig(watch_every=4))
    values = []
    for step in range(8):
        monitor.see(_noise(16, 4, 8, seed=step))
        values.append(float(monitor.report(step)["feature_std"]))
    assert values[0] == values[1] == values[2] != values[3] == values[6] != values[7]


def test_a_restored_monitor_goes_on_where_it_was() -> None:
    first, second = CollapseMonitor(EACH_STEP), CollapseMonitor(EACH_STEP)
    for step in range(2):
        first.see(torch.ones(16, 4, 8))
        first.report(step)
    second.load_state_dict(first.state_dict())
    assert second.report(2) == first.report(2)
    second.see(torch.ones(16, 4, 8))
    with pytest.raises(CollapsedError):
        second.report(2)


def test_what_cannot_be_measured_is_not_a_collapse() -> None:
    monitor = CollapseMonitor(CollapseConfig(watch_every=1, patience=1))
    for features in (torch.ones(1, 64, 8), torch.ones(3, 8), torch.full((8, 4, 8), torch.nan)):
        monitor.see(features)
        assert torch.isnan(monitor.report(0)["feature_std"])


def test_it_looks_only_while_training() -> None:
    monitor = CollapseMonitor(CollapseConfig(watch_every=1, patience=1)).eval()
    monitor.see(torch.ones(16, 4, 8))
    assert torch.isnan(monitor.report(0)["feature_std"])


@pytest.mark.parametrize(("healthy", "said"), [
    (250, r"The last good checkpoint is checkpoint-00000200\.safetensors\. Slow down"),
    (300, r"checkpoint-00000300\.safetensors"),
    (150, r"No checkpoint from before that is left\. Slow down"),
])
def test_the_last_checkpoint_in_good_health_is_named(tmp_path: Path, healthy: int, said: str) -> None:
    for step in (200, 300):
        (tmp_path / f"checkpoint-{step:08d}.safetensors").touch()
    error = CollapsedError("has collapsed", fix="Slow down")
    error.healthy_steps = healthy
    with pytest.raises(CollapsedError, match=said), naming_checkpoint(tmp_path):
        raise error


def test_what_stopped_one_of_several_objectives_is_logged_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    task = load_task("bev-occupancy")
    sizes = {name: TEACHER[name] for name in ("dim", "depth", "heads", "stem_width", "width")}
    choices = choose(["mae", "jepa"], ["mae.width=16", "mae.heads=2", "jepa.width=16", "jepa.heads=2"])
    whole = Pretraining(task, task.teacher(sizes), choices, steps=4)

    def collapse(*_: object) -> dict[str, torch.Tensor]:
        raise CollapsedError("has collapsed", seen={"feature_std": torch.tensor(0.01)})

    monkeypatch.setattr(Jepa, "after_step", collapse)
    monkeypatch.setattr(MaskedReconstruction, "after_step", lambda *_: {"done": torch.tensor(1.0)})
    with pytest.raises(CollapsedError) as caught:
        whole.after_step(0)
    assert {name: round(float(value), 3) for name, value in caught.value.seen.items()} == {
        "mae.done": 1.0, "jepa.feature_std": 0.01}
