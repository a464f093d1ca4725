"""The stage folders stand at the root and are one package through relative links."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
from inspect import ismodule
from pathlib import Path

import pytest

import fmdeploy
from fmdeploy.cli import VERBS, Verb
from fmdeploy.command import Command

STAGES = ("teacher", "distill", "quantize", "export", "runtime", "jetson")
TARGETS = [v for e in VERBS.values() for v in (e.values() if isinstance(e, dict) else [e])]


@pytest.mark.parametrize("stage", STAGES)
def test_stage_is_a_relative_link(root: Path, stage: str) -> None:
    link = root / "src" / "fmdeploy" / stage
    assert link.is_symlink()
    assert os.readlink(link) == f"../../{stage}"
    assert (root / stage / "__init__.py").is_file()


def test_no_other_links(root: Path) -> None:
    package = root / "src" / "fmdeploy"
    assert {p.name for p in package.rglob("*") if p.is_symlink()} == set(STAGES)


@pytest.mark.parametrize("verb", TARGETS, ids=lambda verb: verb.target)
def test_verb_is_a_documented_command(verb: Verb) -> None:
    module, _, name = verb.target.partition(":")
    stage = getattr(importlib.import_module(module), name)
    assert isinstance(stage, Command)
    assert stage.__doc__
    undescribed = [f for f, info in stage.config.model_fields.items() if not info.description]
    assert undescribed == [], "every flag has a help text"


def test_exported_names() -> None:
    names = {name for name, value in vars(fmdeploy).items() if not name.startswith("_") and not ismodule(value)}
    assert names <= {"annotations"}, "the package itself exports its version only: stages are imported by their module"
    assert fmdeploy.__version__


def test_version_agrees_with_changelog_and_package(root: Path) -> None:
    from importlib.metadata import version

    assert fmdeploy.__version__ == version("fmdeploy")
    headings = re.findall(r"^## \[?([^]\s]+)", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    released = [heading for heading in headings if heading != "Unreleased"]
    assert headings, "the changelog has no heading"
    assert headings[0] in ("Unreleased", fmdeploy.__version__)
    assert released[:1] in ([], [fmdeploy.__version__]), "the newest release is not this version"


def test_import_contracts_hold(root: Path) -> None:
    program = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([str(program), "--no-cache"], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def public_nodes(tree: ast.Module) -> list[tuple[str, ast.AST]]:
    """Public module-level functions and classes with their public methods, and the module itself."""
    found: list[tuple[str, ast.AST]] = [("module", tree)]
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            found.append((node.name, node))
            if isinstance(node, ast.ClassDef):
                found += [(f"{node.name}.{m.name}", m) for m in node.body
                          if isinstance(m, ast.FunctionDef) and not m.name.startswith("_")]
    return found


def test_everything_public_has_a_docstring(root: Path) -> None:
    missing = []
    for top, _, names in os.walk(root / "src" / "fmdeploy", followlinks=True):
        for path in (Path(top) / n for n in names if n.endswith(".py") and not n.startswith("_")):
            for name, node in public_nodes(ast.parse(path.read_text())):
                overloads = {ast.unparse(d) for d in getattr(node, "decorator_list", ())}
                documented = ast.get_docstring(node)  # type: ignore[arg-type]
                if not documented and not overloads & {"override", "overload", "typing.overload"}:
                    missing.append(f"{path.relative_to(root)}: {name}")
    assert missing == []
