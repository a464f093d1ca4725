"""F20, F25, F26, F27, F30: what is missing, foreign or untrustworthy about a backend is named before it serves.

What ran: ONNX Runtime and OpenVINO on the CPU, packages and shared libraries that are really missing, child processes.
What did not: a GPU. TensorRT's refusals are played by a stand-in with the words that users reported.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from fmdeploy.arrays import Array, Arrays
from fmdeploy.budgets import AccuracyBudget, Budgets, TargetBudget
from fmdeploy.errors import MissingError, ModelFileError
from fmdeploy.jetson import preflight
from fmdeploy.runtime import Runtime, open_bundle
from fmdeploy.runtime.backends.onnxrt import OrtBackend
from fmdeploy.runtime.backends.planfault import PlanFault, fault_of
from fmdeploy.runtime.inference import Inference
from fmdeploy.runtime.tiers import admit_tier
from fmdeploy.runtime.trial import MemoryMark, peak_growth_mib
from support.bundles import fp32_model, int8_model, make_bundle
from support.engines import builder, device_bundle, install_tensorrt, make_engine, terms
from support.fake_tensorrt import fake_api
from support.runtimes import toy_bundle

CHILD = """
import json, sys
import numpy as np
from fmdeploy.ortsession import ort_session
from fmdeploy.runtime.measure.memory import peak_mib
from fmdeploy.runtime.trial import MemoryMark, peak_growth_mib
session = ort_session(open(sys.argv[1], "rb").read())
before = MemoryMark.now()
for batch in map(int, sys.argv[2:]):
    session.run(None, {"x": np.ones((batch, 16, 128, 128), np.float32)})
after = MemoryMark.now()
print(json.dumps({"growth": peak_growth_mib(before, after), "rss": after.rss - before.rss, "peak": peak_mib()}))
"""


def dynamic_model() -> bytes:
    """Three convolutions with a free batch axis: 1 MiB of activations a sample and layer."""
    weights = numpy_helper.from_array(np.full((16, 16, 3, 3), 0.01, np.float32), "w")
    nodes = [helper.make_node("Conv", [a, "w"], [b], kernel_shape=[3, 3], pads=[1, 1, 1, 1])
             for a, b in (("x", "a"), ("a", "b"), ("b", "y"))]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 16, 128, 128]) for name in "xy"]
    model = helper.make_model(helper.make_graph(nodes, "dynamic", ends[:1], ends[1:], [weights]),
                              opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def memory_of(folder: Path, *batches: int) -> dict[str, float]:
    (folder / "m.onnx").write_bytes(dynamic_model())
    done = subprocess.run([sys.executable, "-c", CHILD, str(folder / "m.onnx"), *map(str, batches)], capture_output=True,
                          text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, float] = json.loads(done.stdout)
    return found


def test_F20_the_peak_of_a_large_batch_stays_on_the_bill(tmp_path: Path, fdti: Any) -> None:
    """Batch 32, then 1: what counts is the worst moment, whatever is resident afterwards."""
    with fdti.detecting("process included"):
        large = memory_of(tmp_path, 32, 1)
    small = memory_of(tmp_path, 1)
    assert large["growth"] > 60
    assert large["growth"] >= large["rss"]
    assert large["growth"] > small["growth"] + 50
    assert large["peak"] > small["peak"] + 50


def test_F20_control_small_batches_have_a_small_bill(tmp_path: Path) -> None:
    assert memory_of(tmp_path, 1, 1, 1)["growth"] < 40


def test_F20_a_peak_that_is_over_refuses_though_the_memory_was_given_back(fdti: Any) -> None:
    """RSS is back where it was; an earlier peak hides a smaller one, and then the resident set is the least to say."""
    with fdti.detecting():
        assert peak_growth_mib(MemoryMark(100, 110, 0), MemoryMark(101, 760, 30)) == 690
        assert peak_growth_mib(MemoryMark(100, 900, 0), MemoryMark(350, 900, 0)) == 250
        assert peak_growth_mib(None, MemoryMark(1, 1, 0)) is None


class NoRoom:
    """Takes 96 MiB while it loads, and gives them back."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._inner = OrtBackend(*args, **options)
        np.ones(96 * 2**20, np.uint8).sum()

    provider, threads = "hungry", 1

    def run(self, feeds: Arrays) -> Any:
        return self._inner.run(feeds)


