"""`export --from-onnx`: any explicit-Q/DQ file, spelled for TensorRT and for ONNX Runtime's CPU kernels.

    source           as modelopt, ONNX Runtime or NNCF wrote it
      | foreign/     one int8 grid, zero point 0, one pair a tensor, float biases
    model.int8.onnx      for TensorRT, adds as it fuses them (branches.py)
      | dialects.py  zero points moved, weights stored as int8
    model.int8-cpu.onnx  for ONNX Runtime

Every tensor whose numbers changed is listed with what that costs. With calibration data both files are compared with
the source, and residual adds that the source left in float get ranges. Without data nothing is measured, and the
result says so: random numbers would only look like a measurement.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from fmdeploy.arrays import Arrays
from fmdeploy.command import Outcome
from fmdeploy.errors import ArtifactError, ConfigError, ModelFileError
from fmdeploy.evaluate.sqnr import finite_db, sqnr_db
from fmdeploy.export.branches import drop_branch_pairs
from fmdeploy.export.config import ExportConfig
from fmdeploy.export.dialects import CpuSpelling, spell_for_cpu
from fmdeploy.export.foreign.activations import canonical_activations
from fmdeploy.export.foreign.batchnorm import fold_batchnorms
from fmdeploy.export.foreign.changes import Change, Log
from fmdeploy.export.foreign.copies import spread_pairs
from fmdeploy.export.foreign.normalise import normalise
from fmdeploy.export.foreign.residual import complete_adds
from fmdeploy.export.foreign.samples import batches, read_samples
from fmdeploy.export.foreign.weights import canonical_constants
from fmdeploy.export.formats import file_name
from fmdeploy.export.fused import FusedOps, fused_ops
from fmdeploy.export.isa import CpuKind, require_exact
from fmdeploy.export.lint.lint import lint_model
from fmdeploy.manifest import MANIFEST_NAME
from fmdeploy.onnxfile.graph import save_model
from fmdeploy.onnxfile.reading import read_model
from fmdeploy.onnxfile.session import cpu_session

FILES = (file_name("int8"), file_name("int8-cpu"))
Comparison = dict[str, dict[str, float]]  # file -> output -> dB


@dataclass(frozen=True)
class Lowered:
    """What came of one foreign file."""

    source: Path
    folder: Path
    changes: tuple[Change, ...]
    stays_float: tuple[tuple[str, str], ...]
    """Nodes that could be INT8, and why they are not."""
    notes: tuple[str, ...]
    saturating: tuple[str, ...]
    narrowed: tuple[str, ...]
    fused: FusedOps
    samples: int
    sqnr_db: Comparison | None
    """Both files against the source, per output; None where there was no calibration data."""

    def lines(self) -> tuple[str, ...]:
        """For people."""
        fused = self.fused
        found = [f"wrote {' and '.join(FILES)} to {self.folder}", *self.notes]
        found += [f"  changed {change}" for change in self.changes] or ["  every quantised tensor keeps its numbers"]
        found += [f"  float {node}: {why}" for node, why in self.stays_float]
        found += [f"  7-bit weights in {name}" for name in self.narrowed]
        found.append(f"ONNX Runtime here runs in INT8 and in float: convolutions {fused.int8_convs} and "
                     f"{fused.float_convs}, products {fused.int8_matmuls} and {fused.float_matmuls}, "
                     f"adds {fused.int8_adds} and {fused.float_adds}")
        if self.sqnr_db is None:
            return (*found, "not measured against the source: give --calibration FILE.npz")
        for name, row in self.sqnr_db.items():
            ratios = ", ".join(f"{output} {value:.1f} dB" for output, value in row.items())
            found.append(f"{name} against the source: {ratios}")
        return (*found, f"measured on {self.samples} samples")

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        compared = None if self.sqnr_db is None else {
            name: {output: finite_db(value) for output, value in row.items()} for name, row in self.sqnr_db.items()}
        return {
            "files": [str(self.folder / name) for name in FILES], "source": str(self.source),
            "changes": [change.to_json() for change in self.changes],
            "stays_float": [{"node": node, "why": why} for node, why in self.stays_float],
            "notes": list(self.notes), "saturates_without_vnni": list(self.saturating),
            "weights_of_7_bits": list(self.narrowed), "fused": asdict(self.fused),
            "samples": self.samples, "sqnr_db": compared,
        }


def lower_from_config(config: ExportConfig) -> Outcome:
    """Lower the file that the configuration names.

    Raises:
        ConfigError: `out` is missing.
        ArtifactError, DataError, ModelFileError: see `lower_file`.
    """
    if config.from_onnx is None or config.out is None:
        raise ConfigError("two files need a place", where="export --from-onnx", expected="--out DIR")
    lowered = lower_file(config.from_onnx, config.out, cpu=config.cpu, calibration=config.calibration)
    return Outcome(lowered.lines(), lowered.to_json())


def lower_file(source: Path, out: Path, *, cpu: CpuKind = "x86-64", calibration: Path | None = None) -> Lowered:
    """Write `model.int8.onnx` and `model.int8-cpu.onnx` to the folder `out`, both or neither.

    Args:
        source: An explicit-Q/DQ ONNX file of any tool.
        out: Folder; made where it is missing. Older files of the two names are replaced.
        cpu: Whose kernels the CPU file is spelled for.
        calibration: .npz or .safetensors with one array (N, ...) an input.

    Raises:
        ArtifactError: `out` is an artifact or no folder.
        DataError: the calibration data does not fit.
        ModelFileError: names the node that prevents one of the files.
    """
    if (out / MANIFEST_NAME).exists() or (out.exists() and not out.is_dir()):
        raise ArtifactError("is no plain folder: an artifact is never changed", where=out, fix="Name another --out")
    model = read_model(source)
    samples = None if calibration is None else read_samples(calibration, model)
    try:
        canonical, positive, log, notes = lower(model, samples)
        spelled = spell_for_cpu(canonical, cpu, non_negative=positive)
        for name in drop_branch_pairs(canonical):
            log.change(name, f"pair between it and its add left out of {FILES[0]}: one rounding less")
        _require_buildable(canonical)
        with _both_or_neither(out) as scratch:
            save_model(canonical, scratch / FILES[0])
            save_model(spelled.model, scratch / FILES[1])
            fused = fused_ops(scratch / FILES[1])
            compared = None if samples is None else _compare(model, canonical, spelled, samples)
    except ModelFileError as error:
        raise ModelFileError(error.what, where=f"{source}, {error.where}" if error.where else source,
                             expected=error.expected, found=error.found, fix=error.fix) from error
    count = 0 if samples is None else len(next(iter(samples.values())))
    return Lowered(source, out, tuple(log.changes), tuple(log.stays_float), notes, spelled.saturating,
                   spelled.narrowed, fused, count, compared)


def lower(model: ModelProto, samples: Arrays | None = None) -> tuple[ModelProto, frozenset[str], Log, tuple[str, ...]]:
    """Bring a checked model into the TensorRT dialect.

    Returns:
        The model; inputs that its source gave no negative values; what changed; notes on the file as a whole.

    Raises:
        ModelFileError: names the node that prevents it.
    """
    log = Log()
    graph, notes = normalise(model)
    canonical_constants(graph, log)
    positive = canonical_activations(graph, log)
    fold_batchnorms(graph, log)
    spread_pairs(graph, log)
    complete_adds(graph, None if samples is None else batches(samples, model), log)
    return graph.model, positive, log, notes


def _require_buildable(model: ModelProto) -> None:
    for finding in lint_model(model):
        if finding.severity == "error":
            raise ModelFileError(f"cannot become a TensorRT file, {finding.id}: {finding.why}", where=finding.node,
                                 fix=finding.fix)


@contextmanager
def _both_or_neither(out: Path) -> Iterator[Path]:
    """A scratch folder beside `out`, whose files move there at the end."""
    out.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        yield scratch
        out.mkdir(exist_ok=True)
        for name in FILES:
            os.chmod(scratch / name, 0o644)
            os.replace(scratch / name, out / name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _compare(source: ModelProto, canonical: ModelProto, spelled: CpuSpelling, samples: Arrays) -> Comparison:
    """SQNR of both files against the source as it is written; the CPU file as it runs here."""
    require_exact(spelled.saturating)
    wanted = _run(source, samples, source, optimise=False)
    found = {FILES[0]: _run(canonical, samples, source, optimise=False),
             FILES[1]: _run(spelled.model, samples, source, optimise=True)}
    return {name: {key: sqnr_db(wanted[key], values[key]) for key in wanted} for name, values in found.items()}


def _run(model: ModelProto, samples: Arrays, source: ModelProto, *, optimise: bool) -> Arrays:
    session = cpu_session(model.SerializeToString(), optimise=optimise)
    kinds = {value.name: np.float32 if "float" in value.type else None for value in session.get_inputs()}
    names = [value.name for value in session.get_outputs()]
    rows = []
    for feeds in batches(samples, source):
        typed = {n: a.astype(kinds[n] or a.dtype) if _retyped(source, n) else a for n, a in feeds.items()}
        rows.append(session.run(names, typed if model is not source else feeds))
    return {name: np.concatenate([np.atleast_1d(row[k]) for row in rows]) for k, name in enumerate(names)}


def _retyped(source: ModelProto, name: str) -> bool:
    """Whether an input was float16 in the source, and is float32 in what was made of it."""
    kind = next(value.type.tensor_type.elem_type for value in source.graph.input if value.name == name)
    return kind in (10, 16)
