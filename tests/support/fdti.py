"""How a fault test notes its fault detection time interval (FDTI)."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


class Fdti:
    """Writes down how long a fault went undetected."""

    def __init__(self, node: pytest.Item) -> None:
        self.node = node
        found = re.match(r"test_([FMT]\d+)_", node.name)
        assert found, f"{node.name} is not named by a row"
        self.row = found[1]

    def report(self, ms: float, detail: str = "") -> None:
        """Note an interval that the test measured itself, in milliseconds."""
        self.node.user_properties.append(("fdti", [self.row, ms, detail or self.node.name]))
        print(f"FDTI {self.row} {ms:.3f} ms {detail}")

    @contextmanager
    def detecting(self, detail: str = "") -> Iterator[None]:
        """Measure the block, from the injection of the fault to the moment when it is refused or named."""
        start = time.perf_counter()
        yield
        self.report(1e3 * (time.perf_counter() - start), detail)

    @contextmanager
    def raising(self, detail: str = "") -> Iterator[None]:
        """Measure the block up to the error that refuses the fault; the error goes on."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.report(1e3 * (time.perf_counter() - start), detail)
