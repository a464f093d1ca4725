"""A tier runs only after its golden vectors pass here; a bundle opens only as it was sealed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from fmdeploy.cpu import Isa
from fmdeploy.draft import Draft
from fmdeploy.errors import ArtifactError, MissingError, ModelFileError
from fmdeploy.runtime import Runtime, open_bundle, tiers
from fmdeploy.runtime.backends.onnxrt import OrtBackend
from fmdeploy.runtime.tiers import TIERS, admit_tier
from support.bundles import fp32_model, inputs, int8_model, make_bundle, run_model
from support.runtimes import frame, runtime, toy_bundle


def test_best_tier_first() -> None:
    target = Runtime(toy_bundle())
    assert target.tier == "int8-cpu"
    assert [report.tier for report in target.reports] == list(TIERS)
    assert [report.tier for report in target.reports if report.admitted] == ["int8-cpu"]
    assert target.reports[-1].reason == "not tried: int8-cpu was admitted"
    missing = {report.tier: report.reason for report in target.reports[:3]}
    assert missing["trt-int8"] == "the bundle has no model.int8.onnx"


def test_result_is_that_of_bare_onnxruntime() -> None:
    good = frame()
    expected = run_model(fp32_model(), {name: array[None] for name, array in good.items()})
    outputs = runtime("fp32").infer(good).outputs
    assert np.array_equal(outputs["bev"], expected["bev"][0])
    assert np.array_equal(outputs["scene"], expected["scene"][0])


def _corrupt(variant: str) -> Any:
    def change(draft: Draft) -> None:
        from safetensors.numpy import load_file

        tensors = load_file(draft.path("golden.safetensors"))
        tensors[f"output.{variant}.bev"] = tensors[f"output.{variant}.bev"][::-1].copy()
        draft.write_tensors("golden.safetensors", tensors)

    return change


def test_corrupt_golden_vectors_refuse_the_tier(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path / "b", change=_corrupt("int8-cpu"))
    target = Runtime(bundle.root)
    assert target.tier == "fp32"
    refused = next(report for report in target.reports if report.tier == "int8-cpu")
    assert "golden vectors differ" in refused.reason
    assert "at least 30.0 dB needed" in refused.reason
    assert target.infer(frame()).valid


def test_altered_model_is_refused_by_its_golden_vectors(tmp_path: Path) -> None:
    """Sealed with a flipped sign in a weight: every hash is right, the numbers are not."""
    model = onnx.load_from_string(fp32_model())
    weights = numpy_helper.to_array(model.graph.initializer[1]).copy()
    weights[0] *= -1
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(weights, "w2"))
    altered = model.SerializeToString()

    def change(draft: Draft) -> None:
        draft.path("model.fp32.onnx").write_bytes(altered)

    bundle = make_bundle(tmp_path / "b", change=change)
    with pytest.raises(ModelFileError, match="no tier passes its self-test here: fp32: golden vectors differ"):
        Runtime(bundle.root, tiers=("fp32",))
    assert Runtime(bundle.root).tier == "int8-cpu"


def test_unknown_tier_is_named() -> None:
    with pytest.raises(ModelFileError, match=r"int4: the bundle has no model.int4.onnx"):
        Runtime(toy_bundle(), tiers=("int4",))
    with pytest.raises(ModelFileError, match="none was asked for"):
        Runtime(toy_bundle(), tiers=())


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b\x08junk", b"version https://git-lfs.github.com/spec/v1\n", None],
                         ids=["empty", "gzip", "lfs", "cut"])
def test_file_that_is_no_model(tmp_path: Path, content: bytes | None) -> None:
    raw = fp32_model()[: len(fp32_model()) // 2] if content is None else content

    def change(draft: Draft) -> None:
        draft.path("model.fp32.onnx").write_bytes(raw)

    report = admit_tier(open_bundle(make_bundle(tmp_path / "b", change=change).root), "fp32", 1)[1]
    assert not report.admitted
    assert "is not an ONNX model" in report.reason
    assert "\n" not in report.reason


def test_external_data_is_refused_before_onnxruntime(tmp_path: Path) -> None:
    model = onnx.load_from_string(fp32_model())
    tensor = model.graph.initializer[0]
    onnx.external_data_helper.set_external_data(tensor, location="../../etc/passwd")
    tensor.ClearField("raw_data")
    external = model.SerializeToString()

    def change(draft: Draft) -> None:
        draft.path("model.fp32.onnx").write_bytes(external)

    bundle = open_bundle(make_bundle(tmp_path / "b", change=change).root)
    with pytest.raises(ModelFileError, match="refers to data outside the file"):
        bundle.model_bytes("fp32")


def test_io_must_be_that_of_the_bundle() -> None:
    bundle = open_bundle(toy_bundle())
    other = bundle.io.model_copy(update={"inputs": bundle.io.inputs[::-1]})
    with pytest.raises(ModelFileError, match="inputs are not those of io.json"):
        OrtBackend(fp32_model(), other)
    with pytest.raises(ModelFileError, match="does not fit io.json"):
        OrtBackend(fp32_model(32), bundle.io)


def test_missing_provider_is_an_error_not_a_fallback() -> None:
    with pytest.raises(MissingError, match="expected CUDAExecutionProvider") as caught:
        OrtBackend(fp32_model(), open_bundle(toy_bundle()).io, provider="CUDAExecutionProvider")
    assert caught.value.exit_code == 3


def test_a_cpu_that_saturates_is_refused_whatever_the_golden_vectors_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(draft: Draft) -> None:
        index = json.loads(draft.path("golden.json").read_text())
        draft.write_json("golden.json", {**index, "saturates_without_vnni": ["/stem/Conv", "/head/Conv"]})

    bundle = open_bundle(make_bundle(tmp_path / "b", change=change).root)
    monkeypatch.setattr(tiers, "this_cpu", lambda: Isa("x86_64", True))
    assert Runtime(bundle).tier == "int8-cpu"
    monkeypatch.setattr(tiers, "this_cpu", lambda: Isa("x86_64", False))
    found = Runtime(bundle)
    assert found.tier == "fp32"
    refused = next(report for report in found.reports if report.tier == "int8-cpu")
    assert refused.reason == "this CPU has no VNNI: 8-bit products may saturate in 2 layers, such as /stem/Conv"
    assert Runtime(toy_bundle()).tier == "int8-cpu", "no layer of that one saturates"


def test_two_runs_are_bit_equal() -> None:
    batch = inputs(8, seed=5)
    one, two = runtime("int8-cpu"), runtime("int8-cpu")
    for i in range(8):
        sample = {name: array[i] for name, array in batch.items()}
        assert np.array_equal(one.infer(sample).outputs["bev"], two.infer(sample).outputs["bev"])


@pytest.mark.parametrize("name", ["model.int8-cpu.onnx", "golden.safetensors", "budgets.toml", "io.json", "manifest.json"])
def test_altered_bundle_is_refused(tmp_path: Path, name: str) -> None:
    root = make_bundle(tmp_path / "b").root
    raw = bytearray((root / name).read_bytes())
    raw[len(raw) // 2] ^= 0x40
    (root / name).write_bytes(raw)
    with pytest.raises(ArtifactError) as caught:
        Runtime(root)
    assert caught.value.exit_code == 2


def test_model_that_changes_after_opening_is_refused(tmp_path: Path) -> None:
    bundle = open_bundle(make_bundle(tmp_path / "b").root)
    path = bundle.artifact.path("model.fp32.onnx")
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    with pytest.raises(ArtifactError, match="was altered"):
        bundle.model_bytes("fp32")


def test_running_model_survives_its_file(tmp_path: Path) -> None:
    """F23: the weights were copied, so truncating or deleting the file harms nobody."""
    root = make_bundle(tmp_path / "b").root
    target = Runtime(root, tiers=("fp32",))
    expected = target.infer(frame()).outputs["bev"]
    os.truncate(root / "model.fp32.onnx", 10)
    (root / "model.int8-cpu.onnx").unlink()
    assert np.array_equal(target.infer(frame()).outputs["bev"], expected)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["model.fp32.onnx", "golden.safetensors", "manifest.json"])
def test_fifo_does_not_hang(tmp_path: Path, name: str) -> None:
    root = make_bundle(tmp_path / "b").root
    (root / name).unlink()
    os.mkfifo(root / name)
    with pytest.raises(ArtifactError):
        Runtime(root)


@pytest.mark.timeout(20)
def test_fifo_that_appears_after_opening_does_not_hang(tmp_path: Path) -> None:
    bundle = open_bundle(make_bundle(tmp_path / "b").root)
    path = bundle.artifact.path("model.fp32.onnx")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ArtifactError, match="not a regular file"):
        bundle.model_bytes("fp32")
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(ArtifactError, match="behind a link"):
        bundle.model_bytes("fp32")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("io.json", [], "not a JSON object"),
        ("golden.json", {"samples": []}, "variants"),
        ("input_statistics.json", {"inputs": {}}, "no statistics of an input"),
        ("input_statistics.json", {"inputs": {"lidar": {"channel_mean": [0.1]}}}, "channel_std"),
    ],
)
def test_bundle_whose_files_do_not_fit(tmp_path: Path, name: str, value: Any, message: str) -> None:
    bundle = make_bundle(tmp_path / "b", change=lambda draft: draft.write_json(name, value))
    with pytest.raises((ArtifactError, Exception), match=message) as caught:
        open_bundle(bundle.root)
    assert getattr(caught.value, "exit_code", None) == 2


BLOCKED = """
import sys
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "onnx", "modelopt", "transformers", "accelerate", "highway_env"}:
            raise ImportError(f"blocked: {name}")
