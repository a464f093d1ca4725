"""A name in a configuration is bound to what it stands for; names never make fmdeploy call a stranger."""

from __future__ import annotations

from pathlib import Path

import pytest

from fmdeploy.distill.config import DistillConfig
from fmdeploy.errors import ConfigError
from fmdeploy.iospec import IOSpec, TensorSpec
from fmdeploy.models.factory import make_student
from fmdeploy.provenance import source_digest
from fmdeploy.task import load_task

IO = IOSpec(inputs=(TensorSpec(name="x", shape=(1, 4, 4)),), outputs=(TensorSpec(name="y", shape=(2,)),),
            preprocessing="none")


def test_an_edited_module_changes_the_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "my_net_for_provenance.py").write_text("width = 1\n")
    first = source_digest("my_net_for_provenance:Net")
    (tmp_path / "my_net_for_provenance.py").write_text("width = 2\n")
    assert first is not None
    assert source_digest("my_net_for_provenance:Net") != first
    assert source_digest("cnn") is source_digest("no_such_module:x") is None


def test_a_folder_is_known_by_its_content_not_its_path(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    configs = [DistillConfig(data=tmp_path, out=tmp_path, student=f"hf:{tmp_path / n}").resolved() for n in ("a", "b")]
    assert configs[0] == configs[1]
    assert str(tmp_path) not in str(configs[0])
    (tmp_path / "b" / "config.json").write_text("{ }")
    assert DistillConfig(data=tmp_path, out=tmp_path, student=f"hf:{tmp_path / 'b'}").resolved() != configs[0]


def test_a_forged_name_runs_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    with pytest.raises(ConfigError, match="annotated to return one"):
        make_student("subprocess:Popen", {"args": ["touch", str(canary)]}, IO, {})
    with pytest.raises(ConfigError, match="annotated to return one"):
        make_student("os:system", {"command": f"touch {canary}"}, IO, {})
    with pytest.raises(ConfigError, match="not a subclass"):
        load_task("threading:Thread")
    assert not canary.exists()


@pytest.mark.parametrize("options", [
    {"teacher": "t", "loss": []},
    {"teacher": "t", "labels": 0.0, "loss": ["labels"]},
    {"seed": 2**31},
])
def test_settings_that_cannot_train_are_refused(options: dict[str, object]) -> None:
    from fmdeploy.config import load_config

    with pytest.raises(ConfigError):
        load_config(DistillConfig, {"data": "d", "out": "o", **options})
