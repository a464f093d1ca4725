"""Configuration is strict; the command line says one line and the right exit code."""

from __future__ import annotations

import contextlib
import json
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

import click
import pytest
import tomllib
from click.testing import CliRunner

from fmdeploy import cli, interrupt
from fmdeploy.artifact import open_artifact
from fmdeploy.command import Outcome, click_options, command
from fmdeploy.config import InputPath, OutputPath, RunOnly, StageConfig, load_config
from fmdeploy.draft import Draft, produce
from fmdeploy.errors import ConfigError, FmdeployError, GateError, InputError, LeakageError, MissingDependencyError
from fmdeploy.manifest import Kind
from fmdeploy.optional import require


class Sizes(StageConfig):
    out: OutputPath
    data: InputPath | None = None
    steps: int = 10
    rate: float = 0.1
    mode: Literal["ptq", "qat"] = "ptq"
    scenarios: tuple[str, ...] = ("a", "b")
    resume: bool = True
    workers: Annotated[int, RunOnly()] = 1


def test_file_and_flags_merge_and_flags_win(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('steps = 3\nrate = 1\nscenarios = ["x"]\nout = "from_file"\n')
    config = load_config(Sizes, {"steps": 4, "out": tmp_path}, file=file)
    assert (config.steps, config.rate, config.scenarios, config.out) == (4, 1.0, ("x",), tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("stepz = 3", "unknown key 'stepz', did you mean 'steps'"),
        ('steps = "3"', "'steps': input should be a valid integer, found '3'"),
        ("steps = 3.5", "'steps'"),
        ("resume = 1", "'resume'"),
        ('mode = "int4"', "'mode': input should be 'ptq' or 'qat', found 'int4'"),
        ("rate = nan", "'rate'"),
        ("steps = = 3", "is not TOML"),
        ("stepz = 3\nsteps = 'x'", "unknown key 'stepz'.*"),
    ],
)
def test_bad_configuration_is_one_line(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "c.toml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        load_config(Sizes, {"out": "x"}, file=file)
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value)


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?=.*stepz)(?=.*'mode')(?=.*'out' is required)"):
        load_config(Sizes, {"stepz": 1, "mode": "x"})


def test_paths_and_run_only_fields_stay_out_of_the_manifest(tmp_path: Path) -> None:
    resolved = load_config(Sizes, {"out": "x", "data": "y", "workers": 7}).resolved()
    assert set(resolved) == {"steps", "rate", "mode", "scenarios", "resume"}


def test_flags_are_the_fields() -> None:
    flags = {o.opts[0] for o in click_options(Sizes)}
    assert flags == {"--out", "--data", "--steps", "--rate", "--mode", "--scenarios", "--resume", "--workers"}


def test_an_interrupt_that_a_library_swallows_still_stops_the_stage(tmp_path: Path) -> None:
    def build(draft: Draft) -> None:
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        draft.write_text("x", "1")

    with pytest.raises(KeyboardInterrupt), interrupt.remembered():
        produce(tmp_path / "a", Kind.DATASET, stage="s", config=Sizes(out=tmp_path), inputs={}, build=build)
    assert list(tmp_path.iterdir()) == []
    with interrupt.remembered():
        interrupt.check()  # the next command starts afresh


@command(Sizes)
def toy(config: Sizes) -> Outcome:
    """A stage for tests."""
    if config.steps == 13:
        raise GateError("the gate failed", where="toy", expected=1, found=2, fix="Try again")
    if config.steps == 14:
        raise ZeroDivisionError("a bug")
    if config.steps == 15:
        raise KeyboardInterrupt
    if config.steps == 16:
        try:
            Path("/dev/full").write_text("a page")
        except OSError as error:
            raise RuntimeError("as libraries wrap it") from error
    return Outcome((f"steps {config.steps}", *config.scenarios), {"steps": config.steps}, exit_code=config.steps % 2)


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    monkeypatch.setitem(cli.VERBS, "toy", cli.Verb("fmdeploy_toy:toy", "A toy."))
    monkeypatch.setitem(sys.modules, "fmdeploy_toy", sys.modules[__name__])
    with pytest.raises(SystemExit) as stop:
        cli.main(["toy", *argv])
    seen = capsys.readouterr()
    return int(stop.value.code or 0), seen.out, seen.err


