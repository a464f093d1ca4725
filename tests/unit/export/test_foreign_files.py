"""Files of modelopt, ONNX Runtime and NNCF: the lint says what TensorRT's parser says, and both dialects come out."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from fmdeploy.errors import ModelFileError
from fmdeploy.evaluate.sqnr import sqnr_db
from fmdeploy.export.from_onnx import FILES, lower_file
from fmdeploy.export.lint.lint import lint_file
from fmdeploy.export.lint.rules import RULES
from fmdeploy.export.tensorrt.builder import Built, Options, build_engine
from fmdeploy.export.tensorrt.layertable import read_layers
from fmdeploy.export.tensorrt.verdict import verdicts
from fmdeploy.onnxfile.graph import DQ, Graph, Q
from fmdeploy.onnxfile.reading import read_model
from fmdeploy.onnxfile.session import run_model
from fmdeploy.runtime.backends.tensorrt_api import load_api
from support.foreign import NNCF, ORT, modelopt_file, net_of, nncf_file, ort_file, samples_file

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
SILENT = {rule.id for rule in RULES if rule.effect.get("tensorrt") == "wrong"}


class Expected(NamedTuple):
    """INT8 convolutions and adds of the CPU file in ONNX Runtime, and how close it stays to the source."""

    convs: int
    adds: int
    sqnr_db: float


# What changes is the grid: a tensor whose zero point moves has steps twice as wide, and a rounding step decides 6 dB.
MAKERS: dict[str, tuple[Callable[[Path], Path], str, Expected]] = {
    **{f"residual-ort-{kind}": (partial(ort_file, "residual", kind), "residual", Expected(2, 1, 35)) for kind in ORT},
    **{f"residual-nncf-{kind}": (partial(nncf_file, "residual", kind), "residual", Expected(2, 1, 30))
       for kind in NNCF},
    "mixed-nncf-performance": (lambda folder: nncf_file("mixed", "performance", folder), "mixed", Expected(3, 0, 40)),
    "concat-nncf-performance": (lambda folder: nncf_file("concat", "performance", folder), "concat", Expected(3, 0, 40)),
    "vit-ort-u8s8": (lambda folder: ort_file("vit", "u8s8", folder), "vit", Expected(1, 8, 35)),
    "mixed-ort-u8s8": (lambda folder: ort_file("mixed", "u8s8", folder), "mixed", Expected(4, 0, 35)),
    "residual-modelopt": (lambda folder: modelopt_file("residual", folder), "residual", Expected(2, 1, 40)),
    "batchnorm-modelopt": (lambda folder: modelopt_file("batchnorm", folder, fold=False), "batchnorm",
                           Expected(2, 1, 30)),
    "vit-modelopt-20": (lambda folder: modelopt_file("vit", folder, opset=20), "vit", Expected(0, 0, 60)),
}


class Case(NamedTuple):
    name: str
    path: Path
    net: str
    expected: Expected


@pytest.fixture(scope="module", params=MAKERS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """One foreign file."""
    make, net, expected = MAKERS[request.param]
    return Case(request.param, make(tmp_path_factory.mktemp("foreign")), net, expected)


def lint_verdict(path: Path) -> tuple[bool, set[str]]:
    """Whether the lint says that TensorRT refuses the file, and which silent errors it sees."""
    try:
        errors = {finding.id for finding in lint_file(path) if finding.severity == "error"}
    except ModelFileError:
        return True, set()
    return bool(errors - SILENT), errors & SILENT


def built(path: Path) -> Built:
    """Compile in this process; these files are known to be harmless."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the timing cache is deprecated in TensorRT-RTX
        return build_engine(load_api("tensorrt-rtx"), path.read_bytes(), Options())


@needs_rtx
def test_lint_gives_the_verdict_of_the_real_parser_and_builder(case: Case) -> None:
    refused, _ = lint_verdict(case.path)
    found = built(case.path)
    assert refused == (found.engine is None), f"{case.name}: {[str(problem) for problem in found.problems][:3]}"


