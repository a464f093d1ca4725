"""docs/jetson.md: its commands parse, its numbers are within the budget, what it says of files is true."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest

from fmdeploy.cli import group
from support.markdown import shell_blocks


@pytest.fixture(scope="module")
def page(root: Path) -> Path:
    return root / "docs" / "jetson.md"


def commands(page: Path) -> list[list[str]]:
    """Words after `fmdeploy` of every command of every block."""
    lines = [line for block in shell_blocks(page) for line in block.body.splitlines()]
    words = [shlex.split(part) for line in lines for part in line.split("&&")]
    return [found[at + 1 :] for found in words for at, word in enumerate(found) if word.endswith("bin/fmdeploy")]


def test_five_commands_bring_a_board_up(page: Path) -> None:
    first = shell_blocks(page)[0].body.strip().splitlines()
    assert len(first) == 5
    assert "container run" in first[-1]


def test_every_command_parses(page: Path) -> None:
    found = commands(page)
    assert len(found) >= 4
    for words in found:
        command: click.Command = group
        while isinstance(command, click.Group):
            name = words.pop(0)
            inner = command.get_command(click.Context(command), name)
            assert inner is not None, f"no such verb: {name}"
            command = inner
        command.make_context("fmdeploy", words)


def test_bases_are_those_of_the_recipes(page: Path, root: Path) -> None:
    for name in ("Dockerfile.jp6", "Dockerfile.jp7"):
        base = re.search(r"^ARG BASE=(\S+)$", (root / "jetson" / name).read_text(), re.MULTILINE)
        assert base is not None
        assert base[1] in page.read_text()


def test_sizes_are_within_the_budget(page: Path) -> None:
    sizes = [float(text) for text in re.findall(r"wheels, ([0-9.]+) MiB", page.read_text())]
    assert len(sizes) == 4
    assert max(sizes) * 1.048576 <= 120
