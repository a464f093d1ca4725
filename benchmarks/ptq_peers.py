"""Accuracy and time of post-training quantisation: fmdeploy's calibrators against the tools others use.

    python benchmarks/ptq_peers.py --work DIR [--demo DIR] [--students NAME ...] [--samples N] [--repeats N]

One float student, one set of calibration samples, one test split for everybody:

    fmdeploy     each calibrator, and auto, as fake-quantised module; the chosen one also as `model.int8-cpu.onnx`
    ORT          quantize_static with its defaults; U8S8, one scale a channel; S8S8 symmetric, as TensorRT wants it
    NNCF         quantize of the ONNX file with its default preset (transformers also as such)
    modelopt     INT8_DEFAULT_CFG, unchanged

The ONNX tools get the FP32 file that fmdeploy's export writes, after ONNX Runtime's own preprocessing. Seconds are of
the call that quantises, in this process, imports and evaluation left out, the smallest of the repeats: ORT from file to
file, NNCF from model to model, modelopt and fmdeploy from module to module.
Targets: a drop of at most 0.5 %, at most 0.2 points behind the best peer, at most 1.2 times the fastest peer's seconds
for the demo's student.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import onnx
import torch
from peer_students import STUDENTS, student
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from fmdeploy.cpu import this_cpu
from fmdeploy.evaluate.bootstrap import Interval, drop
from fmdeploy.evaluate.evaluation import Evaluation, data_key, evaluate
from fmdeploy.export.onnx import export_onnx
from fmdeploy.export.variants import float_module, write_variants
from fmdeploy.iospec import IOSpec
from fmdeploy.models.outputs import predictor
from fmdeploy.models.saved import LoadedModel, load_model
from fmdeploy.onnxfile.session import ort_predictor
from fmdeploy.quantize import modelopt
from fmdeploy.quantize.calibrate import CalibrationSet, Calibrator, draw
from fmdeploy.quantize.ptq import ptq
from fmdeploy.task import Arrays, Samples
from support.ort_static import samples_reader

MAX_DROP, MAX_POINTS, MAX_TIME = 0.005, 0.002, 1.2
DEFAULT: Calibrator = "mse"
TIMED = "bev-cnn"  # the others are so small that constant costs are all there is
MODELOPT_BATCH = 32
Predict = Callable[[Arrays], Arrays]


@dataclass(frozen=True)
class Case:
    """One student with everything that the tools get."""

    name: str
    loaded: LoadedModel
    calibration_set: CalibrationSet
    test: Samples
    key: str
    folder: Path

    @property
    def io(self) -> IOSpec:
        """Names and shapes."""
        return self.loaded.task.io

    @property
    def rows(self) -> list[Arrays]:
        """The calibration samples as feeds of a file whose batch is 1."""
        inputs = self.calibration_set.inputs
        return [{name: array[k : k + 1] for name, array in inputs.items()} for k in range(len(self.calibration_set))]


Tool = Callable[[Case], Predict]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="keeps the students that are trained here")
    parser.add_argument("--demo", type=Path, help="folder of a finished `fmdeploy demo`")
    parser.add_argument("--students", nargs="+", choices=STUDENTS, default=STUDENTS)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of the draw of the calibration samples")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    isa = this_cpu()
    print(f"{isa.machine}, VNNI {'yes' if isa.exact_int8 else 'no'}, 1 thread, {options.samples} calibration samples")
    found = {}
    for name in options.students:
        artifact, data = student(name, options.work, options.demo)
        loaded = load_model(artifact)
        drawn = draw(loaded.task, data, count=options.samples, seed=options.seed)
        with tempfile.TemporaryDirectory() as folder:
            case = Case(name, loaded, drawn, loaded.task.samples(data, "test"), data_key(data.digest, "test"),
                        Path(folder))
            prepare(case)
            found[name] = compare(case, tools(case), options.repeats)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def quiet() -> None:
    """Peers print, log and warn a lot."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    modelopt.load()


