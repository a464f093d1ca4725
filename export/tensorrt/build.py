"""`fmdeploy build`: an engine for this machine from a bundle, and proof that it computes what the bundle says.

    engine.plan       the serialised engine: code for one GPU, one TensorRT version, one power mode
    build.json        the key's facts, builder flags, size, what the builder used
    inspector.json    every layer, as the engine inspector tells it
    agreement.json    engine, ONNX Runtime and torch on the golden inputs

It runs on the device: neither torch nor onnx is imported.
"""

from __future__ import annotations

import os
import re
from contextlib import closing, suppress
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from fmdeploy.artifact import Artifact
from fmdeploy.command import command
from fmdeploy.config import InputPath, OutputPath, Positional, RunOnly, StageConfig
from fmdeploy.draft import Draft, produce
from fmdeploy.errors import ConfigError, MissingError, ModelFileError
from fmdeploy.export.tensorrt.builder import FLAGS, MIB, Options
from fmdeploy.export.tensorrt.goldencheck import require_agreement, stored_answers, three_way
from fmdeploy.export.tensorrt.isolated import Ended, Limits, build_isolated
from fmdeploy.jetson.machine import available_mib
from fmdeploy.manifest import MANIFEST_NAME, Kind, read_manifest, request_key
from fmdeploy.progress import say
from fmdeploy.runtime.backends.tensorrt import TensorRtBackend
from fmdeploy.runtime.backends.tensorrt_api import Api, ApiName, load_api
from fmdeploy.runtime.bundle import Bundle, open_bundle
from fmdeploy.runtime.engines.find import PLAN as ENGINE
from fmdeploy.runtime.engines.key import BuildRequest, Place, request_here
from fmdeploy.runtime.run import task_name
from fmdeploy.task import load_task

STAGE = "build"
SHARE = 0.75  # of the available memory that a build may take, where no limit is given


class BuildConfig(StageConfig):
    """Options of `fmdeploy build`."""

    bundle: Annotated[InputPath, Positional()] = Field(description="Folder of a BUNDLE")
    out: OutputPath = Field(description="Folder of the ENGINE; one with another key stays, the new one goes beside it")
    api: ApiName = Field("tensorrt", description="Package that builds")
    variant: Literal["int8", "fp16", "fp32"] = Field("int8", description="Model file to build")
    workspace_mib: int = Field(1024, ge=1, description="Scratch memory that one layer may use")
    timeout_s: Annotated[float, RunOnly()] = Field(3600.0, gt=0, description="The build is killed after so long")
    memory_mib: Annotated[int | None, RunOnly()] = Field(
        None, ge=64, description="The build is killed beyond so much; default: three quarters of what is available")
    timing_cache: OutputPath | None = Field(
        None, description="File of kernel timings to reuse and extend; default: beside --out")


@command(BuildConfig)
def build(config: BuildConfig) -> Artifact:
    """Build an engine for this machine, and let the golden vectors decide about it.

    Raises:
        ArtifactError: The bundle is missing or altered.
        GateError: The engine does not compute what the bundle says.
        MissingError: TensorRT or the GPU is not here.
        ModelFileError: TensorRT refuses the model, or its build crashed or went beyond a limit.
    """
    return build_engine_artifact(config, Place())


def build_engine_artifact(config: BuildConfig, place: Place) -> Artifact:
    """Do what `build` does, on a given machine; errors as there."""
    bundle, api = open_bundle(config.bundle), load_api(config.api)
    if config.variant not in bundle.variants:
        raise ConfigError("the bundle has no such model", where=config.bundle, expected=", ".join(bundle.variants),
                          found=config.variant)
    request = request_here(bundle, config.variant, api, place, flags=FLAGS, workspace_mib=config.workspace_mib)
    out = free_place(Path(os.path.abspath(config.out)), request, bundle)
    return produce(out, Kind.ENGINE, stage=STAGE, config=request, inputs={"bundle": bundle.artifact},
                   build=lambda draft: _build(draft, config, request, bundle, api, place))