sys.meta_path.insert(0, Wall())
import json
from fmdeploy.runtime import Runtime
import fmdeploy.runtime.measure.bench, fmdeploy.runtime.check.check, fmdeploy.compare.compare, fmdeploy.runtime.run
runtime = Runtime(sys.argv[1])
frame = runtime.infer(runtime.bundle.golden.sample(0))
loaded = sorted({"torch", "onnx", "modelopt"} & set(sys.modules))
print(json.dumps([frame.tier, frame.valid, loaded]))
"""


def test_runtime_works_without_torch_and_onnx() -> None:
    done = subprocess.run([sys.executable, "-c", BLOCKED, str(toy_bundle())], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["int8-cpu", True, []]


INFER_IN_A_CHILD = """
if os.fork() == 0:
    try:
        runtime.infer(runtime.bundle.golden.sample(0))
    except Exception as error:
        print(error, flush=True)
    os._exit(0)
os.wait()
"""

FORK = """
import os, sys
from fmdeploy.runtime import Runtime
runtime = Runtime(sys.argv[1])
""" + INFER_IN_A_CHILD


def test_forked_runtime_is_refused() -> None:
    done = subprocess.run([sys.executable, "-c", FORK, str(toy_bundle())], capture_output=True, text=True, check=False)
    assert "the runtime was forked" in done.stdout


FORK_WHILE_BUSY = """
import os, sys, threading
from fmdeploy.runtime import Runtime
runtime = Runtime(sys.argv[1])
taken, done = threading.Event(), threading.Event()
def busy():
    with runtime._lock:
        taken.set()
        done.wait()
threading.Thread(target=busy, daemon=True).start()
taken.wait()
""" + INFER_IN_A_CHILD + "done.set()"


def test_fork_while_another_thread_infers_does_not_hang() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", FORK_WHILE_BUSY, str(toy_bundle())], capture_output=True,
                          text=True, check=False, timeout=30)
    assert "the runtime was forked" in done.stdout


def test_int8_model_is_really_quantised() -> None:
    ops = [node.op_type for node in onnx.load_from_string(int8_model()).graph.node]
    assert ops.count("QuantizeLinear") >= 4
