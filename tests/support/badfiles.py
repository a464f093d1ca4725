"""Bundles and ONNX files with one thing wrong, sealed as if nothing were."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, numpy_helper

from fmdeploy.draft import Draft
from fmdeploy.runtime.bundle import open_bundle
from fmdeploy.runtime.onnxcheck.checks import check_model
from fmdeploy.runtime.onnxcheck.interface import Declared
from fmdeploy.runtime.tiers import admit_tier
from support.bundles import fp32_model, int8_model, io_spec, make_bundle

Change = Callable[[ModelProto], object]


def bundle_with(folder: Path, files: dict[str, bytes]) -> Path:
    """The toy bundle in `folder`, sealed with these files in it."""
    def change(draft: Draft) -> None:
        for name, raw in files.items():
            draft.path(name).write_bytes(raw)

    return make_bundle(folder / "bundle", change=change).root


def edited(change: Change, *, variant: str = "fp32") -> bytes:
    """The toy model after `change`, which writes through protobuf whatever it likes."""
    model = onnx.load_from_string(fp32_model() if variant == "fp32" else int8_model())
    change(model)
    raw: bytes = model.SerializeToString()
    return raw


def check(raw: bytes, *, variant: str = "fp32", declared: Declared | None = None) -> None:
    """The device's static checks on a toy model."""
    check_model(raw, io_spec(), where=f"model.{variant}.onnx", declared=declared or Declared(variant.startswith("int8")))


def refused_by_runtime(folder: Path, raw: bytes, variant: str = "fp32") -> str:
    """What a tier of a bundle that was sealed around `raw` is refused for."""
    backend, report = admit_tier(open_bundle(bundle_with(folder, {f"model.{variant}.onnx": raw})), variant, 1)
    assert backend is None
    return report.reason


def resealed(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a manifest's keys and seal it again where it still is a manifest: only the rules can refuse it now."""
    path = root / "manifest.json"
    body = json.loads(path.read_text())
    change(body)
    body["seal"] = _seal(body)
    path.write_text(json.dumps(body, sort_keys=True, indent=1))


def _seal(body: dict[str, Any]) -> str:
    rest = {key: value for key, value in body.items() if key != "seal"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def initializer(model: ModelProto, name: str) -> TensorProto:
    """A stored tensor by name."""
    found: TensorProto = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    return found


def replace(model: ModelProto, name: str, change: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]) -> None:
    """Change the values of a stored tensor, and nothing else of it."""
    tensor = initializer(model, name)
    tensor.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(tensor).copy()), name))