HUNGRY = """
import json, sys
sys.path[:0] = {path!r}
from pathlib import Path
from faults.test_fault_backends import NoRoom
from fmdeploy.runtime import loading, open_bundle
from fmdeploy.runtime.tiers import admit_tier
if sys.argv[2] == "hungry":
    loading.OrtBackend = NoRoom
report = admit_tier(open_bundle(sys.argv[1]), "fp32", 1, loading.Terms(target="here"))[1]
print(json.dumps(report.to_json()))
"""


def admitted_in_a_child(bundle: Path, how: str) -> dict[str, Any]:
    script = HUNGRY.format(path=[str(Path(__file__).parents[1]), *filter(None, sys.path)])
    done = subprocess.run([sys.executable, "-c", script, str(bundle), how], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_F20_a_tier_over_its_memory_is_refused_with_both_numbers(tmp_path: Path, fdti: Any) -> None:
    limits = Budgets(accuracy=AccuracyBudget(metric="iou"), target={"here": TargetBudget(peak_mib=64.0)})
    bundle = make_bundle(tmp_path / "b", limits=limits).root
    with fdti.detecting("process included"):
        found = admitted_in_a_child(bundle, "hungry")
    assert not found["admitted"]
    assert "MiB at its peak, the budget is 64 MiB" in found["reason"]
    assert found["mib"] > 90
    modest = admitted_in_a_child(bundle, "modest")
    assert modest["admitted"], modest["reason"]
    assert modest["mib"] < 64


# F25
@pytest.mark.parametrize(("tier", "word"), [("cuda-fp16", "CUDAExecutionProvider"), ("trt-int8", "tensorrt")])
def test_F25_a_provider_that_is_missing_fails_the_start(tier: str, word: str, tmp_path: Path, fdti: Any) -> None:
    models = {"fp32": fp32_model(), "int8": int8_model(), "fp16": fp32_model()}
    bundle = open_bundle(make_bundle(tmp_path / "b", models=models).root)
    with fdti.detecting(tier), pytest.raises(ModelFileError, match=f"{tier}: .*{word}"):
        Runtime(bundle, tiers=(tier,))


def test_F25_a_fallback_is_taken_only_where_it_was_named(tmp_path: Path, fdti: Any) -> None:
    models = {"fp32": fp32_model(), "fp16": fp32_model()}
    bundle = open_bundle(make_bundle(tmp_path / "b", models=models).root)
    with fdti.detecting("to the fallback"):
        found = Runtime(bundle, tiers=("cuda-fp16", "fp32"))
    assert (found.tier, found.reports[1].provider) == ("fp32", "CPUExecutionProvider")
    assert "expected CUDAExecutionProvider" in found.reports[0].reason
    assert found.infer(bundle.golden.sample(0)).provider == "CPUExecutionProvider"


def test_F25_control_the_provider_that_is_there_is_reported(fdti: Any) -> None:
    assert OrtBackend(fp32_model(), open_bundle(toy_bundle()).io).provider == "CPUExecutionProvider"
    with pytest.raises(MissingError):
        OrtBackend(fp32_model(), open_bundle(toy_bundle()).io, provider="TensorrtExecutionProvider")


# F26
TEXTS = {
    "TensorRT#2105": ("1: [stdArchiveReader.cpp::StdArchiveReader::40] Error Code 1: Serialization (Serialization assertion "
                      "stdVersionRead == serializationVersion failed.Version tag does not match. Note: Current Version: 0, "
                      "Serialized Engine Version: 43)", PlanFault.OTHER_TENSORRT),
    "TensorRT#2177": ("6: The engine plan file is generated on an incompatible device, expecting compute 8.6 got compute "
                      "7.5, please rebuild.", PlanFault.OTHER_GPU),
    "unknown": ("4: [runtime.cpp::deserializeCudaEngine::50] Error Code 4: Internal Error (Engine deserialization failed.)",
                PlanFault.INCOMPATIBLE),
    "nothing": ("", PlanFault.INCOMPATIBLE),
}


@pytest.mark.parametrize("name", TEXTS)
def test_F26_no_engine_is_a_typed_refusal_and_the_next_tier_serves(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fdti: Any
) -> None:
    text, fault = TEXTS[name]
    install_tensorrt(monkeypatch, fake_api(loads=False, says=text))
    bundle, here = device_bundle(tmp_path), terms(tmp_path)
    make_engine(tmp_path / "engines/e", bundle, int8_model())
    with fdti.detecting(name):
        found = Inference(bundle, tiers=("trt-int8", "fp32"), terms=here)
    assert found.tier == "fp32"
    assert f"{fault.value}: TensorRT 10.3.0.26 does not load this engine: " in found.reports[0].reason
    assert fault.value.startswith("PLAN_INCOMPATIBLE")
    assert (text[-40:] or "without a message") in found.reports[0].reason


def test_F26_without_a_fallback_the_start_fails_and_with_leave_it_builds_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fdti: Any
) -> None:
    bundle = device_bundle(tmp_path)
    make_engine(tmp_path / "engines/bundle-int8", bundle, int8_model())
    install_tensorrt(monkeypatch, fake_api(loads=False, says=TEXTS["TensorRT#2105"][0]))
    with pytest.raises(ModelFileError, match="PLAN_INCOMPATIBLE_TENSORRT"):
        Inference(bundle, tiers=("trt-int8",), terms=terms(tmp_path))
    with fdti.detecting("to a new engine"):
        found = Inference(bundle, tiers=("trt-int8",),
                          terms=terms(tmp_path, build_missing=True, build_command=builder(tmp_path)))
    assert found.tier == "trt-int8"
    assert (tmp_path / "engines/.bundle-int8.plan_incompatible_tensorrt/engine.plan").read_bytes() == int8_model()


