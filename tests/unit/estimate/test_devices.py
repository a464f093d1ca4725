"""Device files: every built-in one is valid, every fault is named in one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from fmdeploy.errors import ConfigError
from fmdeploy.estimate.devices import constants_of, device, device_file, device_names
from fmdeploy.estimate.tables import constants_toml, device_toml

WANTED = {"orin-agx-64", "orin-agx-32", "orin-nx-16", "orin-nx-8", "orin-nano-8", "orin-nano-super", "drive-orin-x"}
TOPS = {  # dense INT8 operations of the GPU: half of the published sparse ones
    ("orin-agx-64", "MAXN"): 85.5, ("orin-agx-64", "50W"): 54.5, ("orin-agx-64", "30W"): 20.5,
    ("orin-agx-64", "15W"): 7.0, ("orin-nano-super", "MAXN_SUPER"): 33.5, ("orin-nano-8", "15W"): 20.0}


def test_the_built_in_devices_are_there_and_valid() -> None:
    assert set(device_names()) >= WANTED
    for name in device_names():
        file = device_file(name)
        assert file.name == name
        for mode in file.mode:
            on = device(name, mode.name)
            assert on.peak["int8"] == 2 * on.peak["fp16"] == 4 * on.peak["fp32"]
            assert mode.source
            assert on.launch > 0


@pytest.mark.parametrize(("name", "mode"), TOPS)
def test_peaks_are_the_published_ones(name: str, mode: str) -> None:
    assert device(name, mode).peak["int8"] / 1e12 == pytest.approx(TOPS[name, mode], rel=0.03)


def test_unknown_devices_and_modes_list_near_names() -> None:
    with pytest.raises(ConfigError, match="unknown device 'orin-nanosuper', did you mean 'orin-nano-super'"):
        device("orin-nanosuper")
    with pytest.raises(ConfigError, match=r"orin-agx-64 has no power mode '60W', did you mean"):
        device("orin-agx-64", "60W")
    assert device("orin-agx-64", "maxn").mode == "MAXN"


def test_files_survive_writing(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    file = device_file("orin-agx-64").model_copy(update={"fit": constants_of("orin")})
    path.write_text(device_toml(file), encoding="utf-8")
    assert device_file(path) == file
    assert device(path, "30W").constants == constants_of("orin")
    assert constants_toml(constants_of("orin")) in (
        Path(__file__).parents[3] / "src" / "fmdeploy" / "estimate" / "fits" / "orin.toml").read_text(encoding="utf-8")


GOOD = """
name = "chip"
title = "A chip"
default_mode = "full"
fit = "orin"

[[mode]]
name = "full"
peak_gops = { fp32 = 1000, fp16 = 2000, int8 = 4000 }
dram_gb_s = 50
source = "its data sheet"
confidence = "datasheet"
"""


def test_a_device_may_give_peaks_instead_of_units(tmp_path: Path) -> None:
    path = tmp_path / "chip.toml"
    path.write_text(GOOD)
    chip = device(path)
    assert (chip.peak["int8"], chip.bandwidth, chip.clock_mhz) == (4e12, 50e9, None)
    assert chip.launch == pytest.approx(chip.constants.launch_us * 1e-6)


@pytest.mark.parametrize(("old", "new", "said"), [
    ('fit = "orin"', 'fit = "onir"', "unknown family of constants 'onir'"),
    ("dram_gb_s = 50", "dram_gb_s = -1", "greater than 0"),
    ("dram_gb_s = 50", "dram_gb_s = nan", "finite"),
    ("dram_gb_s = 50", "dram_gbs = 50", "did you mean|unknown key"),
    ('default_mode = "full"', 'default_mode = "half"', "none of the modes full"),
    ("peak_gops = { fp32 = 1000, fp16 = 2000, int8 = 4000 }\n", "", "either matrix_units and clock_mhz, or peak_gops"),
    ("peak_gops = { fp32 = 1000, fp16 = 2000, int8 = 4000 }", "matrix_units = 4\nclock_mhz = 900", r"\[operations\]"),
    ('confidence = "datasheet"', 'confidence = "sure"', "confidence"),
    ("[[mode]]", "[[mode]", "is not TOML"),
    ('fit = "orin"', "", "'fit' is required"),
])
def test_faults_of_a_device_file_are_named(tmp_path: Path, old: str, new: str, said: str) -> None:
    path = tmp_path / "chip.toml"
    assert old in GOOD
    path.write_text(GOOD.replace(old, new))
    with pytest.raises(ConfigError, match=said) as caught:
        device(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml"):
        device(tmp_path / "none.toml")
