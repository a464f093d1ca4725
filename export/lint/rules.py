"""The table of rules, in the order of their ids. docs/lint.md is this table for people; a test keeps the two equal.

    FMD0xx numbers of Q/DQ   1xx places of Q/DQ   2xx operators   3xx shapes, types, versions   4xx DLA   5xx CPU

An error means that the target refuses the file, or builds it and computes something else; a warning, that it is slower
than it could be or breaks by version; info is good to know. Ids are never given to another rule.
"""

from __future__ import annotations

from fmdeploy.export.lint import cpu, dla, numbers, operators, pairs, shapes
from fmdeploy.export.lint.finding import Rule

RULES: tuple[Rule, ...] = (*numbers.RULES, *pairs.RULES, *operators.RULES, *shapes.RULES, *dla.RULES, *cpu.RULES)


def as_markdown() -> str:
    """The table for docs/lint.md: one row a rule, with its severity for each target."""
    rows = ["| id | rule | tensorrt | dla | ort | why | fix | source |", "|---|---|---|---|---|---|---|---|"]
    for rule in RULES:
        severities = [f"{rule.severity(target)}: {rule.effect[target]}" if target in rule.effect else "–"
                      for target in ("tensorrt", "dla", "ort")]
        rows.append("| " + " | ".join([rule.id, rule.title, *severities, rule.why, rule.fix, rule.source]) + " |")
    return "\n".join(rows) + "\n"
