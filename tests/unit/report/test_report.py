"""The page: complete, self-contained, honest about what is missing, and the same for the same artifacts."""

from __future__ import annotations

import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from fmdeploy.artifact import Artifact, open_artifact
from fmdeploy.cli import main
from fmdeploy.data.format import open_dataset
from fmdeploy.draft import Draft
from fmdeploy.errors import ArtifactError, ConfigError
from fmdeploy.evaluate.gates import Result
from fmdeploy.evaluate.report import report
from fmdeploy.manifest import Kind
from fmdeploy.task import load_task
from support.report_artifacts import dataset, make, network, pipeline, write_model

Parts = dict[str, Artifact]
VOID = {"meta", "img", "br", "path", "use", "rect", "circle", "line"}


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """One artifact of each kind."""
    return pipeline(tmp_path_factory.mktemp("pipeline"))


def write(parts: Parts, out: Path, *names: str) -> str:
    chosen = [str(parts[name].root) for name in (names or tuple(parts))]
    report(artifacts=chosen, out=str(out), title="A <test> & more")
    return out.read_text(encoding="utf-8")


class Page(HTMLParser):
    """Checks nesting and collects ids, links, sources and images."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.ids: list[str] = []
        self.targets: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if values.get("id"):
            self.ids.append(str(values["id"]))
        self.targets += [str(values[k]) for k in ("href", "src", "xlink:href") if values.get(k)]
        if tag == "img":
            self.images.append(values)
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.stack.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.stack.pop() == tag, tag


def test_page_is_complete_well_formed_and_loads_nothing(parts: Parts, tmp_path: Path) -> None:
    text = write(parts, tmp_path / "report.html")
    page = Page(text)
    assert page.stack == []
    assert len(page.ids) == len(set(page.ids)), "ids of inlined figures collide"
    for target in page.targets:
        assert target.startswith(("#", "data:image/png;base64,")), target
        assert not target.startswith("#") or target[1:] in page.ids, target
    assert "@import" not in text
    assert not re.search(r"url\((?!#)", text)
    assert "Not given" not in text
    assert len(text.encode()) < 3 * 2**20


def test_every_picture_has_words(parts: Parts, tmp_path: Path) -> None:
    text = write(parts, tmp_path / "report.html")
    images = Page(text).images
    assert len(images) >= 6 * 5
    assert all(image["alt"] for image in images)
    labels = re.findall(r'role="img" aria-label="([^"]+)"', text)
    assert len(labels) == text.count('<svg xmlns="http://www.w3.org/2000/svg"') == 7
    assert any("IoU" in label or "iou at t, +0.4s, +0.8s, +1.6s" in label for label in labels)


def test_same_artifacts_give_the_same_bytes(parts: Parts, tmp_path: Path) -> None:
    assert write(parts, tmp_path / "a.html") == write(parts, tmp_path / "b.html")


def test_the_share_of_a_training_that_waited_for_data_stands_by_its_curve(parts: Parts, tmp_path: Path) -> None:
    text = write(parts, tmp_path / "report.html")
    section = text[text.index('<section id="training">'):]
    section = section[: section.index("</section>")]
    assert section.count('<td class="n">200</td><td class="n">2.750</td><td class="n">3.71 %</td><td class="n">2</td>') == 3
    alone = write(parts, tmp_path / "check.html", "data", "check")
    assert "waited for data" not in alone


def test_user_text_is_escaped(parts: Parts, tmp_path: Path) -> None:
    text = write(parts, tmp_path / "report.html")
    assert "A &lt;test&gt; &amp; more" in text
    assert "<test>" not in text


def test_numbers_are_those_of_the_evaluations(parts: Parts, tmp_path: Path) -> None:
    from fmdeploy.evaluate.bootstrap import drop
    from fmdeploy.evaluate.evaluation import Evaluation

    text = html.unescape(write(parts, tmp_path / "report.html"))
    metric = load_task("bev-occupancy").metrics()[0]
    teacher, student = (Evaluation.load(parts[name], "evaluation") for name in ("teacher", "student"))
    assert f">{teacher.value(metric):.3f}<" in text
    kept = 1 - drop(teacher, student, metric).value
    assert f"keeps {100 * kept:.1f} %" in text
    assert "10 % of the training labels (57 of 570 samples)" in text
    for artifact in parts.values():
        assert artifact.digest in text


@pytest.mark.parametrize(("result", "word"), [(Result.PASS, "pass"), (Result.FAIL, "fail"),
                                              (Result.NOT_MEASURED, "not measured")])
def test_verdict_is_that_of_the_gates(tmp_path: Path, result: Result, word: str) -> None:
    parts = pipeline(tmp_path / "pipeline", gates=result)
    outcome = report(artifacts=[str(parts["check"].root)], out=str(tmp_path / "report.html"))
    assert outcome.data["verdict"] == word
    text = (tmp_path / "report.html").read_text()
    assert f'class="verdict {word.replace(" ", "-")}"' in text
    assert "does not block" in text, "the small slice must be named"


def test_each_missing_input_is_said_and_never_drawn_empty(parts: Parts, tmp_path: Path) -> None:
    text = write(parts, tmp_path / "report.html", "teacher")
    assert text.count("Not given:") >= 4
    assert 'class="verdict not-given"' in text
    for section in ("gates", "latency", "examples"):
        body = text[text.index(f'<section id="{section}">') :].split("</section>")[0]
        assert "Not given:" in body
        assert "<svg" not in body
    outcome = report(artifacts=[str(parts["data"].root)], out=str(tmp_path / "data.html"))
    assert any(line.startswith("  not given: latency") for line in outcome.lines)


def test_models_judged_on_other_samples_are_left_out(parts: Parts, tmp_path: Path) -> None:
    other = pipeline(tmp_path / "other")
    data = dataset(tmp_path / "more", sequences=30)
    student = network(tmp_path / "student", Kind.STUDENT, "student", data, None, 137_000)
    report(artifacts=[str(other["teacher"].root), str(student.root)], out=str(tmp_path / "r.html"))
    text = (tmp_path / "r.html").read_text()
    assert "student: judged on other samples than teacher" in text
    assert "keeps" not in text


def test_trivial_predictions_stand_beside_the_models(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fmdeploy.evaluate.evaluation import Evaluation
    from fmdeploy.evaluate.metrics import OccupancyIoU
    from fmdeploy.task import Arrays
    from fmdeploy.tasks.bev_occupancy import BevOccupancy

    def hits_stay(inputs: Arrays) -> Arrays:
        hit = inputs["lidar"][:, -2:-1] * 16 - 8
        return {"bev": np.repeat(hit, 5, axis=1), "scene": np.zeros((len(hit), 8), np.float32)}

    monkeypatch.setattr(BevOccupancy, "baselines", lambda self: {"copy lidar": hits_stay}, raising=False)
    text = write(parts, tmp_path / "report.html")
    samples = BevOccupancy().samples(open_dataset(parts["data"].root), "test")
    inputs, targets = samples.batch(np.arange(len(samples)))
    metric = OccupancyIoU()
    value = float(metric.value(metric.statistics(hits_stay(inputs), targets).sum(axis=0)))
    row = text[text.index('<th scope="row">copy lidar</th>') :].split("</tr>")[0]
    assert f">{value:.3f}<" in row
    assert "Read every number against the trivial predictions" in text
    student = Evaluation.load(parts["student"], "evaluation").value(metric)
    word = "beats" if student > value + 0.1 else "is not shown to beat"
    assert f"The student {word} the best trivial prediction, copy lidar" in text


def test_bundle_and_check_alone_still_compare_with_the_teacher(parts: Parts, tmp_path: Path) -> None:
    from fmdeploy.evaluate.evaluation import Evaluation

    def carry(draft: Draft) -> None:
        draft.write_json("metrics.json", {})
        for role in ("teacher", "student"):
            Evaluation.load(parts[role], "evaluation").save(draft, f"{role}_evaluation")

    bundle = make(tmp_path / "bundle", Kind.BUNDLE, {}, carry)
    report(artifacts=[str(bundle.root), str(parts["check"].root)], out=str(tmp_path / "r.html"))
    text = (tmp_path / "r.html").read_text()
    assert "The student keeps" in text
    assert "INT8 loses" in text


def test_artifacts_stay_untouched_and_take_no_report(parts: Parts, tmp_path: Path) -> None:
    write(parts, tmp_path / "report.html")
    with pytest.raises(ArtifactError, match="takes no further file"):
        write(parts, parts["bundle"].root / "report.html")
    with pytest.raises(ConfigError, match="is a folder"):
        write(parts, tmp_path)
    for artifact in parts.values():
        open_artifact(artifact.root)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_all_teachers_and_datasets_of_a_student_are_shown(parts: Parts, tmp_path: Path) -> None:
    """The one that the student carries as its best leads; the dataset that they were judged on is drawn from."""
    more = dataset(tmp_path / "more", sequences=30)
    second = network(tmp_path / "second", Kind.TEACHER, "student", parts["data"], None, 5_000_000)
    third = network(tmp_path / "third", Kind.TEACHER, "teacher", more, None, 3_000_000)

    def build(draft: Draft) -> None:
        draft.write_json("metrics.json", {"params": 137_000})
        for suffix in (".json", ".safetensors"):
            shutil.copyfile(second.path(f"evaluation{suffix}"), draft.path(f"teacher_evaluation{suffix}"))
        write_model(draft, load_task("bev-occupancy"), parts["data"], "student")

    student = make(tmp_path / "student", Kind.STUDENT,
                   {"data": parts["data"], "teacher0": parts["teacher"], "teacher1": second, "replay0": more}, build)
    given = [more, third, parts["teacher"], second, student, parts["data"]]
    report(artifacts=[str(each.root) for each in given], out=str(tmp_path / "r.html"))
    text = html.unescape((tmp_path / "r.html").read_text(encoding="utf-8"))
    for name in ("teacher second", "teacher teacher"):
        assert f'<th scope="row">{name}</th>' in text
    assert "of the teacher second's" in text
    assert "teacher third: judged on other samples than teacher second" in text
    for data in ("data", "more"):
        assert f'<th scope="row">{data}: train</th>' in text
    assert "1/36.5" in text  # of the leading teacher's parameters


def test_ancestors_that_were_not_given_are_named(parts: Parts, tmp_path: Path) -> None:
    text = write(parts, tmp_path / "r.html", "student")
    for name in ("data", "teacher"):
        digest = parts[name].digest
        row = text[text.index(f'title="{digest}"') - 200 : text.index(f'title="{digest}"')]
        assert "not given" in row, name


def test_the_teacher_is_judged_on_the_students_samples_where_the_student_knows_that(
    parts: Parts, tmp_path: Path
) -> None:
    more = dataset(tmp_path / "more", sequences=30)

    def build(draft: Draft) -> None:
        draft.write_json("metrics.json", {"params": 137_000})
        write_model(draft, load_task("bev-occupancy"), more, "student")
        write_model(draft, load_task("bev-occupancy"), more, "teacher", "-of-teacher")
        for suffix in (".json", ".safetensors"):
            draft.path(f"evaluation-of-teacher{suffix}").rename(draft.path(f"teacher_evaluation{suffix}"))

    student = make(tmp_path / "student", Kind.STUDENT, {"data": more, "teacher": parts["teacher"]}, build)
    report(artifacts=[str(each.root) for each in (parts["data"], parts["teacher"], more, student)],
           out=str(tmp_path / "r.html"))
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "The student keeps" in text
    assert "judged on other samples" not in text


def test_two_bundles_are_refused(parts: Parts, tmp_path: Path) -> None:
    second = make(tmp_path / "second", Kind.BUNDLE, {}, lambda draft: draft.write_json("metrics.json", {}))
    with pytest.raises(ArtifactError, match="speaks of one BUNDLE"):
        report(artifacts=[str(parts["bundle"].root), str(second.root)], out=str(tmp_path / "r.html"))


def test_command_line(parts: Parts, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "deep" / "report.html"
    with pytest.raises(SystemExit) as stop:
        main(["report", str(parts["check"].root), str(parts["bundle"].root), "--out", str(out), "--json"])
    assert stop.value.code == 0
    assert json.loads(capsys.readouterr().out)["verdict"] == "pass"
    with pytest.raises(SystemExit) as stop:
        main(["report", "--out", str(out)])
    assert stop.value.code == 2
