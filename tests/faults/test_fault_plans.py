"""M30, M31: plans and timing caches that are damaged, or belong elsewhere.

What ran: every check of ours; the refusals of the real library of TensorRT-RTX 1.7.1 (it parses a plan's header without
a GPU) for empty, short, foreign and truncated plans; the real builder with damaged timing caches. What did not: TensorRT
10 and 11 on a GPU. Their refusals of plans for another version, GPU or with host code are played by a stand-in with the
words that TensorRT's own library holds, or that users reported (TensorRT#2105, #2177).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from fmdeploy.export.tensorrt.builder import Built, Options, _use_timing_cache, build_engine
from fmdeploy.runtime.backends.planfault import PlanFault, fault_of
from fmdeploy.runtime.backends.tensorrt_api import capturing_logger, complaints, error_recorder, installed, load_api
from fmdeploy.runtime.inference import Inference
from fmdeploy.runtime.tiers import admit_tier
from support.bundles import fp32_model, int8_model
from support.engines import builder, device_bundle, good_plan, install_tensorrt, make_engine, terms
from support.fake_tensorrt import HOST_CODE, plan_of

needs_library = pytest.mark.skipif(not installed("tensorrt-rtx"), reason="needs the extra [trt-rtx]")
PLANS: dict[PlanFault, bytes] = {
    PlanFault.EMPTY: b"",
    PlanFault.TOO_SHORT: good_plan()[:23],
    PlanFault.NOT_A_PLAN: b"PK\x03\x04" + good_plan()[4:],
    PlanFault.TRUNCATED: good_plan()[:-100],
    PlanFault.HOST_CODE: plan_of(int8_model(), flags=HOST_CODE),
    PlanFault.OTHER_TENSORRT: plan_of(int8_model(), version=(10, 16, 2, 10)),
    PlanFault.OTHER_GPU: plan_of(int8_model(), sm=86),
}
KEYS: dict[PlanFault, dict[str, Any]] = {
    PlanFault.OTHER_MODEL: {"model_sha256": "0" * 64},
    PlanFault.OTHER_TENSORRT: {"version": "10.16.2.10"},
    PlanFault.OTHER_GPU: {"multiprocessors": 16},
    PlanFault.OTHER_L4T: {"l4t": "36.3.0"},
    PlanFault.HOST_CODE: {"flags": ("STRONGLY_TYPED", "VERSION_COMPATIBLE")},
}


@pytest.mark.parametrize("fault", PLANS, ids=lambda fault: fault.value)
def test_M30_a_plan_that_is_no_good_has_its_own_code(
    fault: PlanFault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fdti: Any
) -> None:
    """Sealed like that: every hash is right, and yet it must not run."""
    install_tensorrt(monkeypatch)
    bundle, here = device_bundle(tmp_path), terms(tmp_path)
    make_engine(tmp_path / "engines/e", bundle, PLANS[fault])
    with fdti.detecting(fault.value):
        backend, report = admit_tier(bundle, "trt-int8", 1, here)
    assert backend is None
    assert f"{fault.value}: " in report.reason


@pytest.mark.parametrize("fault", KEYS, ids=lambda fault: fault.value)
def test_M30_a_plan_for_something_else_is_not_even_read(
    fault: PlanFault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fdti: Any
) -> None:
    install_tensorrt(monkeypatch)
    bundle, here = device_bundle(tmp_path), terms(tmp_path)
    engine = make_engine(tmp_path / "engines/e", bundle, **KEYS[fault])
    engine.path("engine.plan").write_bytes(b"would be refused for its hash, if it were read")
    with fdti.detecting(fault.value):
        backend, report = admit_tier(bundle, "trt-int8", 1, here)
    assert backend is None
    assert f"{fault.value}: " in report.reason


@pytest.mark.parametrize(("fault", "change"), [
    (PlanFault.TRUNCATED, lambda plan: plan[:-1]),
    (PlanFault.EMPTY, lambda plan: b""),
    (PlanFault.ALTERED, lambda plan: plan[:-1] + bytes([plan[-1] ^ 1])),
], ids=lambda value: getattr(value, "value", ""))
def test_M30_a_plan_that_changed_on_disk_never_reaches_tensorrt(
    fault: PlanFault, change: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fdti: Any
) -> None:
    bundle, here = device_bundle(tmp_path), terms(tmp_path)
    path = make_engine(tmp_path / "engines/e", bundle).path("engine.plan")
    path.write_bytes(change(path.read_bytes()))
    install_tensorrt(monkeypatch)
    monkeypatch.setattr("fmdeploy.runtime.engines.load.TensorRtBackend", None)
    with fdti.detecting(fault.value):
        report = admit_tier(bundle, "trt-int8", 1, here)[1]
    assert f"{fault.value}: " in report.reason


def test_M30_control_a_good_plan_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_tensorrt(monkeypatch)
    bundle, here = device_bundle(tmp_path), terms(tmp_path)
    assert "PLAN_MISSING: there is no engine of int8" in admit_tier(bundle, "trt-int8", 1, here)[1].reason
    make_engine(tmp_path / "engines/e", bundle)
    make_engine(tmp_path / "engines/foreign", bundle, sm="72")
    backend, report = admit_tier(bundle, "trt-int8", 1, here)
    assert backend is not None
    assert (report.admitted, report.provider, report.reason) == (True, "tensorrt 10.3.0.26", "")
    assert report.n >= 12
    assert report.p50_ms is not None


@needs_library
@pytest.mark.parametrize("fault", [PlanFault.EMPTY, PlanFault.TOO_SHORT, PlanFault.NOT_A_PLAN, PlanFault.TRUNCATED],
                         ids=lambda fault: fault.value)
def test_M30_the_words_of_the_real_library_are_understood(fault: PlanFault, fdti: Any) -> None:
    """TensorRT-RTX reads a plan's header before it asks for a GPU. Its errors go to the recorder, not to the log."""
    api = load_api("tensorrt-rtx")
    size = 200
    whole = b"vtrt" + bytes(4) + (2).to_bytes(8, "little") + size.to_bytes(8, "little") + bytes([1, 7, 1, 116])
    whole += bytes(size - len(whole))
    plan = {PlanFault.EMPTY: b"", PlanFault.TOO_SHORT: whole[:23], PlanFault.NOT_A_PLAN: b"PK\x03\x04" + whole[4:],
            PlanFault.TRUNCATED: whole[:-100]}[fault]
    log, recorder = capturing_logger(api), error_recorder(api)
    runtime = api.module.Runtime(log)
    runtime.error_recorder = recorder
    with fdti.detecting(fault.value):
        assert runtime.deserialize_cuda_engine(plan) is None
    said = "; ".join(complaints([("ERROR", text) for _, text in recorder.errors]))
    assert fault_of(said) is fault, said


