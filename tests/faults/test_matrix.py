"""No row of the matrices is without its test, its control and its measured interval."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROWS = [f"{letter}{number}" for letter, count in (("F", 41), ("M", 32), ("T", 18)) for number in range(1, count + 1)]


def functions(root: Path) -> dict[str, set[str]]:
    """Test functions of this folder by name, with the names of their arguments."""
    found: dict[str, set[str]] = {}
    for path in sorted((root / "tests" / "faults").glob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                found[node.name] = {argument.arg for argument in node.args.args}
    return found


@pytest.fixture(scope="module")
def named(root: Path) -> dict[str, set[str]]:
    return functions(root)


@pytest.mark.parametrize("row", ROWS)
def test_every_row_is_tested(row: str, named: dict[str, set[str]]) -> None:
    prefix = f"test_{row}_"
    mine = {name: arguments for name, arguments in named.items() if name.startswith(prefix)}
    controls = [name for name in mine if name.startswith(f"{prefix}control")]
    assert controls, f"{row} has no control run, a test named {prefix}control..."
    assert set(mine) - set(controls), f"{row} has no test, named {prefix}..."
    assert any("fdti" in arguments for name, arguments in mine.items() if name not in controls), f"{row} measures no FDTI"
