"""The soak of `make soak`, for a few seconds: same mix, same asserts, one killed worker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_short_soak() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--seconds", "8", "--kill-every-s", "5"],
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    figures = json.loads(done.stdout)
    print(done.stdout)
    assert figures["published_wrongly"] == 0
    assert figures["worker_kills"] == figures["worker_losses"] == 1
    assert figures["valid_answers"] > 50
    assert 0.1 < figures["faulty_share"] < 0.3
    for kind in ("nan 422", "black 422", "stale 422", "shape 400", "garbage 400", "timeout 503", "crash 0"):
        assert figures["statuses"].get(kind), f"no {kind}"


def test_a_wrong_answer_fails_the_soak() -> None:
    """Positive control: other weights at the reference, and the soak says so."""
    code = ("import sys; sys.argv = ['soak', '--seconds', '1', '--kill-every-s', '0', '--clients', '1']\n"
            f"sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
            "import soak\n"
            "true = soak.reference\n"
            "def reference(root):\n"
            "    known = true(root)\n"
            "    for rows in known.outputs.values(): rows.append(rows.pop(0))\n"
            "    return known\n"
            "soak.reference = reference\n"
            "soak.main()\n")
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True,
                          capture_output=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr[-3000:]
    assert "answers are not as they must be" in done.stdout