def prepare(case: Case) -> None:
    """Write `fp32.onnx`, and `prepared.onnx`: the same after ONNX Runtime's preprocessing."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    export_onnx(float_module(case.loaded.module, case.io), case.io, case.folder / "fp32.onnx")
    quant_pre_process(str(case.folder / "fp32.onnx"), str(case.folder / "prepared.onnx"))


def tools(case: Case) -> dict[str, Tool]:
    """Every tool by name; those of fmdeploy start with its name."""
    from onnxruntime.quantization import QuantType

    u8, s8 = QuantType.QUInt8, QuantType.QInt8
    symmetric = {"ActivationSymmetric": True, "QuantizeBias": False}
    found: dict[str, Tool] = {f"fmdeploy {name}": own(name) for name in get_args(Calibrator)}
    found |= {
        "fmdeploy int8-cpu": own_file,
        "ORT defaults": ort_static(),
        "ORT U8S8": ort_static(activation_type=u8, weight_type=s8, per_channel=True),
        "ORT S8S8 symmetric": ort_static(activation_type=s8, weight_type=s8, per_channel=True, extra_options=symmetric),
        "NNCF": nncf_quantize(transformer=False),
        "modelopt": modelopt_default,
    }
    if case.name.endswith("vit"):
        found["NNCF transformer"] = nncf_quantize(transformer=True)
    return found


def own(calibrator: Calibrator) -> Tool:
    def quantise(case: Case) -> Predict:
        made = ptq(case.loaded.module, case.io, case.calibration_set, calibrator=calibrator)
        return predictor(made.module, case.io)

    return quantise


def own_file(case: Case) -> Predict:
    """From the module to the file that runs on the CPU; the other variants are written on the way."""
    made = ptq(case.loaded.module, case.io, case.calibration_set, calibrator=DEFAULT)
    variants = write_variants(case.folder, case.io, case.loaded.module, made.module,
                              inputs=case.calibration_set.inputs, opset=20, cpu="x86-64")
    return variants.predictor("int8-cpu")


def ort_static(**options: Any) -> Tool:
    from onnxruntime.quantization import quantize_static

    def quantise(case: Case) -> Predict:
        out = case.folder / "static.onnx"
        reader = samples_reader(case.calibration_set.inputs)
        quantize_static(str(case.folder / "prepared.onnx"), str(out), reader, **options)
        return ort_predictor(out.read_bytes(), case.io)

    return quantise


def nncf_quantize(*, transformer: bool) -> Tool:
    def quantise(case: Case) -> Predict:
        import nncf

        model = onnx.load(str(case.folder / "fp32.onnx"))
        made = nncf.quantize(model, nncf.Dataset(case.rows), subset_size=len(case.rows),
                             model_type=nncf.ModelType.TRANSFORMER if transformer else None)
        return ort_predictor(made.SerializeToString(), case.io)

    return quantise


def modelopt_default(case: Case) -> Predict:
    names = [spec.name for spec in case.io.inputs]

    def loop(model: nn.Module) -> None:
        with torch.no_grad():
            for start in range(0, len(case.calibration_set), MODELOPT_BATCH):
                model(*case.calibration_set.tensors(names, slice(start, start + MODELOPT_BATCH)))

    mtq = modelopt.load()
    made: nn.Module = mtq.quantize(copy.deepcopy(case.loaded.module).eval(), mtq.INT8_DEFAULT_CFG, loop)
    return predictor(made, case.io)


def compare(case: Case, chosen: dict[str, Tool], repeats: int) -> dict[str, Any]:
    """Quantise and judge with every tool, print a line for each and the verdict; returns the numbers."""
    metric = case.loaded.task.metrics()[0]
    reference = judge(case, predictor(case.loaded.module, case.io))
    print(f"\n{case.name}: {metric.name} {reference.value(metric):.4f} in float, {len(case.test)} test samples")
    rows: dict[str, dict[str, Any]] = {}
    for name, tool in chosen.items():
        try:
            predict, seconds = timed(tool, case, repeats)
            row = judge(case, predict)
        except Exception as error:  # a peer that cannot do it is a result, too
            print(f"  {name:20} fails: {type(error).__name__}: {str(error).splitlines()[0][:90]}")
            continue
        interval = drop(reference, row, metric)
        rows[name] = {"value": row.value(metric), "drop": interval.value, "low": interval.low, "high": interval.high,
                      "seconds": seconds}
        print(f"  {name:20} {row.value(metric):.4f}  drop {words(interval)}  {seconds:6.2f} s")
    verdict(rows, 1.0 if metric.higher_is_better else -1.0, timed=case.name == TIMED)
    return {"metric": metric.name, "float": reference.value(metric), "tools": rows}


def timed(tool: Tool, case: Case, repeats: int) -> tuple[Predict, float]:
    seconds = []
    for _ in range(max(repeats, 1)):
        sys.stdout.flush()
        with silence():
            started = time.perf_counter()
            predict = tool(case)
            seconds.append(time.perf_counter() - started)
    return predict, min(seconds)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def judge(case: Case, predict: Predict) -> Evaluation:
    return evaluate(predict, case.test, case.loaded.task.metrics()[:1], data=case.key)


def words(interval: Interval) -> str:
    return f"{interval.value:+8.3%} [{interval.low:+.3%}, {interval.high:+.3%}]"


def verdict(rows: dict[str, dict[str, Any]], sign: float, *, timed: bool) -> None:
    """Print whether the default calibrator holds the targets."""
    mine = rows[f"fmdeploy {DEFAULT}"]
    peers = {name: row for name, row in rows.items() if not name.startswith("fmdeploy")}
    best = max(peers, key=lambda name: sign * peers[name]["value"])
    fastest = min(peers, key=lambda name: peers[name]["seconds"])
    behind = sign * (peers[best]["value"] - mine["value"])
    ratio = mine["seconds"] / peers[fastest]["seconds"]
    for held, text in (
        (mine["drop"] <= MAX_DROP, f"drop {mine['drop']:+.3%} (target <= {MAX_DROP:.1%})"),
        (behind <= MAX_POINTS, f"{100 * behind:+.2f} points behind {best} (target <= {100 * MAX_POINTS:.1f})"),
        (ratio <= MAX_TIME or not timed,
         f"{ratio:.2f} times the seconds of {fastest} (target <= {MAX_TIME} for {TIMED})"),
    ):
        print(f"  {'held  ' if held else 'MISSED'}  fmdeploy {DEFAULT}: {text}")


if __name__ == "__main__":
    main()
