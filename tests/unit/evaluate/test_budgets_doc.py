"""docs/artifacts.md shows a budgets.toml that can be read, with every key that there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fmdeploy.budgets import AccuracyBudget, Budgets, SensorLoss, TargetBudget, parse_budgets


def example(root: Path) -> str:
    text = (root / "docs" / "artifacts.md").read_text()
    found: list[str] = re.findall(r"## budgets\.toml.*?```toml\n(.*?)```", text, re.DOTALL)
    return found[0]


def test_example_is_a_budget(root: Path) -> None:
    found = parse_budgets(example(root).encode(), Path("docs/artifacts.md"))
    assert found.target["orin-nano"].power_mode == "25W"
    assert found.sensor_loss["camera"].fill == "zeros"


@pytest.mark.parametrize("table", [Budgets, AccuracyBudget, TargetBudget, SensorLoss])
def test_example_has_every_key(table: type, root: Path) -> None:
    shown = set(re.findall(r"^\[?([a-z0-9_]+)", example(root), re.MULTILINE))
    assert set(table.__annotations__) - shown == set()