@pytest.mark.parametrize("fault", [PlanFault.TRUNCATED, PlanFault.OTHER_GPU, PlanFault.OTHER_L4T],
                         ids=lambda fault: fault.value)
def test_M30_the_way_back_is_a_new_build(
    fault: PlanFault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fdti: Any
) -> None:
    """Built by another process; what was ours and unfit is set aside, what belongs elsewhere stays."""
    install_tensorrt(monkeypatch)
    bundle = device_bundle(tmp_path)
    here = terms(tmp_path, build_missing=True, build_command=builder(tmp_path))
    out = tmp_path / "engines/bundle-int8"
    if fault is PlanFault.OTHER_L4T:
        make_engine(tmp_path / "engines/old", bundle, l4t="36.3.0")
    else:
        make_engine(out, bundle, PLANS[fault])
    started = time.perf_counter()
    backend, report = admit_tier(bundle, "trt-int8", 1, here)
    fdti.report(1e3 * (time.perf_counter() - started), f"{fault.value} to a new engine")
    assert backend is not None
    assert report.admitted, report.reason
    assert (out / "engine.plan").read_bytes() == good_plan()
    left = {path.name for path in (tmp_path / "engines").iterdir()}
    assert left == {"bundle-int8", "old"} if fault is PlanFault.OTHER_L4T else {"bundle-int8", f".bundle-int8.{fault.value.lower()}"}


