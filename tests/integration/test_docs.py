"""Every shell block of docs/ runs as it stands, each document in an empty folder; what cannot run says why.

README.md and the stages' READMEs are the matter of test_readme.py, docs/serve.md of test_serve_doc.py, docs/jetson.md of
test_container_page.py and docs/security.md of nobody here: its commands belong to a certificate authority and a board.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from support.markdown import check_marks, run_document, shell_blocks

FOLDER = Path(__file__).resolve().parents[2] / "docs"
ELSEWHERE = ("serve.md", "jetson.md", "security.md")
DOCUMENTS = sorted(file for file in FOLDER.glob("*.md") if file.name not in ELSEWHERE and shell_blocks(file))
MAX_NOT_RUN = 7  # so that nobody skips a command silently


@pytest.mark.slow
@pytest.mark.parametrize("document", [file for file in DOCUMENTS if any(b.mark != "no-run" for b in shell_blocks(file))],
                         ids=lambda file: file.name)
def test_commands_of_the_document_run(document: Path, tmp_path: Path) -> None:
    run_document(document, tmp_path)


def test_marks_have_reasons_and_are_few() -> None:
    check_marks(DOCUMENTS, no_run=MAX_NOT_RUN, run_as=0)