@pytest.mark.parametrize(
    ("argv", "code", "out", "err"),
    [
        (["--out", "x", "--steps", "4", "--scenarios", "q"], 0, "steps 4\nq\n", ""),
        (["--out", "x", "--steps", "5", "--json"], 1, '{"steps": 5}\n', ""),
        (["--steps", "4"], 2, "", "fmdeploy: configuration: 'out' is required\n"),
        (["--out", "x", "--mode", "int4"], 2, "", "Invalid value for '--mode'"),
        (["--out", "x", "--stepz", "4"], 2, "", "No such option"),
        (["--out", "x", "--steps", "13"], 1, "", "toy: the gate failed (expected 1, found 2). Try again\n"),
        (["--out", "x", "--steps", "14"], 4, "", "ZeroDivisionError"),
        (["--out", "x", "--steps", "15"], 130, "", "interrupted"),
        (["--out", "x", "--steps", "16"], 3, "", "fmdeploy: the disk is full. Free some space"),
        (["--out", "x", "--config", "nowhere.toml"], 2, "", "no such configuration file"),
    ],
)
def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], argv: list[str], code: int,
                    out: str, err: str) -> None:
    got = run(monkeypatch, capsys, *argv)
    assert (got[0], got[1]) == (code, out)
    assert err in got[2]
    assert ("Traceback" in got[2]) == (code == 4)


def test_every_verb_and_group_answers_help() -> None:
    runner = CliRunner()
    for name, entry in cli.VERBS.items():
        for argv in ([[name, sub, "--help"] for sub in entry] if isinstance(entry, dict) else [[name, "--help"]]):
            result = runner.invoke(cli.group, argv)
            assert result.exit_code == 0, (argv, result.output, result.exception)
            assert "--json" in result.output


def test_an_unknown_verb_is_bad_usage() -> None:
    done = subprocess.run([sys.executable, "-m", "fmdeploy", "distil"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "No such command 'distil'" in done.stderr


def test_show_prints_the_lineage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = produce(tmp_path / "d", Kind.DATASET, stage="data record", config=Sizes(out=tmp_path), inputs={},
                   build=lambda d: d.write_json("metrics.json", {"frames": 3}))
    produce(tmp_path / "t", Kind.TEACHER, stage="teacher train", config=Sizes(out=tmp_path), inputs={"data": data},
            build=lambda d: d.write_text("x", "1"))
    with pytest.raises(SystemExit) as stop:
        cli.main(["show", str(tmp_path / "t"), "--json"])
    shown = json.loads(capsys.readouterr().out)
    assert stop.value.code == 0
    assert shown["inputs"]["data"]["digest"] == data.digest
    assert shown["digest"] == open_artifact(tmp_path / "t").digest


def test_a_missing_package_says_what_to_install() -> None:
    with pytest.raises(MissingDependencyError, match=r"pip install 'fmdeploy\[tensorrt\]'") as caught:
        require("tensorrt.no_such_part")
    assert caught.value.exit_code == 3
    assert isinstance(caught.value, ImportError)


def test_the_error_tree_has_the_documented_exit_codes() -> None:
    assert (FmdeployError("x").exit_code, GateError("x").exit_code, InputError("x").exit_code) == (4, 1, 2)
    assert str(InputError("two\nlines", where="a", expected=1)) == "a: two lines (expected 1)"


@pytest.mark.parametrize("kind", [FmdeployError, ConfigError, GateError, LeakageError, MissingDependencyError])
def test_an_error_reaches_another_process_and_is_told_once(
    kind: type[FmdeployError], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = kind("is odd", where=tmp_path, expected="even", found=3, fix="Add one")
    sent = pickle.loads(pickle.dumps(error))
    assert type(sent) is kind
    assert str(sent) == str(error)
    assert vars(sent) == vars(error)
    sent.told = True
    assert cli.report_error(sent) == kind.exit_code
    assert capsys.readouterr().err == ""


def test_click_is_not_asked_for_required_flags() -> None:
    assert not any(o.required for o in click_options(Sizes) if isinstance(o, click.Option))


BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Block())
from fmdeploy.cli import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("argv", [("distill", "--help"), ("teacher", "train", "--data", "x"), ("export", "--model", "x")])
def test_without_torch_a_training_stage_says_what_to_install(argv: tuple[str, ...]) -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED, *argv], capture_output=True, text=True)
    assert done.returncode == 3
    assert "pip install 'fmdeploy[train]'" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_path_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = subprocess.run([sys.executable, "-m", "fmdeploy", "data", "record", "--simulations", "8", "--out",
                           str(tmp_path / "file" / "out")], capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "not a directory" in done.stderr


def test_a_reader_that_goes_away_does_not_change_the_exit_code(tmp_path: Path) -> None:
    data = produce(tmp_path / "d", Kind.DATASET, stage="s", config=Sizes(out=tmp_path), inputs={},
                   build=lambda d: d.write_text("x", "1"))
    line = f"{sys.executable} -m fmdeploy show {data.root} | true; exit ${{PIPESTATUS[0]}}"
    assert subprocess.run(["bash", "-c", line], capture_output=True).returncode == 0


def test_make_asks_for_extras_that_exist(root: Path) -> None:
    planned = subprocess.run(["make", "-n", "-W", "setup.py", "setup"], cwd=root, capture_output=True, text=True).stdout
    extras = planned.partition("'.[")[2].partition("]'")[0].split(",")
    declared = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert "dev" in extras
    assert set(extras) <= set(declared)
