"""`fmdeploy build`: the key, the proof by golden vectors, and what happens without a GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fmdeploy.artifact import Artifact
from fmdeploy.draft import Draft
from fmdeploy.errors import ArtifactError, ConfigError, GateError, MissingError, ModelFileError
from fmdeploy.export.tensorrt import build as build_module
from fmdeploy.export.tensorrt.build import BuildConfig, build_engine_artifact
from fmdeploy.export.tensorrt.builder import FLAGS, Problem
from fmdeploy.export.tensorrt.isolated import Ended
from fmdeploy.jetson.machine import available_mib, l4t_release, power_mode
from fmdeploy.manifest import Kind
from fmdeploy.runtime.backends.tensorrt_api import installed
from fmdeploy.runtime.engines.key import Place
from support.bundles import fp32_model, inputs, make_bundle, run_model
from support.fake_tensorrt import fake_api, host_cuda
from support.processes import FMDEPLOY

needs_compiler = pytest.mark.skipif(not installed("tensorrt-rtx"), reason="needs the extra [trt-rtx]")
R36 = "# R36 (release), REVISION: 4.4, GCID: 41062509, BOARD: generic, EABI: aarch64, DATE: Mon Jun 16 16:07:13 UTC 2025"
MODES = "< POWER_MODEL ID=0 NAME=15W >\nCPU_ONLINE CORE_0 1\n< POWER_MODEL ID=2 NAME=MAXN_SUPER >\n"


def jetson(root: Path, mode: int = 2) -> Path:
    """The files of an Orin that the key is made from."""
    for name, text in (("etc/nv_tegra_release", R36), ("etc/nvpmodel.conf", MODES),
                       ("var/lib/nvpmodel/status", f"pmode:{mode:04d}"), ("proc/meminfo", "MemAvailable:  8388608 kB\n")):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_the_machine_is_read_from_its_files(tmp_path: Path) -> None:
    root = jetson(tmp_path)
    assert (l4t_release(root), power_mode(root), available_mib(root)) == ("36.4.4", "MAXN_SUPER", 8192)
    assert (l4t_release(tmp_path / "pc"), power_mode(tmp_path / "pc"), available_mib(tmp_path / "pc")) == (None, None, None)
    (root / "etc/nvpmodel.conf").unlink()
    assert power_mode(root) == "id 2"


def test_in_a_container_the_package_tells_the_release(tmp_path: Path) -> None:
    status = tmp_path / "var/lib/dpkg/status"
    status.parent.mkdir(parents=True)
    status.write_text("Package: nvidia-l4t-coreutils\nVersion: 1\n\nPackage: nvidia-l4t-core\nStatus: install ok\n"
                      "Version: 36.4.4-20250616085344\n")
    assert l4t_release(tmp_path) == "36.4.4"


@pytest.fixture
def bundle(tmp_path: Path) -> Artifact:
    """A toy bundle with golden targets and torch's answers (here: the same network's)."""
    import numpy as np

    def complete(draft: Draft) -> None:
        from safetensors.numpy import load_file

        tensors = load_file(draft.path("golden.safetensors"))
        said = run_model(fp32_model(), inputs(4, 16, seed=7))
        tensors |= {f"reference.fp32.{name}": array for name, array in said.items()}
        tensors |= {"target.bev": (said["bev"] > 0).astype(np.float32), "target.scene": said["scene"].argmax(1)}
        draft.write_tensors("golden.safetensors", tensors)
        draft.write_json("model.json", {"task": "toy"})

    return make_bundle(tmp_path / "bundle", models={"fp32": fp32_model()}, change=complete)


class _Metric:
    """Mean of an output: any falsification moves it."""

    name, higher_is_better = "mean", True

    def statistics(self, outputs: Any, targets: Any) -> Any:
        import numpy as np

        values = outputs["scene"].astype(np.float64)
        return np.stack([np.abs(values).mean(1), np.ones(len(values))], 1)

    def value(self, total: Any) -> Any:
        return total[..., 0] / total[..., 1]


class _Task:
    name = "toy"

    def metrics(self) -> Any:
        return (_Metric(),)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """An Orin whose builder returns the ONNX bytes as engine; counts its builds."""
    made: list[str] = []

    def built(api: str, model: Path, sha256: str, *rest: Any, **options: Any) -> Ended:
        made.append(sha256)
        return Ended("done", (), model.read_bytes(), b"times", {"seconds": 1.0, "flags": ["STRONGLY_TYPED"], "peak_mib": 9.0})

    api = fake_api()
    monkeypatch.setattr(build_module, "build_isolated", built)
    monkeypatch.setattr(build_module, "load_api", lambda name: api)
    monkeypatch.setattr(build_module, "load_task", lambda name: _Task())
    return made, Place(jetson(tmp_path / "root"), host_cuda)


def config(bundle: Artifact, out: Path, **options: Any) -> BuildConfig:
    return BuildConfig(**{"bundle": bundle.root, "out": out, "variant": "fp32", **options})


def test_an_engine_is_built_proven_and_stored(bundle: Artifact, device: Any, tmp_path: Path) -> None:
    made, place = device
    engine = build_engine_artifact(config(bundle, tmp_path / "engine"), place)
    assert engine.kind is Kind.ENGINE
    assert engine.path("engine.plan").read_bytes() == fp32_model()
    assert {"sm": "87", "multiprocessors": 8, "l4t": "36.4.4", "power_mode": "MAXN_SUPER", "version": "10.3.0.26"}.items() <= engine.json("build.json").items()
    assert engine.json("inspector.json")["Layers"][0]["Name"] == "all"
    pairs = [row["pair"] for row in engine.json("agreement.json")]
    assert pairs == ["engine against onnxruntime", "engine against torch", "onnxruntime against torch"]
    assert engine.json("agreement.json")[0]["cosine"]["bev"] == pytest.approx(1)
    assert next(tmp_path.glob(".timing-tensorrt-10.3.0.26-sm87x8-36.4.4-MAXN_SUPER.cache")).read_bytes() == b"times"
    assert len(made) == 1


def test_the_same_key_is_skipped_and_another_is_built_beside(bundle: Artifact, device: Any, tmp_path: Path) -> None:
    made, place = device
    first = build_engine_artifact(config(bundle, tmp_path / "engine"), place)
    assert build_engine_artifact(config(bundle, tmp_path / "engine"), place).root == first.root
    assert len(made) == 1
    other = build_engine_artifact(config(bundle, tmp_path / "engine"), replace(place, root=jetson(tmp_path / "slow", mode=0)))
    assert len(made) == 2
    assert other.root != first.root
    assert other.root.name.startswith("engine-")
    assert first.path("engine.plan").exists()
    assert build_engine_artifact(config(bundle, tmp_path / "engine"), replace(place, root=tmp_path / "slow")).root == other.root
    assert len(made) == 2


def test_another_power_mode_or_board_uses_neither_the_engine_nor_its_timings(bundle: Artifact, device: Any, tmp_path: Path) -> None:
    """All Orins are sm_87, and at another clock other kernels win."""
    made, place = device
    slow = replace(place, root=jetson(tmp_path / "slow", mode=0))
    large = replace(place, cuda=lambda: host_cuda(multiprocessors=16))
    roots = {build_engine_artifact(config(bundle, tmp_path / "engine"), where).root for where in (place, slow, large)}
    assert (len(roots), len(made), len(list(tmp_path.glob(".timing-*")))) == (3, 3, 3)


def test_builder_flags_are_in_the_key(bundle: Artifact, device: Any, tmp_path: Path) -> None:
    engine = build_engine_artifact(config(bundle, tmp_path / "engine"), device[1])
    assert engine.manifest.config["flags"] == list(FLAGS)


def test_a_timing_cache_that_cannot_be_written_costs_no_engine(bundle: Artifact, device: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    engine = build_engine_artifact(config(bundle, tmp_path / "engine", timing_cache=tmp_path / "file/cache"), device[1])
    assert engine.has("engine.plan")


def test_an_engine_that_nothing_can_judge_is_not_built(bundle: Artifact, device: Any, tmp_path: Path) -> None:
    made, place = device
    mute = make_bundle(tmp_path / "mute", models={"fp32": fp32_model()}, change=lambda draft: draft.write_json("model.json", {"task": "toy"}))
    with pytest.raises(ArtifactError, match="no golden answers.*reference.fp32"):
        build_engine_artifact(config(mute, tmp_path / "engine"), place)
    assert not made


def test_golden_vectors_decide(bundle: Artifact, device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, place = device
    wrong = fake_api(gain=1.6)
    monkeypatch.setattr(build_module, "load_api", lambda name: wrong)
    with pytest.raises(GateError, match="engine against onnxruntime on the golden inputs"):
        build_engine_artifact(config(bundle, tmp_path / "engine"), place)
    assert not (tmp_path / "engine").exists()
    broken = fake_api(gain=float("nan"))
    monkeypatch.setattr(build_module, "load_api", lambda name: broken)
    with pytest.raises(GateError):
        build_engine_artifact(config(bundle, tmp_path / "engine"), place)


def test_a_build_that_fails_is_one_typed_line(bundle: Artifact, device: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, place = device
    monkeypatch.setattr(build_module, "build_isolated", lambda *a, **k: Ended("timeout", (Problem("process", "killed after 1 s"),)))
    with pytest.raises(ModelFileError, match="builds no engine, process: killed after 1 s"):
        build_engine_artifact(config(bundle, tmp_path / "engine"), place)


def test_a_variant_that_the_bundle_lacks_is_named(bundle: Artifact, device: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such model.*fp32"):
        build_engine_artifact(config(bundle, tmp_path / "e").model_copy(update={"variant": "int8"}), device[1])


@needs_compiler
def test_without_a_gpu_the_real_builder_gets_as_far_as_the_engine(
    bundle: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The code of the device, in CI: parser, builder, serialised engine and timing cache are real."""
    monkeypatch.setattr(build_module, "load_task", lambda name: _Task())

    def no_gpu() -> Any:
        raise MissingError("there is no NVIDIA GPU here")

    with pytest.raises(MissingError, match=r"the engine of [\d,]{6,} bytes was built, but cannot prove itself: there is no"):
        build_engine_artifact(config(bundle, tmp_path / "engine", api="tensorrt-rtx"), Place(tmp_path / "pc", no_gpu))
    assert not (tmp_path / "engine").exists()
    cache = next(tmp_path.glob(".timing-tensorrt-rtx-*-sm0x0.cache"))
    assert cache.stat().st_size
    with pytest.raises(MissingError):  # and the cache of the first build is accepted by the second
        build_engine_artifact(config(bundle, tmp_path / "engine", api="tensorrt-rtx"), Place(tmp_path / "pc", no_gpu))


def test_the_verb_says_what_is_missing(bundle: Artifact, tmp_path: Path) -> None:
    if installed("tensorrt"):
        pytest.skip("TensorRT is installed")
    done = subprocess.run([*FMDEPLOY, "build", bundle.root, "--out", tmp_path / "engine"], capture_output=True, text=True,
                          check=False)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1
    assert "tensorrt" in done.stderr
    assert "JetPack" in done.stderr


def test_the_device_half_needs_neither_torch_nor_onnx() -> None:
    script = ("import sys, json, fmdeploy.export.tensorrt.build, fmdeploy.export.tensorrt.child\n"
              "print(json.dumps([name for name in ('torch', 'onnx', 'modelopt') if name in sys.modules]))")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []
