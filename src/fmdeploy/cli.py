"""The command line. Nothing but click is imported until a verb is named."""

from __future__ import annotations

import errno
import importlib
import inspect
import json
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import click

from fmdeploy import interrupt


class Verb(NamedTuple):
    """Where a command lives, and its one-line help."""

    target: str
    help: str


VERBS: dict[str, Verb | dict[str, Verb]] = {
    "demo": Verb("fmdeploy.demo:demo", "The whole pipeline on recorded scenes, into one folder."),
    "data": {
        "record": Verb("fmdeploy.data.record:record", "Record driving scenes from highway-env."),
        "import": Verb("fmdeploy.data.importing.stage:import_data", "Import nuScenes, images, WebDataset or MCAP."),
        "split": Verb("fmdeploy.data.split:split", "Divide a dataset anew: by seed, route, date, place, map."),
        "join": Verb("fmdeploy.data.join:join", "Several datasets in one, each sequence in its split."),
        "audit": Verb("fmdeploy.data.audit:audit", "Find leakage between splits; exit 1 where there is any."),
        "info": Verb("fmdeploy.data.info:info", "Count what a dataset holds."),
        "canary": Verb("fmdeploy.compare.canary:canary", "Choose rare cases that no candidate may lose."),
    },
    "teacher": {
        "train": Verb("fmdeploy.teacher.train:train", "Train the teacher."),
        "adapt": Verb("fmdeploy.teacher.adapt.adapt:adapt", "Adapt a frozen teacher with few parameters."),
        "merge": Verb("fmdeploy.teacher.merge:merge", "Make one teacher of a frozen one and its adapter."),
        "recalibrate": Verb("fmdeploy.teacher.recalibrate:recalibrate", "Fit normalisation to another sensor."),
        "import": Verb("fmdeploy.teacher.importing.stage:import_teacher", "Make a teacher of a foreign network."),
        "probe": Verb("fmdeploy.teacher.probe.probe:probe", "What a representation is good for: the probe ladder."),
    },
    "cache": Verb("fmdeploy.teacher.cache:cache", "Write teacher features and logits to disk, once."),
    "cache-merge": Verb("fmdeploy.teacher.caching.merge:merge", "Join the parts of `cache --shard i/n`."),
    "cache-export": Verb("fmdeploy.teacher.caching.export:export", "Write a cache as WebDataset tar files."),
    "distill": Verb("fmdeploy.distill.distill:distill", "Train the student from the teacher."),
    "quantize": Verb("fmdeploy.quantize.quantize:quantize", "Calibrate, place and tune INT8."),
    "export": Verb("fmdeploy.export.export:export", "Write ONNX variants, golden vectors and budgets: the bundle."),
    "build": Verb("fmdeploy.export.tensorrt.build:build", "Build and prove a TensorRT engine, on the device."),
    "estimate": Verb("fmdeploy.estimate.estimate:estimate", "Predict the latency on a device, with a band."),
    "check": Verb("fmdeploy.runtime.check.check:check", "Measure every budget here; exit 1 when one fails."),
    "evaluate": Verb("fmdeploy.runtime.trouble.evaluate:evaluate", "Accuracy and validity when sensors fail."),
    "compare": Verb("fmdeploy.compare.compare:compare", "Gate a candidate against what is deployed."),
    "run": Verb("fmdeploy.runtime.run:run", "Run a bundle over a dataset."),
    "bench": Verb("fmdeploy.runtime.measure.bench:bench", "Latency and memory of a bundle here."),
    "serve": Verb("fmdeploy.runtime.serve.serve:serve", "Serve a bundle over HTTP: KServe v2, metrics."),
    "doctor": Verb("fmdeploy.jetson.doctor:doctor", "Say what this board is, what is wrong, and how to fix it."),
    "container": {
        "build": Verb("fmdeploy.jetson.container.build:build", "Build the runtime image for a Jetson."),
        "run": Verb("fmdeploy.jetson.container.run:run", "Serve a bundle from a container without rights."),
        "write": Verb("fmdeploy.jetson.container.write:write", "Write compose.yaml and systemd units for a host."),
    },
    "sign": Verb("fmdeploy.runtime.signing:sign", "Sign a bundle with a bare key (OpenSSF Model Signing)."),
    "verify": Verb("fmdeploy.runtime.signing:verify", "Verify a bundle and its signature."),
    "unpack": Verb("fmdeploy.runtime.unpack:unpack", "Unpack an archived bundle without trusting it."),
    "plan": Verb("fmdeploy.plan.plan:plan", "FLOPs, memory and tokens of a run; scaling laws from your own runs."),
    "report": Verb("fmdeploy.evaluate.report:report", "One self-contained HTML page from artifacts."),
    "show": Verb("fmdeploy.show:show", "Print an artifact and its lineage."),
}


