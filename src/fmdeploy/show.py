"""`fmdeploy show`: what an artifact is, and where it came from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import Field

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.command import Outcome, command, metric_lines
from fmdeploy.config import InputPath, Positional, StageConfig
from fmdeploy.manifest import Parent


class ShowConfig(StageConfig):
    """What to print."""

    artifact: Annotated[InputPath, Positional()] = Field(description="The artifact's directory")


@command(ShowConfig)
def show(config: ShowConfig) -> Outcome:
    """Print an artifact, verified, and its lineage back to the dataset."""
    artifact = open_artifact(config.artifact)
    lines = (
        f"{artifact.kind.value} {artifact.digest}",
        *lineage_lines(artifact.inputs),
        f"stage {artifact.manifest.stage}",
        *metric_lines(artifact.manifest.config),
        *file_lines(artifact),
        *(metric_lines({"metrics": artifact.json("metrics.json")}, "") if artifact.has("metrics.json") else ()),
    )
    return Outcome(lines, _data(artifact))


def lineage_lines(inputs: Mapping[str, Parent], indent: str = "  ") -> Iterator[str]:
    """The tree of inputs, one artifact a line."""
    for role, parent in sorted(inputs.items()):
        yield f"{indent}└─ {role}: {parent.kind.value} {parent.digest[:12]} ({parent.stage})"
        yield from lineage_lines(parent.inputs, indent + "   ")


def file_lines(artifact: Artifact) -> Iterator[str]:
    """The payload, one file a line."""
    for name, entry in sorted(artifact.manifest.files.items()):
        yield f"  {entry.sha256[:12]} {entry.size:>12,} B  {name}"


def _data(artifact: Artifact) -> dict[str, Any]:
    body: dict[str, Any] = artifact.manifest.model_dump(mode="json")
    return {**body, "digest": artifact.digest, "path": str(artifact.root)}
