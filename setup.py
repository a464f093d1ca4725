"""Refuses to build where the stage links did not survive the checkout; everything else is in pyproject.toml."""

from pathlib import Path

from setuptools import setup

STAGES = ("teacher", "distill", "quantize", "export", "runtime", "jetson")

for stage in STAGES:
    if not (Path(__file__).parent / "src" / "fmdeploy" / stage / "__init__.py").is_file():
        raise SystemExit(
            f"src/fmdeploy/{stage} is not a link to ../../{stage}: this checkout lost its symbolic links. "
            "Run: git config core.symlinks true && git checkout -- src/fmdeploy"
        )

setup()