class LazyGroup(click.Group):
    """A group that lists its verbs without importing them."""

    def __init__(self, verbs: dict[str, Verb | dict[str, Verb]], **options: Any) -> None:
        super().__init__(**options)
        self.verbs = verbs

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The verbs, in pipeline order."""
        return list(self.verbs)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of one verb and build its command."""
        entry = self.verbs.get(cmd_name)
        if isinstance(entry, dict):
            return LazyGroup(dict(entry), name=cmd_name, help=f"Commands: {', '.join(entry)}.")
        return None if entry is None else build_command(cmd_name, entry)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Help from the table, so that `--help` stays fast."""
        rows = [(n, f"{', '.join(v)}." if isinstance(v, dict) else v.help) for n, v in self.verbs.items()]
        with formatter.section("Commands"):
            formatter.write_dl(rows)


def build_command(name: str, verb: Verb) -> click.Command:
    """The click command of one stage, its flags generated from its configuration."""
    from fmdeploy.command import Command, argument_lines, click_options

    stage: Command[Any, Any] = load_stage(verb.target)
    common: list[click.Parameter] = [
        click.Option(["--config", "config_file"], type=click.STRING, help="TOML file with the same keys; flags win."),
        click.Option(["--json", "as_json"], is_flag=True, help="Print one machine-readable result on stdout."),
    ]

    def callback(config_file: str | None, as_json: bool, **flags: Any) -> None:
        run_stage(stage, Path(config_file) if config_file else None, as_json, flags)

    about = re.split(r"\n\n(?:Returns|Raises):", inspect.cleandoc(stage.__doc__ or verb.help))[0]
    text = about + argument_lines(stage.config)
    return click.Command(name, params=click_options(stage.config) + common, help=text, short_help=verb.help,
                         callback=callback)


def load_stage(target: str) -> Any:
    """Import a stage."""
    module, _, attribute = target.partition(":")
    with naming_what_to_install():
        return getattr(importlib.import_module(module), attribute)


@contextmanager
def naming_what_to_install() -> Iterator[None]:
    """Turn the import error of a package that an extra installs into one line: it is the user's to install, no bug."""
    try:
        yield
    except ModuleNotFoundError as error:
        from fmdeploy.optional import EXTRA_OF, require

        root = (error.name or "").partition(".")[0]
        if root in EXTRA_OF:
            require(root)
        raise


def run_stage(stage: Any, config_file: Path | None, as_json: bool, flags: dict[str, Any]) -> None:
    """Run one stage, print its outcome and exit with its code."""
    from fmdeploy.command import outcome_of
    from fmdeploy.config import load_config
    from fmdeploy.jsonlines import records_to

    given = {key: value for key, value in flags.items() if value is not None and value != ()}
    config = load_config(stage.config, given, file=config_file)
    # A stage imports late what only some of its ways need.
    with naming_what_to_install(), records_to(show if as_json else None):
        outcome = outcome_of(stage.run(config))
    if int(os.environ.get("RANK", "0")) == 0 and outcome.data is not None:  # None: it said everything itself
        show(json.dumps(outcome.data, sort_keys=True) if as_json else "\n".join(outcome.lines))
    sys.exit(outcome.exit_code)


def show(text: str) -> None:
    """Print the result. A reader that went away (`fmdeploy … | head -1`) does not change the exit code."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.command(cls=LazyGroup, verbs=VERBS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="fmdeploy", message="%(version)s")
def group() -> None:
    """Take a driving foundation model to a Jetson Orin, with proof.

    teacher → cached features → distilled student → INT8 → ONNX bundle → gates → runtime.
    Exit codes: 0 ok, 1 a gate failed or was not measured, 2 bad input, 3 something is missing here, 4 a bug.
    """


def main(argv: list[str] | None = None) -> None:
    """Entry point: every error becomes one line and its exit code."""
    # libgomp spins at barriers for so long that two threads beside another busy process are several times slower than
    # they need be (measured: 2 to 3 times); less spinning costs nothing on an idle machine.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        with interrupt.remembered():
            group.main(args=argv, prog_name="fmdeploy", standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (KeyboardInterrupt, click.Abort):
        print("fmdeploy: interrupted; no artifact was left half-written", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        sys.exit(report_error(error))


UNUSABLE_PATH = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.EROFS, errno.ENAMETOOLONG,
                 errno.ELOOP)


def report_error(error: Exception) -> int:
    """Print one line for a user's error, a traceback for a bug; return the exit code."""
    from fmdeploy.errors import FmdeployError, InputError, NoSpaceError
    from fmdeploy.files import is_no_space

    if isinstance(error, OSError) and error.filename and error.errno in UNUSABLE_PATH:
        error = InputError(f"{error.strerror}".lower(), where=error.filename, fix="Check the path and its permissions")
    elif not isinstance(error, FmdeployError) and is_no_space(error):  # no artifact: a page, a list, scratch files
        error = NoSpaceError("the disk is full", where=getattr(error, "filename", None),
                             fix="Free some space, also where temporary files lie")
    if isinstance(error, FmdeployError) and (error.told or error.exit_code != 4):
        if not error.told:
            print(f"fmdeploy: {error}", file=sys.stderr)
        return error.exit_code
    import traceback

    traceback.print_exception(error)
    print("fmdeploy: this is a bug in fmdeploy; please report the lines above", file=sys.stderr)
    return 4
