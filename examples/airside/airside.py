"""From the road to the apron: adapt a driving teacher to a new domain, distil it, and gate what would forget the road.

Every step is an `fmdeploy` command, printed before it runs; a second call goes on where the first one stopped.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any, NamedTuple

from fmdeploy.cli import main as fmdeploy

ROAD_SEED, AIRSIDE_SEED = "0", "1"  # no simulation is in both domains
HERE = Path(__file__).parent


class Size(NamedTuple):
    """How much is recorded and trained, and how strict the gate is."""

    road: int
    airside: int
    frames: int
    base: int
    adapt: int
    deployed: int
    update: int
    gate: str
    teacher: str = ""
    student: str = ""
    training: str = ""
    taught: str = ""
    quantize: str = ""
    export: str = ""
    metric: str = "iou"
    budgets: str = "budgets.toml"


FULL = Size(
    road=128, airside=64, frames=40, base=400, adapt=150, deployed=250, update=150,
    gate="--domain-drop road=0.05 --max-slice-drop 0.1 --slices weather",
)
FAST = Size(  # a minute is too short for occupancy: the drivable area stands in for it
    road=32, airside=12, frames=28, base=50, adapt=30, deployed=80, update=60,
    gate="--domain-drop road=0.1 --domain-drop airside=0.5 --max-slice-drop 0.5 --slices weather "
         "--min-groups 2 --min-samples 30 --min-slice-samples 10",
    teacher="--dim 32 --depth 1 --heads 2 --stem-width 8 --width 16", student="--stem-width 8 --width 12",
    training="--batch 8 --precision fp32", taught="--lr 0.01",
    quantize="--calibration-samples 32 --validation-samples 64", export="--calibration-samples 32 --parity-samples 64",
    metric="drivable_iou", budgets="budgets-fast.toml",
)
APRON = ("--scenarios parking --scenarios intersection --profile airside --rig bumper-1 "
         "--weathers night --weathers fog --test 0.3")
LORA = "--method lora --also bias-norm --lr 0.004 --labels 0.2 --replay-share 0.75"
TAUGHT = "--labels 0 --loss logits=2 --loss features=0.2"  # no student sees a label


class Chapter:
    """The folders of one run, and its commands."""

    def __init__(self, out: Path, size: Size) -> None:
        self.out, self.size = out, size

    def run(self, *words: str | int | Path, expect: int | None = 0) -> None:
        """Run one command in this process; another exit code than the expected one ends the example."""
        words_shown = [str(word).replace(f"{self.out}/", "") for word in words]
        print(f"\n$ fmdeploy {' '.join(words_shown)}", flush=True)
        began, code = time.perf_counter(), 0
        try:
            fmdeploy([str(word) for word in words])
        except SystemExit as stop:
            code = int(stop.code or 0)
        print(f"  exit {code}, {time.perf_counter() - began:.0f} s", flush=True)
        if expect is not None and code != expect:
            raise SystemExit(f"expected exit {expect}")

    def data(self) -> None:
        """Record both domains, and look for leaks in each and across."""
        out, size = self.out, self.size
        self.run("data", "record", "--out", out / "road", "--simulations", size.road, "--frames", size.frames,
                 "--seed", ROAD_SEED, "--weathers", "clear", "--weathers", "rain")
        self.run("data", "record", "--out", out / "airside", "--simulations", size.airside, "--frames", size.frames,
                 "--seed", AIRSIDE_SEED, *APRON.split())
        self.run("data", "join", out / "road", out / "airside", "--out", out / "both")
        self.run("data", "audit", out / "both")
        self.run("data", "canary", out / "road", "--out", out / "canary.json", "--per-label", 8, "--floor", "0.2",
                 "--metric", size.metric)

    def teachers(self) -> None:
        """A base teacher on the road; its adapter for the apron from a fifth of the labels there; both in one."""
        out, size = self.out, self.size
        self.run("teacher", "train", "--data", out / "road", "--out", out / "base", "--steps", size.base,
                 *size.teacher.split(), *size.training.split())
        self.run("teacher", "adapt", "--teacher", out / "base", "--data", out / "airside",
                 "--replay", out / "road", "--source-data", out / "road", "--out", out / "adapter",
                 "--steps", size.adapt, *LORA.split(), *size.training.split())
        self.run("teacher", "merge", "--teacher", out / "base", "--adapter", out / "adapter", "--out", out / "adapted")
        self.compare("adapted", "base", "teachers", expect=None)  # to be told, not to be stopped

    def students(self) -> None:
        """What drives today; a student of the apron's logs alone; an update of the first from both domains' logs."""
        out, size = self.out, self.size
        taught = (*TAUGHT.split(), *size.taught.split(), *size.training.split())
        self.run("distill", "--data", out / "road", "--teacher", out / "base", "--out", out / "deployed",
                 "--build-cache", out / "features-road", "--steps", size.deployed,
                 *size.student.split(), *taught)
        anew: tuple[str | int | Path, ...] = ("--steps", size.deployed, *size.student.split())
        go_on: tuple[str | int | Path, ...] = (
            "--steps", size.update, "--init", out / "deployed", "--teacher-data", out / "airside")
        for name, data, how in (("naive", "airside", anew), ("kept", "both", go_on)):
            features = out / f"features-{data}"
            self.run("cache", "--teacher", out / "adapted", "--data", out / data, "--out", features,
                     *(("--reuse", out / "features-airside") if name == "kept" else ()))
            self.run("distill", "--data", out / data, "--teacher", out / "adapted", "--features", features,
                     "--teacher-data", out / "road", *how, "--out", out / name, *taught)

    def deploy(self) -> None:
        """INT8, a bundle held against budgets, and the gate that the two candidates meet."""
        out = self.out
        self.run("quantize", "--student", out / "kept", "--data", out / "both", "--out", out / "quantized",
                 *self.size.quantize.split())
        self.run("export", "--model", out / "quantized", "--data", out / "both", "--budgets", HERE / self.size.budgets,
                 *self.size.export.split(), "--out", out / "bundle")
        self.run("check", out / "bundle", "--data", out / "both", "--out", out / "check", "--again", "--runs", 100)
        canaries = ("--canary", out / "canary.json")
        self.compare("naive", "deployed", "gate-naive", *canaries, expect=1)
        self.compare("kept", "deployed", "gate-kept", *canaries)
        self.compare("bundle", "deployed", "gate-int8", *canaries)

    def compare(self, new: str, old: str, name: str, *more: str | Path, expect: int | None = 0) -> None:
        """Both models on the held-out scenes of both domains."""
        out = self.out
        self.run("compare", out / new, out / old, "--data", out / "road", "--data", out / "airside", "--new", "airside",
                 "--metric", self.size.metric, "--out", out / name, *self.size.gate.split(), *more, expect=expect)

    def record(self) -> dict[str, Any]:
        """The metric (an IoU) of every model on both domains, and what the gates said."""
        names = ("teachers", "gate-naive", "gate-kept", "gate-int8")
        checks = {name: self.read(f"{name}/check.json") for name in names}
        teachers, naive, kept, int8 = (check["values"] for check in checks.values())
        gates = {name: self.read(f"{name}/gates.json") for name in names[1:]}
        return {
            "metric": self.size.metric,
            "values": {"base teacher": teachers["deployed"], "adapted teacher": teachers["candidate"],
                       "deployed student": kept["deployed"], "naive student": naive["candidate"],
                       "kept student": kept["candidate"], "kept student, INT8": int8["candidate"]},
            "forgetting": {name: check["continual"]["forgetting"]["road"] for name, check in checks.items()},
            "not_passed": {name: [row["name"] for row in rows if row["result"] != "pass"]
                           for name, rows in gates.items()},
            "canaries": len(checks["gate-kept"]["canaries"]),
        }

    def read(self, name: str) -> Any:
        """A JSON file of the run."""
        return json.loads((self.out / name).read_text())


def table(metric: str, values: dict[str, dict[str, float]]) -> str:
    """The metric by model and domain, as Markdown."""
    rows = [f"| {model} | {value['road']:.3f} | {value['airside']:.3f} |" for model, value in values.items()]
    return "\n".join([f"| model | {metric} road | {metric} airside |", "|---|---|---|", *rows])


def main() -> None:
    """Run the whole chapter."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, nargs="?", default=Path("out/airside"))
    parser.add_argument("--fast", action="store_true", help="a minute's size: the steps, not the numbers")
    options = parser.parse_args()
    began = time.perf_counter()
    chapter = Chapter(options.out, FAST if options.fast else FULL)
    chapter.data()
    chapter.teachers()
    chapter.students()
    chapter.deploy()
    found = {"size": "fast" if options.fast else "full", **chapter.record()}
    (options.out / "record.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"\n{table(found['metric'], found['values'])}\n\n{time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