def test_F26_control_an_engine_that_loads_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_tensorrt(monkeypatch)
    bundle = device_bundle(tmp_path)
    make_engine(tmp_path / "engines/e", bundle)
    found = Inference(bundle, tiers=("trt-int8", "fp32"), terms=terms(tmp_path))
    assert found.tier == "trt-int8"
    result = found.run(bundle.golden.sample(0))
    assert (result.tier, result.provider) == ("trt-int8", "tensorrt 10.3.0.26")
    assert result.model == bundle.model_sha256("int8")
    assert fault_of("all is well") is PlanFault.INCOMPATIBLE


# F27
@pytest.fixture
def broken_tensorrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A package `tensorrt` that the dynamic linker refuses, with its own words."""
    preflight.import_problem.cache_clear()

    def make(code: str) -> None:
        package = tmp_path / "site" / "tensorrt"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(code)
        monkeypatch.syspath_prepend(str(tmp_path / "site"))

    yield make
    preflight.import_problem.cache_clear()


LINKER = "import ctypes\nctypes.CDLL('libnvdla_compiler.so')\n"


def test_F27_a_missing_shared_library_is_named_with_what_to_do(
    broken_tensorrt: Any, tmp_path: Path, fdti: Any
) -> None:
    try:
        ctypes.CDLL("libnvdla_compiler.so")
    except OSError:
        pass
    else:
        pytest.skip("this machine has the library")
    broken_tensorrt(LINKER)
    bundle, here = device_bundle(tmp_path), terms(tmp_path)
    with fdti.detecting():
        report = admit_tier(bundle, "trt-int8", 1, here)[1]
    assert "the shared library libnvdla_compiler.so is missing" in report.reason
    assert "JetPack 6" in report.reason
    assert "Traceback" not in report.reason
    assert "tensorrt" not in sys.modules, "the import died in a child"


@pytest.mark.parametrize(("code", "words"), [
    ("raise ImportError('libfoo.so.3: cannot open shared object file: No such file or directory')", "libfoo.so.3 is missing"),
    ("import os\nos.kill(os.getpid(), 11)", "ends in SIGSEGV"),
    ("raise RuntimeError('the driver is gone')", "RuntimeError: the driver is gone"),
])
def test_F27_whatever_an_import_dies_of_ends_in_one_line(
    code: str, words: str, broken_tensorrt: Any, tmp_path: Path, fdti: Any
) -> None:
    broken_tensorrt(code)
    bundle, here = device_bundle(tmp_path), terms(tmp_path)
    with fdti.detecting(words):
        found = Inference(bundle, tiers=("trt-int8", "fp32"), terms=here)
    assert found.tier == "fp32"
    assert words in found.reports[0].reason
    assert "\n" not in found.reports[0].reason


def test_F27_control_a_package_that_imports_has_no_problem(broken_tensorrt: Any, tmp_path: Path) -> None:
    broken_tensorrt("__version__ = '10.3.0.26'\n")
    assert preflight.is_installed("tensorrt")
    assert preflight.import_problem("tensorrt") == ""
    assert not preflight.is_installed("a_package_that_nobody_has")


# F30
class Noisy:
    """Adds noise that is far below the golden vectors' tolerance."""

    level = 1e-5

    def __init__(self, *args: Any, **options: Any) -> None:
        self._inner, self._random = OrtBackend(*args, **options), np.random.default_rng(0)

    provider, threads = "noisy", 1

    def run(self, feeds: Arrays) -> Any:
        return [array + self._noise(array) for array in self._inner.run(feeds)]

    def _noise(self, array: Array) -> Array:
        return np.asarray(self._random.normal(size=array.shape, scale=self.level), np.float32)


