"""The ready-made CI files, executed: their shell steps run in bash, on a real bundle, with hostile file names."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from support.checkable import Checkable, make_checkable

HOSTILE = "a b'; touch pwned; echo \"$(touch pwned)\" `touch pwned`"


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


@pytest.fixture(scope="module")
def checkable(tmp_path_factory: pytest.TempPathFactory) -> Checkable:
    """A bundle, its data and two sets of limits."""
    return make_checkable(tmp_path_factory.mktemp("checkable"))


@pytest.fixture(scope="module")
def action(root: Path) -> dict[str, Any]:
    """The composite action."""
    return load(root / "action.yml")


def steps(action: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {step["id"]: step for step in action["runs"]["steps"] if "id" in step}


def environment(tmp_path: Path) -> dict[str, str]:
    """What a runner gives to a step: this environment's fmdeploy first on the path, and the command files."""
    programs = str(Path(sys.executable).parent)
    return {"PATH": f"{programs}:{os.environ['PATH']}", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1",
            "MPLCONFIGDIR": str(tmp_path / "mpl"),
            "GITHUB_OUTPUT": str(tmp_path / "output"), "GITHUB_STEP_SUMMARY": str(tmp_path / "summary")}


def substitute(text: str, values: dict[str, str]) -> str:
    """Replace `${{ name }}` as the runner does."""
    def value(match: re.Match[str]) -> str:
        return values[match.group(1).strip()]

    return re.sub(r"\$\{\{(.*?)\}\}", value, text)