def free_place(out: Path, request: BuildRequest, bundle: Bundle) -> Path:
    """`out`, or a name beside it where an engine with another key lies there: the old one goes on serving."""
    key = request_key(Kind.ENGINE, STAGE, request.resolved(), {"bundle": bundle.artifact.parent()})
    if not (out / MANIFEST_NAME).is_file():
        return out
    found = read_manifest(out)
    if found.kind is not Kind.ENGINE or found.key() == key:
        return out
    beside = out.with_name(f"{out.name}-{key[:8]}")
    say(f"{out} was built for something else (model, TensorRT, machine or power mode): building {beside}")
    return beside


def _build(
    draft: Draft, config: BuildConfig, request: BuildRequest, bundle: Bundle, api: Api, place: Place
) -> None:
    stored_answers(bundle, config.variant)  # what nothing can judge is not built
    task = load_task(task_name(bundle, ""))
    ended = _compile(config, request, bundle, config.timing_cache or cache_beside(config.out, request), place)
    assert ended.engine is not None
    draft.path(ENGINE).write_bytes(ended.engine)
    say(f"{api.name} {api.version} built an engine of {len(ended.engine) / MIB:.2f} MiB in "
        f"{ended.result['seconds']:.1f} s")
    with closing(_load(ended.engine, bundle, api, place)) as backend:
        agreements = three_way(bundle, config.variant, backend, task)
        layers = backend.inspect()
    for found in agreements:
        say(str(found))
    require_agreement(agreements[0], bundle.golden.index.variants[config.variant].sqnr_db, len(bundle.golden))
    draft.write_json("agreement.json", [found.to_json() for found in agreements])
    draft.write_json("inspector.json", layers)
    draft.write_json("build.json", {**request.resolved(), "flags": ended.result["flags"],
                                    "engine_bytes": len(ended.engine)})
    draft.note(build_seconds=ended.result["seconds"], build_peak_mib=ended.result["peak_mib"])


def cache_beside(out: Path, request: BuildRequest) -> Path:
    """Where kernel timings are kept: they hold for one GPU in one power mode, as the engine does."""
    gpu = f"sm{request.sm or 0}x{request.multiprocessors or 0}"
    facts = (request.api, request.version, gpu, request.l4t, request.power_mode)
    name = re.sub(r"[^\w.-]", "_", "-".join(fact for fact in facts if fact))
    return Path(os.path.abspath(out)).with_name(f".timing-{name}.cache")


def _compile(config: BuildConfig, request: BuildRequest, bundle: Bundle, cache: Path, place: Place) -> Ended:
    bundle.model_bytes(config.variant)  # refuses what was altered, or keeps weights elsewhere
    model = bundle.artifact.path(f"model.{config.variant}.onnx")
    limits = Limits(config.timeout_s, config.memory_mib or int(SHARE * (available_mib(place.root) or 4096)))
    options = Options(config.workspace_mib, timing_cache=cache.read_bytes() if cache.is_file() else None)
    ended = build_isolated(config.api, model, request.model_sha256, options, limits)
    if ended.engine is None:
        more = f" (and {len(ended.problems) - 1} more)" if len(ended.problems) > 1 else ""
        raise ModelFileError(f"{config.api} {request.version} builds no engine, {ended.problems[0]}{more}", where=model)
    if ended.timing_cache is not None:
        _keep(cache, ended.timing_cache)
    return ended


def _load(engine: bytes, bundle: Bundle, api: Api, place: Place) -> TensorRtBackend:
    try:
        return TensorRtBackend(engine, bundle.io, api=api, cuda=place.cuda(), where=ENGINE)
    except MissingError as error:
        raise MissingError(f"the engine of {len(engine):,} bytes was built, but cannot prove itself: {error.what}",
                           where=error.where, expected=error.expected, found=error.found, fix=error.fix) from error


def _keep(path: Path, content: bytes) -> None:
    """Write the timing cache in one step; an engine is not thrown away because that failed."""
    scratch = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch.write_bytes(content)
        os.replace(scratch, path)
    except OSError as error:
        say(f"the timing cache {path} cannot be written: {error.strerror}")
    finally:
        with suppress(OSError):
            scratch.unlink(missing_ok=True)

