"""`export --lint`: judge an ONNX file, ours or not, by the table of rules."""

from __future__ import annotations

from pathlib import Path

from onnx import ModelProto

from fmdeploy.command import Outcome
from fmdeploy.export.lint.finding import Finding, Rule, Subject, Target
from fmdeploy.export.lint.rules import RULES
from fmdeploy.onnxfile.reading import read_model

ORDER = {"error": 0, "warning": 1, "info": 2}


def lint_file(path: Path, *, target: Target = "tensorrt") -> tuple[Finding, ...]:
    """Judge a file: findings, the worst first.

    Raises:
        ModelFileError: the file is not ONNX that any runtime should be given; see `onnxfile.reading`.
    """
    return lint_model(read_model(path), target=target)


def lint_model(model: ModelProto, *, target: Target = "tensorrt") -> tuple[Finding, ...]:
    """Judge a model that `read_model` would return."""
    subject = Subject(model)
    found = [finding for rule in RULES for finding in _apply(rule, subject, target)]
    return tuple(sorted(found, key=lambda finding: (ORDER[finding.severity], finding.id)))


def _apply(rule: Rule, subject: Subject, target: Target) -> list[Finding]:
    severity = rule.severity(target)
    if severity is None:
        return []
    return [Finding(rule.id, where, severity, f"{rule.why} ({what})" if what else rule.why, rule.fix)
            for where, what in rule.check(subject)]


def outcome(path: Path, *, target: Target) -> Outcome:
    """What the command prints: one line a finding; exit 1 on an error.

    Raises:
        ModelFileError: see `lint_file`.
    """
    found = lint_file(path, target=target)
    lines = tuple(map(str, found)) or (f"{path}: nothing to say for {target}",)
    return Outcome(lines, [finding.to_json() for finding in found],
                   int(any(finding.severity == "error" for finding in found)))
