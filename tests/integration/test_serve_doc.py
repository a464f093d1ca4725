"""Every command of docs/serve.md runs, in order, on a real bundle."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from support.markdown import shell_blocks
from support.runtimes import toy_bundle

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "serve.md"


def test_commands_of_the_document_run(tmp_path: Path) -> None:
    pytest.importorskip("tritonclient.http")
    shutil.copytree(toy_bundle(), tmp_path / "bundle")
    blocks = shell_blocks(DOCUMENT)
    assert len(blocks) == 4
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    try:
        for block in blocks:
            done = subprocess.run(["bash", "-euo", "pipefail", "-c", block.script], cwd=tmp_path, env=environment,
                                  text=True, capture_output=True, timeout=300)
            log = (tmp_path / "serve.log").read_text()[-2000:]
            assert done.returncode == 0, f"{block.script}\n{done.stdout}\n{done.stderr[-2000:]}\n{log}"
    finally:
        with suppress(OSError, ValueError):
            os.kill(json.loads((tmp_path / "ready.json").read_text())["pid"], signal.SIGKILL)


def test_every_option_of_the_page_exists() -> None:
    import re

    from fmdeploy.runtime.serve.config import ServeConfig

    known = {"--" + name.replace("_", "-") for name in ServeConfig.model_fields} | {"--no-supervisor"}
    prose = re.sub(r"```.*?```", "", DOCUMENT.read_text(), flags=re.DOTALL)
    assert set(re.findall(r"`(--[a-z-]+)", prose)) <= known
