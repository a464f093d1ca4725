"""What a CI system reads of a check: JUnit XML, a Markdown table for the job summary, and the rows as JSON."""

from __future__ import annotations

import re
from collections.abc import Sequence
from xml.etree import ElementTree

from fmdeploy.draft import Draft
from fmdeploy.evaluate.gates import Result, Row, gates_pass

MARKS = {Result.PASS: "✅ pass", Result.FAIL: "❌ fail", Result.NOT_MEASURED: "⚠️ not measured"}
CONTROL = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # what XML 1.0 cannot hold


def write_gate_files(draft: Draft, rows: Sequence[Row], *, title: str, notes: Sequence[str] = ()) -> None:
    """Write gates.json, junit.xml and summary.md into an artifact."""
    draft.write_json("gates.json", [row.to_json() for row in rows])
    draft.write_text("junit.xml", junit(rows, title))
    draft.write_text("summary.md", markdown(rows, title, notes))


def junit(rows: Sequence[Row], title: str) -> str:
    """Return JUnit XML as GitLab and Jenkins read it.

    A failure is `<failure>`; "not measured" is `<error>`, never `<skipped>`, which dashboards show as harmless. Rows
    that cannot block (slices too small to matter) are no test cases; they are listed in `<system-out>`.
    """
    cases = [row for row in rows if row.required or row.result is not Result.NOT_MEASURED]
    failures = sum(row.result is Result.FAIL for row in cases)
    errors = sum(row.result is Result.NOT_MEASURED for row in cases)
    counts = {"tests": str(len(cases)), "failures": str(failures), "errors": str(errors), "skipped": "0"}
    root = ElementTree.Element("testsuites", {"name": _clean(title), **counts})
    suite = ElementTree.SubElement(root, "testsuite", {"name": _clean(title), **counts, "time": "0"})
    for row in cases:
        case = ElementTree.SubElement(suite, "testcase", {"classname": "fmdeploy.check", "name": _clean(row.title),
                                                          "time": "0"})
        if row.result is not Result.PASS:
            tag = "failure" if row.result is Result.FAIL else "error"
            text = _clean(f"{row.result.value}: {row.reason}")
            ElementTree.SubElement(case, tag, {"message": text, "type": tag}).text = _clean(_numbers(row))
    rest = [f"{row.title}: {row.result.value}, {row.reason}" for row in rows if row not in cases]
    ElementTree.SubElement(suite, "system-out").text = _clean("\n".join(rest))
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def markdown(rows: Sequence[Row], title: str, notes: Sequence[str] = ()) -> str:
    """Return the table for a job summary: what blocks first."""
    verdict = "passed" if gates_pass(rows) else "did not pass"
    lines = [f"## {title}: {verdict}", "", *(f"- {note}" for note in notes), ""]
    lines += ["| gate | result | value | limit | interval | samples | why |",
              "|---|---|---:|---:|---|---:|---|"]
    for row in sorted(rows, key=lambda row: (not row.blocks, row.result is Result.PASS)):
        mark = MARKS[row.result] if row.required else f"{row.result.value} (too small to block)"
        cells = (row.title, mark, _show(row.value, row), _show(row.limit, row), _interval(row),
                 "" if row.n_samples is None else str(row.n_samples), row.reason)
        lines.append("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def text_lines(rows: Sequence[Row]) -> list[str]:
    """Return one line a row for a terminal; slices that passed are counted, not listed."""
    shown = [row for row in rows if row.slice is None or row.result is not Result.PASS]
    lines = [f"{row.result.value:>12}  {row.title}: {_numbers(row)}{f' ({row.reason})' if row.reason else ''}"
             for row in shown]
    hidden = len(rows) - len(shown)
    return lines + ([f"{'pass':>12}  {hidden} slices"] if hidden else [])


def _numbers(row: Row) -> str:
    interval = _interval(row)
    text = f"value {_show(row.value, row)}, limit {_show(row.limit, row)}"
    return f"{text}, interval {interval}" if interval else text


def _interval(row: Row) -> str:
    return "" if row.interval is None else f"[{_show(row.interval[0], row)}, {_show(row.interval[1], row)}]"


def _show(value: float | None, row: Row) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.2f} %" if row.unit == "1" else f"{value:.4g} {row.unit}"


def _clean(text: str) -> str:
    return CONTROL.sub("?", text)
