"""How tests start fmdeploy as a user would."""

from __future__ import annotations

import sys

FMDEPLOY = (sys.executable, "-m", "fmdeploy")
