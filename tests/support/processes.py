"""How tests start fmdeploy as a user would."""

from __future__ import annotations

import os
import sys

FMDEPLOY = (sys.executable, "-m", "fmdeploy")


def user_environment() -> dict[str, str]:
    """The environment without the thread limit that the tests set for themselves."""
    return {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
