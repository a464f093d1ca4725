"""compose.yaml and the units say what `container run` says, and systemd accepts them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from fmdeploy.config import load_config
from fmdeploy.jetson.container.host import Host
from fmdeploy.jetson.container.options import Settings, run_options
from fmdeploy.jetson.container.render import compose, docker_arguments
from fmdeploy.jetson.container.write import render, write

# Numbers of video and render differ between boards; these stand in the shipped files.
FILES = ("/etc/nv_tegra_release", "/etc/nvpmodel.conf", "/var/lib/nvpmodel")
SHIPPED = Host(groups=(44, 104), files=tuple((Path(name), name) for name in FILES), runtimes=("nvidia", "runc"))


def settings(**values: Any) -> Settings:
    return load_config(Settings, {"bundle": "/srv/fmdeploy/bundle", **values})


@pytest.fixture(scope="module")
def shipped() -> dict[str, str]:
    return render(settings(), SHIPPED, "/opt/fmdeploy/bin/fmdeploy")


@pytest.mark.parametrize("name", ["compose.yaml", "fmdeploy.service", "fmdeploy-container.service"])
def test_shipped_files_are_what_the_program_writes(name: str, shipped: dict[str, str], root: Path, update_golden: bool) -> None:
    if update_golden:
        (root / "jetson" / name).write_text(shipped[name])
    assert (root / "jetson" / name).read_text() == shipped[name]


def test_compose_holds_every_restriction() -> None:
    options = run_options(settings(), SHIPPED)
    service = yaml.safe_load(compose(options))["services"]["fmdeploy"]
    for key in ("image", "command", "user", "group_add", "read_only", "cap_drop", "security_opt", "network_mode",
                "pids_limit", "runtime", "environment", "stop_signal", "shm_size"):
        assert service[key] == options[key], key
    assert service["volumes"] == options["mounts"]
    assert service["healthcheck"]["interval"] == "5s"
    assert service["restart"] == "on-failure:3"
    assert set(options) - set(service) == {"name", "mounts", "restart_policy"}, "nothing is left out"


def test_docker_arguments_hold_every_restriction() -> None:
    found = list(docker_arguments(run_options(settings(), SHIPPED)))
    for flag in ("--read-only", "--cap-drop=ALL", "--network=none", "--user=10001:10001", "--runtime=nvidia",
                 "--security-opt=no-new-privileges:true", "--pids-limit=256", "--group-add=104",
                 "--mount=type=bind,source=/srv/fmdeploy/bundle,target=/bundle,readonly"):
        assert flag in found
    assert found[found.index("fmdeploy-runtime:jp6") + 1] == "serve"
    assert not any("gpus" in word or "privileged" in word.replace("no-new-privileges", "") for word in found)


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_accepts_the_units(tmp_path: Path) -> None:
    write(bundle=str(tmp_path), out=str(tmp_path / "units"), program=str(Path(sys.executable)))
    units = [str(path) for path in sorted((tmp_path / "units").glob("*.service"))]
    # The unit of the container names /usr/bin/docker, which need not be on this machine.
    checked = units if Path("/usr/bin/docker").exists() else [u for u in units if "container" not in u]
    done = subprocess.run(["systemd-analyze", "verify", "--recursive-errors=no", *checked], capture_output=True, text=True,
                          check=False)
    mine = [line for line in done.stderr.splitlines() if "fmdeploy" in line]
    assert (done.returncode, mine) == (0, [])


def test_the_unit_without_container_is_watched_and_sandboxed(shipped: dict[str, str]) -> None:
    lines = shipped["fmdeploy.service"].splitlines()
    for line in ("Type=notify", "WatchdogSec=10", "CapabilityBoundingSet=", "ProtectSystem=strict", "PrivateNetwork=yes",
                 "RestrictAddressFamilies=AF_UNIX", "NoNewPrivileges=yes", "Restart=on-failure"):
        assert line in lines
