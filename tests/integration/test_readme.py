"""Every shell block of README.md and of the stages' READMEs runs, in order, as a reader would run it.

`<!-- no-run: reason -->` and `<!-- run-as: command -->` before a block are allowed, and counted here, so that nobody
skips a command silently. A file's blocks share one folder: a copy of what a clone holds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from support.markdown import check_marks, run_document, shell_blocks

ROOT = Path(__file__).resolve().parents[2]
STAGES = ("teacher", "distill", "quantize", "export", "runtime", "jetson")
EXAMPLES = sorted((ROOT / "examples").glob("*/README.md"))  # executed by test_examples.py
FILES = [ROOT / "README.md", *(ROOT / stage / "README.md" for stage in STAGES), ROOT / "CONTRIBUTING.md", *EXAMPLES]
DOCUMENTS = [file for file in FILES if file not in EXAMPLES and file.is_file() and shell_blocks(file)]
# Blocks that are not executed, and blocks whose executed form differs from the printed one.
MAX_NOT_RUN = 4
MAX_RUN_AS = 4


def clone(target: Path) -> Path:
    """What a clone holds, without history."""
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True,
                            capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if os.path.lexists(ROOT / name):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name, follow_symlinks=False)
    return target


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_commands_of_the_document_run(document: Path, tmp_path: Path) -> None:
    run_document(document, clone(tmp_path / "clone"))


def test_readme_has_commands() -> None:
    assert any(block.mark != "no-run" for block in shell_blocks(ROOT / "README.md"))


def test_marks_have_reasons_and_are_few() -> None:
    check_marks(DOCUMENTS, no_run=MAX_NOT_RUN, run_as=MAX_RUN_AS)


def test_links_of_the_documents_exist() -> None:
    import re

    broken = []
    documents = [file for file in FILES if file.is_file()] + [ROOT / "ARCHITECTURE.md", *(ROOT / "docs").glob("*.md")]
    for document in documents:
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            if "://" not in target and not (document.parent / target).exists():
                broken.append(f"{document.relative_to(ROOT)}: {target}")
    assert broken == []
