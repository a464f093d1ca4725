"""Rows of the fault matrices: every test prints the fault detection time interval (FDTI) that it measured.

A test is named by the id of its row, `test_F13_frozen_camera`; beside it stands `test_F13_control...`, a run without the
fault in which the detector stays silent. `test_matrix.py` counts them.
"""

from __future__ import annotations

from typing import Any

import pytest

from support.fdti import Fdti


@pytest.fixture
def fdti(request: pytest.FixtureRequest) -> Fdti:
    """The writer of this row."""
    return Fdti(request.node)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line a row: the largest interval of its tests."""
    worst: dict[str, tuple[float, str]] = {}
    for report in terminalreporter.stats.get("passed", []):
        for name, value in getattr(report, "user_properties", []):
            if name == "fdti" and value[1] >= worst.get(value[0], (-1.0, ""))[0]:
                worst[value[0]] = value[1], value[2]
    if worst:
        terminalreporter.section("measured fault detection time intervals (FDTI)")
    for row in sorted(worst, key=lambda text: (text[0], int(text[1:]))):
        terminalreporter.write_line(f"{row:4} {worst[row][0]:10.3f} ms  {worst[row][1]}")
