"""Every shell block of docs/ runs as it stands, each document in an empty folder; what cannot run says why.

README.md and the stages' READMEs are the matter of test_readme.py, docs/serve.md of test_serve_doc.py, docs/jetson.md of
test_container_page.py and docs/security.md of nobody here: its commands belong to a certificate authority and a board.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from support.markdown import run_block, shell_blocks

FOLDER = Path(__file__).resolve().parents[2] / "docs"
ELSEWHERE = ("serve.md", "jetson.md", "security.md")
DOCUMENTS = sorted(file for file in FOLDER.glob("*.md") if file.name not in ELSEWHERE and shell_blocks(file))
MAX_NOT_RUN = 7  # so that nobody skips a command silently


@pytest.mark.slow
@pytest.mark.parametrize("document", [file for file in DOCUMENTS if any(b.mark != "no-run" for b in shell_blocks(file))],
                         ids=lambda file: file.name)
def test_commands_of_the_document_run(document: Path, tmp_path: Path) -> None:
    for block in shell_blocks(document):
        if block.mark == "no-run":
            continue
        done = run_block(block, tmp_path)
        assert done.returncode == 0, f"{block.name}\n{block.script}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


def test_marks_have_reasons_and_are_few() -> None:
    blocks = [block for document in DOCUMENTS for block in shell_blocks(document)]
    for block in blocks:
        assert not block.mark or len(block.text) >= 10, f"{block.name}: say why"
        assert block.language == "bash", f"{block.name}: use ```bash, the only language that is executed"
    assert sum(block.mark == "no-run" for block in blocks) <= MAX_NOT_RUN
    assert not any(block.mark == "run-as" for block in blocks)
