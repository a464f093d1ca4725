"""Fenced shell blocks of Markdown files, with the marks that say how a test treats them.

A mark is an HTML comment on the line before the fence:

    <!-- no-run: reason -->             the block is not executed; the reason is required
    <!-- run-as: other command -->      this is executed instead, such as the fast form of a demo
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

FENCE = re.compile(r"^(?P<indent> *)```(?P<language>\S*)[^\n]*\n(?P<body>.*?)^(?P=indent)```[ ]*$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"<!--\s*(?P<kind>no-run|run-as):\s*(?P<text>(?:(?!-->).)*?)\s*-->\s*\Z", re.DOTALL)
SHELL = ("bash", "sh", "shell", "console")


@dataclass(frozen=True)
class Block:
    """One fenced shell block."""

    file: Path
    line: int
    language: str
    body: str
    mark: str = ""
    text: str = ""

    @property
    def name(self) -> str:
        """`README.md:12`."""
        return f"{self.file.name}:{self.line}"

    @property
    def script(self) -> str:
        """What to execute."""
        return self.text if self.mark == "run-as" else self.body


def shell_blocks(file: Path) -> list[Block]:
    """All fenced shell blocks of a file, in order."""
    text = file.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        if match["language"] in SHELL:
            before = MARK.search(text[: match.start()].rstrip(" "))
            line = text.count("\n", 0, match.start()) + 1
            kind, words = (before["kind"], before["text"]) if before else ("", "")
            found.append(Block(file, line, match["language"], match["body"], kind, words))
    return found


def run_document(file: Path, folder: Path) -> None:
    """Run all blocks of a file in `folder`, in order, but those that are marked; assert that each succeeds."""
    for block in shell_blocks(file):
        if block.mark == "no-run":
            continue
        done = run_block(block, folder)
        assert done.returncode == 0, f"{block.name}\n{block.script}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def check_marks(files: Sequence[Path], *, no_run: int, run_as: int) -> None:
    """Assert that marks say why, and that no more than these blocks have one: nobody skips a command silently."""
    blocks = [block for file in files for block in shell_blocks(file)]
    for block in blocks:
        assert not block.mark or len(block.text) >= 10, f"{block.name}: say why"
        assert block.language == "bash", f"{block.name}: use ```bash, the only language that is executed"
    assert sum(block.mark == "no-run" for block in blocks) <= no_run
    assert sum(block.mark == "run-as" for block in blocks) <= run_as


def run_block(block: Block, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a block in `folder` as a reader would who has activated the environment; the first failure ends it."""
    programs = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "-euo", "pipefail", "-c", block.script], cwd=folder, env=environment, text=True,
                          capture_output=True, check=False)
