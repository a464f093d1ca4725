"""`export`: a bundle from a STUDENT or QUANTIZED; or both INT8 dialects of a foreign file; or a verdict on one."""

from __future__ import annotations

from typing import Any

from fmdeploy.command import command
from fmdeploy.errors import ConfigError
from fmdeploy.export.config import ExportConfig
from fmdeploy.export.from_onnx import lower_from_config
from fmdeploy.export.lint.lint import outcome


@command(ExportConfig)
def export(config: ExportConfig) -> Any:
    """Write a bundle; or, for a foreign ONNX file, its INT8 dialects (--from-onnx) or a verdict (--lint).

    Returns:
        The BUNDLE (`Artifact`); with --from-onnx or --lint an `Outcome` with its `data`.

    Raises:
        ArtifactError: an input is not what it should be.
        ConfigError: flags that do not go together, or a budget on a metric that the task does not have.
        DataError: the dataset is another one, or cannot calibrate.
        ModelFileError: the student cannot be exported, or the file is not ONNX that can be used.
        GateError: a file does not compute what the student does.
    """
    modes = {"--model": config.model, "--from-onnx": config.from_onnx, "--lint": config.lint}
    if len(given := [flag for flag, value in modes.items() if value is not None]) != 1:
        raise ConfigError("export does one thing at a time", expected="one of " + ", ".join(modes), found=given)
    if config.lint is not None:
        return outcome(config.lint, target=config.target)
    if config.from_onnx is not None:
        return lower_from_config(config)
    from fmdeploy.export.bundle import write_bundle  # needs torch, which the other two do not

    return write_bundle(config)