def test_M30_no_build_without_leave_or_memory_and_its_failure_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fdti: Any
) -> None:
    install_tensorrt(monkeypatch)
    bundle = device_bundle(tmp_path)
    refused = admit_tier(bundle, "trt-int8", 1, terms(tmp_path, build_command=builder(tmp_path)))[1].reason
    assert "PLAN_MISSING" in refused
    poor = terms(tmp_path, build_missing=True, available_mib=500, build_command=builder(tmp_path))
    with fdti.detecting("memory floor"):
        refused = admit_tier(bundle, "trt-int8", 1, poor)[1].reason
    assert "PLAN_MISSING" in refused
    assert "too little memory is left to build an engine (expected at least 1024 MiB available, found 500 MiB)" in refused
    broken = terms(tmp_path, build_missing=True, build_command=builder(tmp_path, fails="the compiler is tired"))
    refused = admit_tier(bundle, "trt-int8", 1, broken)[1].reason
    assert "PLAN_MISSING" in refused
    assert "ended with status 1: the compiler is tired" in refused
    assert list((tmp_path / "engines").iterdir()) == []


def test_M30_the_onnx_tier_takes_over_where_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fdti: Any) -> None:
    install_tensorrt(monkeypatch)
    bundle, here = device_bundle(tmp_path), terms(tmp_path)
    make_engine(tmp_path / "engines/e", bundle, good_plan()[:-7])
    with fdti.detecting("to the next tier"):
        found = Inference(bundle, tiers=("trt-int8", "fp32"), terms=here)
    assert found.tier == "fp32"
    assert "PLAN_TRUNCATED" in found.reports[0].reason


class _Cache:
    """A builder configuration whose timing cache cannot be used."""

    def __init__(self, *, made: bool, taken: bool) -> None:
        self.made, self.taken = made, taken
        self.given: list[bytes] = []

    def create_timing_cache(self, content: bytes) -> Any:
        self.given.append(content)
        return ("cache", content) if self.made or not content else None

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        assert ignore_mismatch is False
        return self.taken or not cache[1]


@pytest.mark.parametrize("how", [{"made": False, "taken": True}, {"made": True, "taken": False}], ids=["corrupt", "foreign"])
def test_M31_a_timing_cache_that_is_refused_is_left_behind(how: dict[str, bool], fdti: Any) -> None:
    config, built = _Cache(**how), Built("10.3")
    with fdti.detecting():
        cache = _use_timing_cache(config, Options(timing_cache=b"junk"), built)
    assert (cache, config.given, built.flags) == (("cache", b""), [b"junk", b""], ["timing_cache"])


@needs_library
@pytest.mark.filterwarnings("ignore:.*Timing cache operations are no-ops:DeprecationWarning")
@pytest.mark.parametrize("junk", [b"junk", b"\x00" * 4096], ids=["corrupt", "zeros"])
def test_M31_the_real_builder_builds_in_spite_of_it(junk: bytes, fdti: Any) -> None:
    """TensorRT-RTX takes a timing cache and makes nothing of it: this shows only that ours goes through its API."""
    with fdti.detecting("build with a useless cache"):
        built = build_engine(load_api("tensorrt-rtx"), fp32_model(), Options(64, timing_cache=junk))
    assert built.engine is not None, repr(built.problems)
    assert built.timing_cache != junk


def test_M31_control_a_good_cache_is_taken() -> None:
    config, built = _Cache(made=True, taken=True), Built("10.3")
    assert _use_timing_cache(config, Options(timing_cache=b"times"), built) == ("cache", b"times")
    assert config.given == [b"times"]
