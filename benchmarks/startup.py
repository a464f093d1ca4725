"""How long `fmdeploy --help` takes, against importing click alone.

    python benchmarks/startup.py [--runs N]

Both sides are processes of the same interpreter, started in turn, with click twice as the A/A control. Target: at most
3 times. Also prints which heavy packages `import fmdeploy.runtime` loads: none may be.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time

TARGET = 3.0
CLICK = (sys.executable, "-c", "import click")
HELP = (sys.executable, "-m", "fmdeploy", "--help")
HEAVY = ("torch", "onnx", "modelopt", "transformers")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    runs = parser.parse_args().runs
    sides = {"click": CLICK, "help": HELP, "click again": CLICK}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(-2, runs):
        for name in sorted(sides, key=lambda name: (list(sides).index(name) + number) % len(sides)):
            started = time.perf_counter()
            subprocess.run(sides[name], check=True, stdout=subprocess.DEVNULL)
            if number >= 0:
                times[name].append(time.perf_counter() - started)
    middle = {name: statistics.median(values) for name, values in times.items()}
    print(f"import click {1e3 * middle['click']:.0f} ms, fmdeploy --help {1e3 * middle['help']:.0f} ms")
    print(f"  ratio   {middle['help'] / middle['click']:.2f}   (target at most {TARGET:g})")
    print(f"  control {middle['click again'] / middle['click']:.2f}")
    print(f"  import fmdeploy.runtime loads of {', '.join(HEAVY)}: {', '.join(loaded()) or 'none'}")


def loaded() -> list[str]:
    code = f"import sys, json, fmdeploy.runtime; print(json.dumps([n for n in {HEAVY!r} if n in sys.modules]))"
    found: list[str] = json.loads(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
    return found


if __name__ == "__main__":
    main()
