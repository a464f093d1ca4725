"""docs/runtime.md says what the tables say, and its example runs. Rewrite the tables with --update-golden."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fmdeploy.runtime.frame import Frame, Reason
from fmdeploy.runtime.state import EventKind, Mode, Policy, State
from fmdeploy.runtime.state.deadlines import Timing, chain, worst
from fmdeploy.runtime.state.picture import deadlines, ladder, picture, transitions
from support.runtimes import frame, toy_bundle

EXAMPLE = Timing(period_ms=100, deadline_ms=80, run_ms=20, hard_deadline_ms=400)
EXAMPLE_POLICY = Policy(input_timeout_ms=250)
PARTS: dict[str, Callable[[], str]] = {
    "picture": picture, "ladder": ladder, "transitions": transitions,
    "deadlines": lambda: deadlines(EXAMPLE, EXAMPLE_POLICY),
}


def marked(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)", re.DOTALL)


@pytest.mark.parametrize("name", PARTS)
def test_document_shows_the_tables(name: str, root: Path, update_golden: bool) -> None:
    file = root / "docs" / "runtime.md"
    text = file.read_text(encoding="utf-8")
    wanted = marked(name).sub(lambda found: f"{found[1]}{PARTS[name]()}\n{found[2]}", text)
    assert marked(name).search(text), f"docs/runtime.md has no place for {name}"
    if update_golden:
        file.write_text(wanted, encoding="utf-8")
        text = wanted
    assert text == wanted, "rewrite it with --update-golden"


def test_the_picture_has_every_state_and_every_edge() -> None:
    drawn = picture()
    for state in State:
        assert re.search(rf"\b{state.value} -->|--> {state.value}\b", drawn)
    assert "SAFE_OUTPUT --> LOADING: RESET" in drawn
    assert drawn.count("```") == 2


def test_document_names_every_mode_reason_and_counter(root: Path) -> None:
    from fmdeploy.runtime.publisher import COUNTERS

    text = (root / "docs" / "runtime.md").read_text(encoding="utf-8")
    for word in [*COUNTERS, *(mode.label for mode in Mode if mode), *(state.value for state in State),
                 Reason.LATE.value, EventKind.RESET.value]:
        assert word in text, word


def test_worst_cases_are_sums() -> None:
    links = {link.fault: link for link in chain(EXAMPLE, EXAMPLE_POLICY)}
    assert links["no input"].fdti_ms == 250 + 100
    assert links["backend raises"].fdti_ms == 3 * 100 + 20
    assert links["run that never returns"].fdti_ms == 400
    assert worst(tuple(links.values())) == max(link.fdti_ms + link.frti_ms for link in links.values()) == 1100
    embedded = chain(Timing(period_ms=100, deadline_ms=80, run_ms=20), Policy())
    assert {"no input", "run that never returns"}.isdisjoint(link.fault for link in embedded)


def test_example_of_the_document_runs(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (root / "docs" / "runtime.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 1
    (tmp_path / "bundle").symlink_to(toy_bundle(), target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    acted: list[float] = []
    refused: list[tuple[Any, ...]] = []

    def camera_and_lidar() -> Iterator[Any]:
        for number in range(3):
            yield frame(number)
        bad = frame(4)
        bad["lidar"][0, 0, 0] = 7
        yield bad

    exec(compile(blocks[0], "docs/runtime.md", "exec"), {
        "camera_and_lidar": camera_and_lidar, "act_on": lambda outputs, age_ms: acted.append(age_ms),
        "fall_back": lambda reasons, mode: refused.append(tuple(reasons)), "__name__": "example"})
    assert len(acted) + len(refused) >= 4
    assert refused[-1] == (Reason.OUT_OF_RANGE,)
    assert os.path.samefile("bundle", toy_bundle())


def test_every_field_of_a_frame_is_described(root: Path) -> None:
    text = (root / "docs" / "runtime.md").read_text(encoding="utf-8")
    for name in Frame.__dataclass_fields__:
        assert f"`{name}`" in text, name
