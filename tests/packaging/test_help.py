"""Golden help texts: no flag appears, changes or goes unnoticed. Rewrite them with --update-golden."""

from __future__ import annotations

import difflib
from pathlib import Path

import click
import pytest

from fmdeploy.cli import VERBS, build_command, group

WIDTH = 100
PATHS: list[tuple[str, ...]] = [("fmdeploy",)]
for _name, _entry in VERBS.items():
    PATHS += [(_name, sub) for sub in _entry] if isinstance(_entry, dict) else [(_name,)]


def help_of(path: tuple[str, ...]) -> str:
    """The help text of one verb, at a fixed width."""
    if path == ("fmdeploy",):
        command: click.Command = group
        shown = "fmdeploy"
    else:
        entry = VERBS[path[0]]
        verb = entry[path[1]] if isinstance(entry, dict) else entry
        command, shown = build_command(path[-1], verb), " ".join(["fmdeploy", *path])
    context = click.Context(command, info_name=shown, terminal_width=WIDTH, max_content_width=WIDTH,
                            help_option_names=["-h", "--help"])
    return command.get_help(context) + "\n"


@pytest.mark.parametrize("path", PATHS, ids=" ".join)
def test_help_is_the_golden_one(path: tuple[str, ...], root: Path, update_golden: bool) -> None:
    golden = root / "tests" / "golden" / "help" / f"{'-'.join(path)}.txt"
    found = help_of(path)
    if update_golden:
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(found, encoding="utf-8")
    assert golden.is_file(), "no golden help: run pytest tests/packaging/test_help.py --update-golden"
    wanted = golden.read_text(encoding="utf-8")
    assert found == wanted, "\n".join(difflib.unified_diff(wanted.splitlines(), found.splitlines(), lineterm=""))


def test_no_golden_file_is_left_over(root: Path) -> None:
    names = {f"{'-'.join(path)}.txt" for path in PATHS}
    assert {p.name for p in (root / "tests" / "golden" / "help").iterdir()} == names
