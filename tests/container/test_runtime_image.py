"""The runtime image on a real engine: what it holds, what it may not do, and that it serves, fails and recovers."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.bundles import fp32_model, int8_model, run_model
from support.containers import ARCH, PATIENCE_S, WORKER, Started, fact, fmdeploy
from support.runtimes import frame
from support.unix_client import Answer, get, infer

pytestmark = pytest.mark.container
WHEELS_MIB = 120
TRAINING = ("torch", "onnx", "modelopt", "transformers", "accelerate", "matplotlib", "docker")

RIGHTS = """
import json, os
def writable(path):
    try:
        open(os.path.join(path, "probe"), "w").close()
        os.unlink(os.path.join(path, "probe"))
        return True
    except OSError:
        return False
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
places = ("/", "/opt/fmdeploy", "/bundle", "/etc", "/tmp", "/dev/shm", "/run/fmdeploy", "/var/lib/fmdeploy/engines")
print(json.dumps({
    "uid": os.getuid(), "gid": os.getgid(), "groups": os.getgroups(),
    "capabilities": [int(status[key], 16) for key in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb")],
    "no_new_privileges": int(status["NoNewPrivs"]), "seccomp": int(status["Seccomp"]),
    "network": os.listdir("/sys/class/net"), "writable": [path for path in places if writable(path)],
    "docker": os.path.exists("/var/run/docker.sock"),
}))
"""
INSTALLED = """
import importlib.metadata, importlib.util, json, sys
print(json.dumps({
    "packages": sorted(d.metadata["Name"].lower() for d in importlib.metadata.distributions(path=["/opt/fmdeploy"])),
    "found": [name for name in sys.argv[1:] if importlib.util.find_spec(name)],
}))
"""


def state(answer: Answer) -> tuple[int, str, str]:
    return answer.status, str(answer.told.get("state")), str(answer.told.get("tier"))


def test_image_holds_the_runtime_and_nothing_to_train(image: dict[str, Any], client: Any) -> None:
    container = client.containers.create(image["tag"], entrypoint=["python3", "-c", INSTALLED], command=list(TRAINING),
                                         network_mode="none", read_only=True)
    try:
        container.start()
        assert container.wait(timeout=PATIENCE_S)["StatusCode"] == 0, container.logs().decode()
        told = json.loads(container.logs().decode().splitlines()[-1])
    finally:
        container.remove(force=True)
    assert told["found"] == []
    assert {"fmdeploy", "onnxruntime", "numpy", "uvicorn", "starlette", "model-signing"} <= set(told["packages"])
    assert len(told["packages"]) <= len(image["wheels"])
    assert image["wheels_mib"] <= WHEELS_MIB
    config = client.images.get(image["tag"]).attrs["Config"]
    assert config["User"] == "10001:10001"
    assert "fmdeploy.jetson.container.healthcheck" in config["Healthcheck"]["Test"]


def test_building_left_the_checkout_as_it_was(image: dict[str, Any], root: Path) -> None:
    assert image["tag"]
    assert not (root / "build").exists()


def test_serves_without_rights(started: Started, bundle: Path) -> None:
    rights = started.inside(RIGHTS)
    assert (rights["uid"], rights["gid"]) == (10001, 10001)
    assert 4242 in rights["groups"], "the groups given are there"
    assert 0 not in rights["groups"]
    assert rights["capabilities"] == [0, 0, 0, 0, 0]
    assert rights["no_new_privileges"] == 1
    assert rights["seccomp"] == 2, "the filter of the engine is on"
    assert rights["network"] == ["lo"]
    assert rights["writable"] == ["/tmp", "/dev/shm", "/run/fmdeploy", "/var/lib/fmdeploy/engines"]
    assert rights["docker"] is False

    assert started.told["health"] == "healthy"
    assert get(started.socket, "/v2/health/ready")[0] == 200
    metadata = get(started.socket, "/v2/models/bundle")[1]
    inputs = frame(1)
    answer = infer(started.socket, inputs)
    assert answer.status == 200, answer.body
    assert answer.told["valid"] is True
    model = {"fp32": fp32_model, "int8-cpu": int8_model}[answer.told["tier"]]()
    expected = run_model(model, {name: array[None] for name, array in inputs.items()})
    assert set(answer.outputs) == {"bev", "scene"}
    for name, array in answer.outputs.items():
        np.testing.assert_allclose(array, expected[name][0], rtol=1e-3, atol=1e-3 * np.abs(expected[name]).max())
    fact(f"serves tier {answer.told['tier']} of bundle {metadata['parameters']['bundle'][:12]} by binary KServe v2 "
         f"over the mounted socket, {answer.told['latency_ms']:.1f} ms in the runtime")


def test_the_image_can_build_engines_but_for_tensorrt(started: Started) -> None:
    """On a board the base image brings TensorRT; nothing else that a build imports may be missing."""
    done = started.container.exec_run(["python3", "-m", "fmdeploy", "build", "/bundle", "--out",
                                       "/var/lib/fmdeploy/engines/probe"])
    assert done.exit_code == 3, done.output.decode()
    assert "tensorrt" in done.output.decode().splitlines()[-1]


def test_a_killed_worker_degrades_and_recovers_and_sigterm_drains(started: Started) -> None:
    before = infer(started.socket, frame(0))
    assert before.status == 200, before.body
    workers = {pid for pid, text in started.processes().items() if WORKER in text}
    assert workers, started.processes()
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    seen = [infer(started.socket, frame(1))]
    degraded_s = recovered_s = None
    while time.monotonic() - killed < PATIENCE_S:
        if degraded_s is None and state(seen[-1]) != state(before):
            degraded_s = time.monotonic() - killed
        elif degraded_s is not None and state(seen[-1]) == state(before):
            recovered_s = time.monotonic() - killed
            break
        seen.append(infer(started.socket, frame(len(seen) + 1)))
    history = list(dict.fromkeys(map(state, seen)))
    assert degraded_s is not None, history
    assert recovered_s is not None, history
    assert all(answer.told["valid"] for answer in seen if answer.status == 200), "what is not valid is an error of HTTP"
    again = {pid for pid, text in started.processes().items() if WORKER in text}
    assert again
    assert not again & workers
    fact(f"worker killed: degraded after {1e3 * degraded_s:.0f} ms, as before after {recovered_s:.2f} s, "
         f"{len(seen)} frames, states {history}")

    stopping = time.monotonic()
    started.container.stop(timeout=PATIENCE_S)
    started.container.reload()
    assert started.container.attrs["State"]["ExitCode"] == 0, started.container.logs(tail=20).decode()
    assert not Path(started.socket).exists()
    fact(f"SIGTERM: exit 0 after {time.monotonic() - stopping:.2f} s")


def test_a_broken_bundle_is_not_healthy(client: Any, image: dict[str, Any], bundle: Path, sockets: Path) -> None:
    broken = sockets.parent / "bundle"
    shutil.copytree(bundle, broken)
    model = broken / "model.fp32.onnx"
    model.write_bytes(model.read_bytes()[:-1] + b"?")
    name = f"fmdeploy-test-{os.getpid()}-broken"
    try:
        start = time.monotonic()
        done = fmdeploy("container", "run", str(broken), "--tag", image["tag"], "--name", name, "--sockets", str(sockets),
                        "--engines", name, "--start-s", str(PATIENCE_S))
        assert done.returncode == 1, done.stderr
        assert len(done.stderr.splitlines()) == 1
        assert "model.fp32.onnx" in done.stderr
        assert client.containers.get(name).attrs["State"]["Status"] == "exited", "it is not started again and again"
        fact(f"a bundle with one changed byte is refused {time.monotonic() - start:.1f} s after `container run`")
        taken = fmdeploy("container", "run", str(bundle), "--tag", image["tag"], "--name", name, "--sockets", str(sockets))
        assert taken.returncode == 2
        assert f"docker rm --force {name}" in taken.stderr
    finally:
        client.containers.get(name).remove(force=True, v=True)
        client.volumes.get(name).remove(force=True)


def test_no_image(bundle: Path, sockets: Path) -> None:
    done = fmdeploy("container", "run", str(bundle), "--tag", "fmdeploy-test:absent", "--sockets", str(sockets))
    assert done.returncode == 3
    assert "fmdeploy container build" in done.stderr


def test_no_such_runtime(bundle: Path, sockets: Path) -> None:
    done = fmdeploy("container", "run", str(bundle), "--runtime", "fmdeploy-none", "--sockets", str(sockets))
    assert done.returncode == 3
    assert "no runtime fmdeploy-none" in done.stderr


def test_a_jetson_without_its_runtime(bundle: Path, sockets: Path, tmp_path: Path, client: Any) -> None:
    if "nvidia" in client.info()["Runtimes"]:
        pytest.skip("this engine has the runtime nvidia")
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc" / "nv_tegra_release").write_text("# R36 (release), REVISION: 4.4\n")
    done = fmdeploy("container", "run", str(bundle), "--root", str(tmp_path), "--sockets", str(sockets))
    assert done.returncode == 3
    assert "nvidia-ctk runtime configure" in done.stderr


def test_no_base_image() -> None:
    done = fmdeploy("container", "build", "--base", "fmdeploy.invalid/absent:1")
    assert done.returncode == 3
    assert "fmdeploy.invalid/absent:1: the base image cannot be pulled" in done.stderr
    assert "Pull it where its registry is reachable, or give another --base" in done.stderr


def test_a_base_for_another_machine() -> None:
    other = {"amd64": "arm64", "arm64": "amd64"}[ARCH]
    done = fmdeploy("container", "build", "--base", os.environ["FMDEPLOY_BASE"], "--arch", other)
    assert done.returncode == 2
    assert f"expected {other}, found {ARCH}" in done.stderr


def test_a_base_without_python(client: Any, tmp_path: Path) -> None:
    """What a step of the build says is in the error."""
    empty = f"fmdeploy-test-empty:{os.getpid()}"
    for name in ("fmdeploy-0-py3-none-any.whl", "pip-0-py3-none-any.whl"):
        (tmp_path / name).touch()
    with tarfile.open(tmp_path / "empty.tar", "w"):
        pass
    client.api.import_image((tmp_path / "empty.tar").read_bytes(), *empty.split(":"))
    try:
        done = fmdeploy("container", "build", "--base", empty, "--wheels", str(tmp_path), "--arch",
                        client.images.get(empty).attrs["Architecture"])
    finally:
        client.images.remove(empty, force=True)
    assert done.returncode == 2
    assert "the image does not build" in done.stderr
    assert "/bin/sh" in done.stderr
