"""How fast a run is and how much of its time it waits for data: told while it runs, and kept out of what it computes.

`timing.jsonl` lies beside the checkpoints, so it is there to watch and goes when the artifact is sealed; the totals are
said on stderr when it is over and are in the manifest under `environment.training`, which the report shows. They are
not in `log.jsonl`: the log is part of an artifact's digest and must be the same in every run, and times are not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

TIMING_LOG = "timing.jsonl"
TOO_LONG = 0.2  # share of a run that waits for data from which on advice is due
WORTH_S = 1.0  # and seconds of it: the first batch of a short run always comes late
ADVICE = ("reading and augmenting is slower than the network: put the data on a local disk, leave a core to the "
          "loader's thread (OMP_NUM_THREADS), or start more processes, each of which has a loader of its own")


@dataclass(frozen=True)
class Timing:
    """How long a run took; not part of an artifact's identity.

    Attributes:
        steps: Steps done by this process run (a resumed one did the others before).
        seconds: Wall clock of those.
        waited_s: Of it, waiting for data.
        judged: Steps done and validation score, in order; empty where nothing was judged.
        best_step: Steps done when the state that stays was reached; the last one where nothing was judged.
        processes: That trained together.
        sharding: How the state was spread over them.
    """

    steps: int
    seconds: float
    waited_s: float
    judged: tuple[tuple[int, float], ...] = ()
    best_step: int = 0
    processes: int = 1
    sharding: str = "none"

    @property
    def steps_per_s(self) -> float:
        """Of the wall clock."""
        return self.steps / self.seconds if self.seconds else 0.0

    @property
    def wait_share(self) -> float:
        """Share of the wall clock spent waiting for data."""
        return self.waited_s / self.seconds if self.seconds else 0.0

    def sentence(self, title: str) -> str:
        """What to say of the run when it is over, with advice where it starved."""
        told = (f"{title}: {self.steps} steps in {self.seconds:.0f} s ({self.steps_per_s:.3g} a second); "
                f"waited for data {self.wait_share:.1%} of the time")
        starved = self.wait_share > TOO_LONG and self.waited_s > WORTH_S
        return f"{told}: {ADVICE}" if starved else told

    def as_note(self) -> dict[str, float | str]:
        """Numbers for the environment part of a manifest."""
        return {"steps": self.steps, "steps_per_s": round(self.steps_per_s, 3), "processes": self.processes,
                "data_wait_share": round(self.wait_share, 4), "sharding": self.sharding}


@dataclass
class Stopwatch:
    """Measures a run while it runs.

    Attributes:
        waited: Seconds spent waiting for data so far.
        path: The timing log; None writes none (ranks above 0).
    """

    waited: Callable[[], float]
    path: Path | None
    started: float = field(default_factory=time.perf_counter)
    _last: tuple[int, float, float] = (0, 0.0, 0.0)

    def lap(self, done: int, steps: int) -> float:
        """Note that `steps` more steps are over, `done` in all; the share of their time that went into waiting."""
        seconds, waited = time.perf_counter() - self.started, self.waited()
        before = self._last
        self._last = (done, seconds, waited)
        lap_s = max(seconds - before[1], 1e-9)
        share = min(1.0, (waited - before[2]) / lap_s)
        if self.path is not None and steps:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            line = {"steps": done, "seconds": round(seconds, 3), "steps_per_s": round(steps / lap_s, 3),
                    "data_wait_share": round(share, 4)}
            with self.path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(line) + "\n")
        return share

    def total(self, steps: int) -> Timing:
        """What the whole run took."""
        return Timing(steps, time.perf_counter() - self.started, self.waited())
