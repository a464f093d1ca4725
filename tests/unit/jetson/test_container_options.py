"""What the engine is asked for: every restriction, every mount, the groups and the runtime of a fake host."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from fmdeploy.config import load_config
from fmdeploy.errors import ConfigError, InputError, MissingError
from fmdeploy.jetson.container.build import BuildConfig, build_options, default_base
from fmdeploy.jetson.container.host import Host, look_at
from fmdeploy.jetson.container.options import Settings, run_options

RELEASE = (Path("/etc/nv_tegra_release"), "/etc/nv_tegra_release")
ORIN = Host(groups=(44, 104), files=(RELEASE,), runtimes=("nvidia", "runc"))


PC = Host()


def options(host: Host = PC, **values: Any) -> dict[str, Any]:
    return run_options(load_config(Settings, {"bundle": "/srv/bundle", **values}), host)


def test_everything_is_taken_away() -> None:
    found = options()
    assert found["read_only"] is True
    assert found["cap_drop"] == ["ALL"]
    assert found["security_opt"] == ["no-new-privileges:true"]
    assert found["network_mode"] == "none"
    assert found["user"] == "10001:10001"
    assert found["pids_limit"] == 256
    assert "privileged" not in found
    assert "device_requests" not in found, "--gpus fails on a Jetson"
    assert "devices" not in found


def test_mounts_are_the_bundle_the_socket_and_the_engines() -> None:
    found = {mount["target"]: (mount["type"], mount["source"], mount["read_only"]) for mount in options()["mounts"]}
    assert found == {
        "/bundle": ("bind", "/srv/bundle", True),
        "/run/fmdeploy": ("bind", "/run/fmdeploy", False),
        "/var/lib/fmdeploy/engines": ("volume", "fmdeploy-engines", False),
    }
    assert not any("docker.sock" in str(part) for mount in found.values() for part in mount)


def test_a_jetson_gets_its_runtime_groups_and_release() -> None:
    found = options(ORIN)
    assert found["runtime"] == "nvidia"
    assert found["environment"] == {"NVIDIA_VISIBLE_DEVICES": "all", "NVIDIA_DRIVER_CAPABILITIES": "compute,utility"}
    assert found["group_add"] == ["44", "104"]
    assert [m["read_only"] for m in found["mounts"] if m["target"] == "/etc/nv_tegra_release"] == [True]


def test_elsewhere_the_default_runtime_is_used() -> None:
    found = options()
    assert "runtime" not in found
    assert found["environment"] == {}
    assert options(Host(groups=(44,)), groups=[7])["group_add"] == ["7"]


def test_a_jetson_without_the_runtime_is_refused() -> None:
    with pytest.raises(MissingError, match=r"no runtime nvidia .*found runc.*nvidia-ctk runtime configure"):
        options(Host(files=(RELEASE,)))


def test_engines_may_lie_in_a_folder_and_a_key_is_required_to_have_signed() -> None:
    found = options(engines="/data/engines", key="/srv/key.pub", model="student")
    mounts = {mount["target"]: mount for mount in found["mounts"]}
    assert mounts["/var/lib/fmdeploy/engines"]["type"] == "bind"
    assert mounts["/key.pub"] == {"type": "bind", "source": "/srv/key.pub", "target": "/key.pub", "read_only": True}
    assert found["command"][-4:] == ["--name", "student", "--require-signature", "/key.pub"]


@pytest.mark.parametrize("user", ["root", "0", "10001", "10001:", "-1:0", "1:1\n"])
def test_the_user_is_two_numbers(user: str) -> None:
    with pytest.raises(ConfigError, match=r"'user'.*numeric user:group"):
        options(user=user)


@pytest.mark.parametrize("user", ["0:0", "0:10001", "00:1"])
def test_root_is_refused(user: str) -> None:
    with pytest.raises(InputError, match="shall not run as root"):
        options(user=user)


def test_health_counts_only_after_the_first_start() -> None:
    assert options(start_s=60)["healthcheck"]["start_period"] == 60_000_000_000


def test_a_slow_machine_may_have_longer_health_checks() -> None:
    assert options()["healthcheck"]["timeout"] == 10_000_000_000
    assert options(health_s=120)["healthcheck"]["timeout"] == 120_000_000_000


def fake_host(root: Path) -> Path:
    (root / "etc").mkdir()
    (root / "etc/group").write_text("root:x:0:\nvideo:x:44:me\nbroken\nrender:x:104:\naudio:x:29:\nvideo:x:word:\n")
    (root / "etc/nv_tegra_release").write_text("# R36 (release), REVISION: 4.4\n")
    (root / "dev/dri").mkdir(parents=True)
    (root / "var/lib/nvpmodel").mkdir(parents=True)
    for name, group in (("dev/nvmap", 4444), ("dev/dri/renderD128", 993), ("dev/dri/card0", 5555)):
        (root / name).touch()
        os.chown(root / name, -1, group if os.getuid() == 0 else -1)
    return root


def test_groups_come_from_names_and_from_device_files(tmp_path: Path) -> None:
    host = look_at(fake_host(tmp_path), ("nvidia",))
    owned = {4444, 993} if os.getuid() == 0 else {os.getgid()}
    assert host.groups == tuple(sorted({44, 104, *owned}))
    assert host.is_jetson
    assert host.files == ((tmp_path / "etc/nv_tegra_release", "/etc/nv_tegra_release"),
                          (tmp_path / "var/lib/nvpmodel", "/var/lib/nvpmodel"))


def test_a_host_without_gpu_gives_no_groups(tmp_path: Path) -> None:
    host = look_at(tmp_path, ())
    assert host.groups == ()
    assert not host.is_jetson


def test_a_build_uses_no_network() -> None:
    found = build_options(load_config(BuildConfig, {"base": "registry.example/base:1"}))
    assert found["network_mode"] == "none"
    assert found["buildargs"] == {"BASE": "registry.example/base:1"}
    assert found["tag"] == "fmdeploy-runtime:jp6"
    assert default_base("6") == "nvcr.io/nvidia/l4t-jetpack:r36.4.0"


def test_recipes_differ_in_their_base_only(root: Path) -> None:
    def steps(name: str) -> list[str]:
        lines = (root / "jetson" / name).read_text().splitlines()
        return [line for line in lines if not line.startswith(("#", "ARG BASE="))]

    six, seven = steps("Dockerfile.jp6"), steps("Dockerfile.jp7")
    assert six == seven
    assert any(line.startswith("USER 10001") for line in six)
    assert any(line.startswith("HEALTHCHECK") for line in six)