def test_F30_a_backend_that_does_not_repeat_itself_is_flagged(monkeypatch: pytest.MonkeyPatch, fdti: Any) -> None:
    monkeypatch.setattr("fmdeploy.runtime.loading.OrtBackend", Noisy)
    with fdti.detecting():
        backend, report = admit_tier(open_bundle(toy_bundle()), "fp32", 1)
    assert backend is None
    assert report.reason.startswith("not repeatable: two runs of one input differ in 'bev'")
    assert report.sqnr_db is not None
    assert report.limit_db is not None
    assert report.sqnr_db > report.limit_db, "its golden vectors pass: only the repetition tells"


def test_F30_control_the_same_backend_without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmdeploy.runtime.loading.OrtBackend", Noisy)
    monkeypatch.setattr(Noisy, "level", 0.0)
    assert admit_tier(open_bundle(toy_bundle()), "fp32", 1)[1].admitted


@pytest.mark.parametrize(("noise", "admitted"), [(1e-4, True), (0.05, False)])
def test_F30_a_gpu_may_differ_within_the_tolerance(
    noise: float, admitted: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fdti: Any
) -> None:
    """The order of sums on a GPU may change; a random answer may not hide behind that."""
    install_tensorrt(monkeypatch, fake_api(noise=noise))
    bundle, here = device_bundle(tmp_path), terms(tmp_path)
    make_engine(tmp_path / "engines/e", bundle)
    with fdti.detecting(f"noise {noise:g}"):
        report = admit_tier(bundle, "trt-int8", 1, here)[1]
    assert report.admitted is admitted, report.reason


def test_F30_openvino_repeats_itself_in_every_bit(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    report = admit_tier(device_bundle(tmp_path), "openvino-int8", 1)[1]
    assert report.admitted, report.reason
