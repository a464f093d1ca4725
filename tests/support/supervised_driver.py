"""A service around a supervised runtime, as small as possible: `python supervised_driver.py OPTIONS-AS-JSON`.

Prints one JSON line when it is ready, feeds frames in a thread, and on SIGTERM drains and prints the shutdown record.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from fmdeploy.runtime.measure.latency import golden_frames
from fmdeploy.runtime.supervisor.config import Supervision
from fmdeploy.runtime.supervisor.supervised import SupervisedRuntime


def feed(runtime: SupervisedRuntime, options: dict[str, Any], ended: threading.Event) -> None:
    frames, number = golden_frames(runtime.bundle), 0
    if fault := options.get("fault"):
        from support.faulty_worker import poison

        poison(frames[0], fault)
    while not ended.wait(0.01):
        frame = runtime.infer(frames[number % len(frames)])
        number += 1
        if number % 5 == 0 and options.get("frames"):
            print(json.dumps({"valid": frame.valid, "reasons": frame.reasons, "uid": os.getuid()}), flush=True)


def main() -> None:
    options = json.loads(sys.argv[1])
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    extra: dict[str, Any] = {}
    if folder := options.get("folder"):
        extra["command"] = (sys.executable, str(Path(__file__).with_name("faulty_worker.py")), folder)
    config = Supervision(hard_deadline_ms=options.get("hard_deadline_ms", 2000.0), terminate_ms=0.0,
                         events=Path(options["events"]) if "events" in options else None, **extra)
    runtime = SupervisedRuntime(options["bundle"], tiers=("fp32",), standby=False, supervision=config)
    workers = [worker.pid for worker in runtime.fleet.workers()]
    thread = threading.Thread(target=feed, args=(runtime, options, ended), daemon=True)
    if options.get("feed", True):
        thread.start()
    time.sleep(0.05)
    print(json.dumps({"pid": os.getpid(), "workers": workers, "tier": runtime.tier}), flush=True)
    ended.wait()
    print(json.dumps({"shutdown": runtime.close(grace_ms=options.get("grace_ms", 2000.0))}), flush=True)


if __name__ == "__main__":
    main()
