"""A container of the runtime image, and figures that its tests print."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from typing import Any

from support.processes import FMDEPLOY

ARCH = os.environ.get("FMDEPLOY_ARCH") or {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), "")
EMULATED = {"amd64": "x86_64", "arm64": "aarch64"}.get(ARCH) != platform.machine()
PATIENCE_S = 900 if EMULATED else 120
HEALTH_S = 120 if EMULATED else 10  # of one health check, which starts a Python
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
FACTS: list[str] = []
WORKER = "fmdeploy.runtime.supervisor.worker"


class Started:
    """A container of the runtime image that serves the toy bundle."""

    def __init__(self, container: Any, told: dict[str, Any]) -> None:
        self.container, self.told, self.socket = container, told, str(told["socket"])

    def inside(self, code: str) -> Any:
        """Run Python inside, as the container's user, and parse the JSON it prints."""
        done = self.container.exec_run(["python3", "-c", code])
        assert done.exit_code == 0, done.output.decode()
        return json.loads(done.output.decode().splitlines()[-1])

    def processes(self) -> dict[int, str]:
        """Process id on the host → command line, of what runs inside."""
        top = self.container.top(ps_args="-eo pid,args")
        return {int(pid): text for pid, text in top["Processes"]}


def fact(text: str) -> None:
    """Note a figure for the end of the log."""
    FACTS.append(text)


def fmdeploy(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run fmdeploy as a user would."""
    return subprocess.run([*FMDEPLOY, *arguments], capture_output=True, text=True, check=False)
