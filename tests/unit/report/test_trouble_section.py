"""The section on trouble tells validity and worth of every fault, and never shows a number that was not measured."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fmdeploy.artifact import Artifact
from fmdeploy.evaluate.report.page import build_page, render
from fmdeploy.evaluate.report.sources import gather
from fmdeploy.evaluate.report.trouble import Trouble
from support.report_artifacts import pipeline


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    return pipeline(tmp_path_factory.mktemp("trouble"))


def test_every_fault_has_its_row(made: dict[str, Artifact]) -> None:
    page = build_page(gather([made[name] for name in ("data", "bundle", "trouble")]), "title")
    assert isinstance(page.trouble, Trouble)
    clean, nan = page.trouble.rows
    assert (clean.valid, clean.value_valid, clean.drop_valid) == ("100.0 %", "0.370", "0.0 %")
    assert (nan.valid, nan.value_valid, nan.drop_valid, nan.interval) == ("0.0 %", "–", "–", "–")
    assert nan.reasons == "NOT_FINITE 100.0 %"
    assert "NaN 1% of the values: 0% valid" in page.trouble.picture.alt
    section = re.search(r'<section id="trouble">.*?</section>', render(page), re.DOTALL)
    assert section is not None
    assert "deadline 300 ms" in section.group()


def test_a_report_without_one_says_so(made: dict[str, Artifact], tmp_path: Path) -> None:
    page = build_page(gather([made["data"], made["bundle"]]), "title")
    assert any(text.startswith("trouble: no EVALUATION") for text in page.not_given)
