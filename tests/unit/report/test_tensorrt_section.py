"""The TensorRT section tells what the compiler found, and what that does not prove."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fmdeploy.artifact import Artifact
from fmdeploy.draft import Draft
from fmdeploy.evaluate.report.page import build_page, render
from fmdeploy.evaluate.report.sources import gather
from fmdeploy.evaluate.report.tensorrt import TensorRt, tensorrt_section
from fmdeploy.manifest import Kind
from support.report_artifacts import COMPILED, make, pipeline


def bundle(root: Path, found: dict[str, Any] | None) -> Artifact:
    def build(draft: Draft) -> None:
        draft.write_json("metrics.json", {})
        if found is not None:
            draft.write_json("tensorrt.json", found)

    return make(root / "compiled", Kind.BUNDLE, {}, build)


def test_every_layer_is_listed_with_its_types(tmp_path: Path) -> None:
    section = tensorrt_section(gather([bundle(tmp_path, COMPILED)]))
    assert isinstance(section, TensorRt)
    assert section.files[0].products == "2 FP16, 11 INT8"
    assert section.files[0].rows[0].weights == "INT8, FP32"


def test_the_page_shows_it_escaped(tmp_path: Path) -> None:
    html = render(build_page(gather([bundle(tmp_path, COMPILED)]), "title"))
    assert "tensorrt-rtx 1.7.1.116, without a GPU. It compiles. Nothing was run." in html
    assert "/stem/&lt;Conv&gt;" in html


def test_without_a_check_the_page_says_so(tmp_path: Path) -> None:
    page = build_page(gather([bundle(tmp_path, None)]), "title")
    assert any(row.startswith("TensorRT: the bundle was exported without") for row in page.not_given)
    assert "TensorRT: no BUNDLE" in build_page(gather([pipeline(tmp_path / "p")["student"]]), "title").not_given
