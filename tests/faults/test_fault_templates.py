"""Fields of generated files (M29): what would become a line or a command of its own is refused before it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fmdeploy.config import load_config
from fmdeploy.errors import InputError
from fmdeploy.jetson.container.build import BuildConfig
from fmdeploy.jetson.container.host import Host
from fmdeploy.jetson.container.options import Settings, run_options
from fmdeploy.jetson.container.render import compose, container_unit, docker_arguments, process_unit
from fmdeploy.jetson.container.write import render, write
from support.fdti import Fdti

# The first is the shape of CVE-2026-44346: a field of a file that is data ends up as a line of a Dockerfile.
HOSTILE = ["x\nRUN touch /pwned", "x\r\nUSER root", 'x"', "x'", "$(touch /pwned)", "`id`", "x;id", "x&&id", "x|id",
           "${HOME}", "%h", "x y", "x\\", "x\0", "x\u2028y", "x#y", "{{x}}", "x*", "é", ""]
TEXT_FIELDS = ("tag", "name", "sockets", "engines", "user", "runtime", "model")


def refused(make: Any) -> bool:
    """Whether the call is refused as bad input; anything else is an error of the test."""
    try:
        make()
    except InputError as error:
        return error.exit_code == 2 and "\n" not in str(error)
    return False


@pytest.mark.parametrize("value", HOSTILE, ids=ascii)
def test_M29_hostile_field(value: str, tmp_path: Path, fdti: Fdti) -> None:
    bundle = {"bundle": "/srv/bundle"}
    with fdti.detecting():
        for field in TEXT_FIELDS:
            path = f"/{value}" if field in ("sockets", "engines") else value
            assert refused(lambda f=field, p=path: load_config(Settings, {**bundle, f: p})) or path == "/", (field, value)
        for field in ("base", "tag"):
            assert refused(lambda f=field: load_config(BuildConfig, {f: value})), (field, value)
    out = tmp_path / "out"
    for field in ("program", "bundle"):  # paths that exist may still be strange
        folder = f"/srv/{value}"
        given = {**bundle, "out": str(out), field: folder}
        assert refused(lambda g=given: write(**g)) or value == "", (field, value)
    if value:
        assert not out.exists() or not list(out.iterdir()), "nothing was written"


@pytest.mark.parametrize("value", [text for text in HOSTILE if text], ids=ascii)
@pytest.mark.parametrize("key", ["image", "name", "user"])
def test_M29_renderers_check_again(key: str, value: str, fdti: Fdti) -> None:
    options = run_options(Settings(bundle=Path("/srv/bundle")), Host()) | {key: value}
    unchecked = Settings.model_construct(**{**Settings(bundle=Path("/srv/bundle")).__dict__, "name": value, "model": value})
    with fdti.detecting():
        assert refused(lambda: compose(options))
        assert refused(lambda: list(docker_arguments(options)))
        assert refused(lambda: container_unit(unchecked, run_options(Settings(bundle=Path("/srv/bundle")), Host())))
        assert refused(lambda: process_unit(unchecked, "/usr/bin/fmdeploy"))


def test_M29_a_comma_is_no_second_mount_option(fdti: Fdti) -> None:
    with fdti.detecting():
        assert refused(lambda: run_options(Settings(bundle=Path("/srv/a,readonly=false")), Host()))
        assert refused(lambda: load_config(Settings, {"bundle": "/b", "sockets": "/run/a,source=/"}))


def test_M29_control_plain_fields_pass() -> None:
    settings = load_config(Settings, {
        "bundle": "/srv/models/student_v1.2+int8@a", "tag": "registry.example:5000/team/fmdeploy-runtime:jp6-1.0_rc",
        "name": "fmdeploy-front.1", "sockets": "/run/fmdeploy", "engines": "/data/engines", "user": "1234:44",
        "model": "student_v1.2"})
    files = render(settings, Host(groups=(44,)), "/usr/bin/x")
    service = yaml.safe_load(files["compose.yaml"])["services"]["fmdeploy-front.1"]
    assert service["image"] == settings.tag
    assert service["volumes"][0]["source"] == "/srv/models/student_v1.2+int8@a"
    assert "source=/srv/models/student_v1.2+int8@a,target=/bundle,readonly" in files["fmdeploy-container.service"]
    digest = "registry.example/base@sha256:" + "a" * 64
    assert load_config(BuildConfig, {"base": digest}).base == digest
