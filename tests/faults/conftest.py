"""Rows of the fault matrices: every test prints the fault detection time interval (FDTI) that it measured.

A test is named by the id of its row, `test_F13_frozen_camera`; beside it stands `test_F13_control...`, a run without the
fault in which the detector stays silent. `test_matrix.py` counts them.
"""

from __future__ import annotations

import pytest

from support.fdti import Fdti


@pytest.fixture
def fdti(request: pytest.FixtureRequest) -> Fdti:
    """The writer of this row."""
    return Fdti(request.node)