@needs_rtx
def test_uint8_that_the_lint_calls_wrong_is_built_as_int8(case: Case, capfd: pytest.CaptureFixture[str]) -> None:
    """The parser takes uint8 with zero point 0 for int8. When this fails, TensorRT has learned uint8: soften FMD002."""
    import tensorrt_rtx as trt

    refused, silent = lint_verdict(case.path)
    if refused or "FMD002" not in silent:
        return
    logger = trt.Logger(trt.Logger.WARNING)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    assert trt.OnnxParser(network, logger).parse(case.path.read_bytes())
    kinds = {network.get_layer(k).get_output(0).dtype for k in range(network.num_layers)
             if network.get_layer(k).type == trt.LayerType.QUANTIZE}
    assert kinds == {trt.DataType.INT8}
    capfd.readouterr()  # its warnings


def test_both_dialects_come_out_and_compute_what_the_source_does(case: Case, tmp_path: Path) -> None:
    if case.name.endswith("operators"):
        with pytest.raises(ModelFileError, match=r"foreign domain.*QuantFormat\.QDQ"):
            lower_file(case.path, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return
    lowered = lower_file(case.path, tmp_path / "out", calibration=samples_file(case.net, tmp_path))
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(FILES)
    assert (lowered.fused.int8_convs, lowered.fused.int8_adds) == case.expected[:2], lowered.fused.counts
    assert lowered.sqnr_db is not None
    for name, row in lowered.sqnr_db.items():
        assert min(row.values()) >= case.expected.sqnr_db, f"{case.name}: {name} {row}"
    assert [f for f in lint_file(tmp_path / "out" / FILES[0]) if f.severity == "error"] == []
    graph = Graph(read_model(tmp_path / "out" / FILES[0]))
    for node in graph.nodes(Q, DQ):
        assert graph.constants[node.input[2]].dtype == np.int8
        assert not graph.constants[node.input[2]].any()
    quantised = Counter(node.input[0] for node in graph.nodes(Q))
    assert [name for name, count in quantised.items() if count > 1] == [], "one pair a tensor"
    if importlib.util.find_spec("tensorrt_rtx") is not None:
        found = built(tmp_path / "out" / FILES[0])
        assert found.engine is not None, found.problems
        kinds = Counter(v.precision for v in verdicts(found.nodes, read_layers(found.layers)) if v.kind == "CONVOLUTION")
        assert set(kinds) == {"INT8"}, kinds


def test_numbers_of_symmetric_files_do_not_change(tmp_path: Path) -> None:
    """Nothing to cover, nothing to measure: the TensorRT file is the source, bit for bit."""
    source = ort_file("mixed", "symmetric", tmp_path)
    lower_file(source, tmp_path / "out")
    feeds = {name: values[:1] for name, values in net_of("mixed")[2].items()}
    wanted, found = (run_model(path, feeds, optimise=False) for path in (source, tmp_path / "out" / FILES[0]))
    assert sqnr_db(wanted["y0"], found["y0"]) == np.inf


def test_covered_grids_are_listed_with_their_cost(tmp_path: Path) -> None:
    lowered = lower_file(nncf_file("residual", "performance", tmp_path), tmp_path / "out")
    covered = [change for change in lowered.changes if "became symmetric" in change.what]
    assert len(covered) >= 3
    assert {round(change.cost_db, 1) for change in covered} == {6.1}, "uint8 over [0, 255 s] in int8: 20 log10(255/127)"
    assert any("not measured" in line for line in lowered.lines())
    assert lowered.to_json()["sqnr_db"] is None


def test_adds_stay_float_and_are_named_without_calibration_data(tmp_path: Path) -> None:
    source = modelopt_file("residual", tmp_path)
    lowered = lower_file(source, tmp_path / "out")
    assert lowered.fused.int8_adds == 0
    assert [why for _, why in lowered.stays_float if "--calibration" in why]
    measured = lower_file(source, tmp_path / "out", calibration=samples_file("residual", tmp_path))
    assert measured.fused.int8_adds == 1
    assert measured.stays_float == ()
    assert sum(bool(re.search(r"measured range \d", change.what)) for change in measured.changes) == 2
    assert [change.cost_db for change in measured.changes] == [0, 0, 0], "the third: no pair in front of TensorRT's add"


def test_relu_that_a_zero_point_stood_for_is_written_out(tmp_path: Path) -> None:
    """ONNX Runtime's tool removes the ReLU in front of a uint8 tensor; TensorRT's grid has negative values again."""
    source = ort_file("residual", "u8s8", tmp_path)
    assert not Graph(read_model(source)).nodes("Relu")
    lowered = lower_file(source, tmp_path / "out")
    assert Graph(read_model(tmp_path / "out" / FILES[0])).nodes("Relu")
    assert any("ReLU" in change.what for change in lowered.changes)