def run_step(step: dict[str, Any], values: dict[str, str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run one `run:` step as the runner does: inputs into its `env`, then bash with -e and pipefail."""
    assert "${{" not in step["run"], "a templated value inside shell code can be code"
    variables = {name: substitute(text, values) for name, text in step.get("env", {}).items()}
    return subprocess.run(["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]], cwd=folder, text=True,
                          env={**environment(folder), **variables}, capture_output=True, check=False)


def inputs_of(folder: Path, bundle: str, data: str, **more: str) -> dict[str, str]:
    given = {"bundle": bundle, "data": data, "budgets": "", "target": "", **more}
    return {**{f"inputs.{k}": v for k, v in given.items()}, "runner.temp": str(folder / "temp")}


def outputs(folder: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in (folder / "output").read_text().splitlines())


def verdict(action: dict[str, Any], folder: Path) -> int:
    values = {f"steps.check.outputs.{name}": value for name, value in outputs(folder).items()}
    return run_step(steps(action)["verdict"], values, folder).returncode


def place(part: Path, folder: Path, name: str) -> str:
    """A copy of an artifact under a hostile name."""
    shutil.copytree(part, folder / name)
    return name


def test_action_passes_uploads_and_summarises(action: dict[str, Any], checkable: Checkable, tmp_path: Path) -> None:
    bundle = place(checkable.bundle, tmp_path, HOSTILE.replace("/", "_"))
    values = inputs_of(tmp_path, bundle, str(checkable.data), budgets=str(checkable.loose))
    done = run_step(steps(action)["check"], values, tmp_path)
    assert done.returncode == 0, done.stderr
    found = outputs(tmp_path)
    assert (found["exit-code"], found["result"]) == ("0", "pass"), done.stdout + done.stderr
    folder = Path(found["folder"])
    assert (folder / "report.html").stat().st_size > 10_000
    assert "<testsuite" in (folder / "junit.xml").read_text()
    assert "|" in (tmp_path / "summary").read_text()
    assert verdict(action, tmp_path) == 0
    assert not list(tmp_path.rglob("pwned"))


def test_action_fails_with_the_gate(action: dict[str, Any], checkable: Checkable, tmp_path: Path) -> None:
    values = inputs_of(tmp_path, str(checkable.bundle), str(checkable.data), budgets=str(checkable.impossible))
    done = run_step(steps(action)["check"], values, tmp_path)
    assert done.returncode == 0, done.stderr
    assert outputs(tmp_path)["exit-code"] == "1"
    assert (Path(outputs(tmp_path)["folder"]) / "report.html").is_file(), "a failed check is what one wants to read"
    assert verdict(action, tmp_path) == 1


def test_action_reports_bad_input(action: dict[str, Any], checkable: Checkable, tmp_path: Path) -> None:
    values = inputs_of(tmp_path, HOSTILE, str(checkable.data), target="no such target; touch pwned")
    done = run_step(steps(action)["check"], values, tmp_path)
    assert done.returncode == 0, done.stderr
    assert outputs(tmp_path)["result"] == "error"
    assert verdict(action, tmp_path) == 2
    assert not list(tmp_path.rglob("pwned"))


def test_action_declares_what_it_uses(action: dict[str, Any]) -> None:
    text = yaml.safe_dump(action["runs"])
    used = set(re.findall(r"\$\{\{\s*inputs\.([a-z-]+)", text))
    assert used == set(action["inputs"])
    for name, output in action["outputs"].items():
        assert output["value"] == f"${{{{ steps.check.outputs.{name} }}}}"
    for step in action["runs"]["steps"]:
        assert ("uses" in step) != ("run" in step)
        assert "run" not in step or step["shell"] == "bash"
        assert "uses" not in step or re.search(r"@v\d+$", step["uses"])


@pytest.mark.parametrize(("limits", "code"), [("loose", 0), ("impossible", 1)])
def test_gitlab_job_keeps_the_exit_code(root: Path, checkable: Checkable, tmp_path: Path, limits: str, code: int) -> None:
    job = load(root / "examples" / "ci" / "gitlab-ci.yml")["fmdeploy-check"]
    bundle = place(checkable.bundle, tmp_path, HOSTILE)
    variables = {**{k: str(v) for k, v in job["variables"].items()}, "BUNDLE": bundle, "DATA": str(checkable.data),
                 "BUDGETS": str(getattr(checkable, limits))}
    script = "\n".join(job["script"])
    done = subprocess.run(["sh", "-e", "-c", script], cwd=tmp_path, env={**environment(tmp_path), **variables},
                          text=True, capture_output=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    kept = job["artifacts"]
    assert (tmp_path / kept["reports"]["junit"]).is_file()
    assert (tmp_path / kept["paths"][0] / "report.html").is_file()
    assert not list(tmp_path.rglob("pwned"))


def test_gitlab_job_installs_a_pinned_source_and_hides_no_second_folder_name(root: Path) -> None:
    job = load(root / "examples" / "ci" / "gitlab-ci.yml")["fmdeploy-check"]
    assert re.fullmatch(r"fmdeploy\[report\] @ git\+https://git\.example\.com/\S+@v\d+\.\d+\.\d+", job["variables"]["FMDEPLOY"])
    assert "FOLDER" not in job["variables"], "artifacts: names the folder, and it cannot read variables of the script"
    (kept,) = job["artifacts"]["paths"]
    assert kept.rstrip("/") in "\n".join(job["script"])
    assert any("install" in line and " git" in line for line in job["before_script"]), "the slim image has no git"


def test_github_example_uses_inputs_that_exist(root: Path, action: dict[str, Any]) -> None:
    workflow = load(root / "examples" / "ci" / "github.yml")
    step = workflow["jobs"]["check"]["steps"][-1]
    assert set(step["with"]) <= set(action["inputs"])


def test_own_workflow_runs_lint_and_test(root: Path) -> None:
    workflow = load(root / ".github" / "workflows" / "ci.yml")
    commands = {step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step}
    assert commands == {"make lint", "make test"}
    assert workflow["permissions"] == {"contents": "read"}


def test_install_step_installs_this_repository(root: Path, action: dict[str, Any], tmp_path: Path) -> None:
    """The real command with a pip that only records: installing again would take minutes."""
    programs = tmp_path / "bin"
    programs.mkdir()
    recorder = programs / "python"
    recorder.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > "$HOME/arguments"\n')
    recorder.chmod(0o755)
    step = steps(action)["install"]
    done = subprocess.run(["bash", "-eo", "pipefail", "-c", step["run"]], cwd=tmp_path, text=True, capture_output=True,
                          env={**environment(tmp_path), "PATH": f"{programs}:/usr/bin:/bin", "SOURCE": str(root)}, check=False)
    assert done.returncode == 0, done.stderr
    arguments = (tmp_path / "arguments").read_text().splitlines()
    assert arguments[:3] == ["-m", "pip", "install"]
    assert f"{root}[report]" in arguments
    assert str(root / "constraints.txt") in arguments
