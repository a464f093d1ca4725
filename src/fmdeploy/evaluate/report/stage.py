"""`fmdeploy report DIR…`: open the artifacts, build the page, write one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from fmdeploy.artifact import open_artifact
from fmdeploy.command import Outcome, command
from fmdeploy.config import InputPath, OutputPath, Positional, StageConfig
from fmdeploy.errors import ArtifactError, ConfigError
from fmdeploy.evaluate.report.page import build_page, render
from fmdeploy.evaluate.report.sources import gather
from fmdeploy.files import write_atomically
from fmdeploy.manifest import MANIFEST_NAME


class ReportConfig(StageConfig):
    """What to show and where to write it."""

    artifacts: Annotated[tuple[InputPath, ...], Positional()] = Field(
        description="Artifacts of any kinds: DATASET, TEACHER, STUDENT, QUANTIZED, BUNDLE, CHECK, EVALUATION, PROBE"
    )
    out: OutputPath = Field(Path("report.html"), description="The HTML file; an older one is replaced")
    title: str = Field("fmdeploy report", min_length=1, max_length=120, description="Headline of the page")


@command(ReportConfig)
def report(config: ReportConfig) -> Outcome:
    """Write one self-contained HTML page from the given artifacts; what is not given is said to be missing."""
    if not config.artifacts:
        raise ConfigError("there is nothing to report on", where="report", fix="Name one or more artifact folders")
    _check_target(config.out)
    sources = gather([open_artifact(path) for path in config.artifacts])
    page = build_page(sources, config.title)
    html = render(page)
    write_atomically(config.out, html)
    lines = (f"report at {config.out} ({len(html.encode()) // 1024} KiB): {page.verdict.result}",
             *(f"  not given: {name}" for name in page.not_given))
    data = {"path": str(config.out), "verdict": page.verdict.result, "not_given": list(page.not_given)}
    return Outcome(lines, data)


def _check_target(out: Path) -> None:
    """A file inside an artifact would make that artifact unreadable."""
    if out.is_dir():
        raise ConfigError("is a folder", where=out, expected="the name of an HTML file", fix="Use --out NAME.html")
    for folder in out.absolute().parents:
        if (folder / MANIFEST_NAME).exists():
            raise ArtifactError("is an artifact and takes no further file", where=folder, fix="Choose another --out")
