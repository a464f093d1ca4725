"""Boards made of files: /proc, /sys, package lists and the tools of a Jetson below a folder, as published captures show them."""

from __future__ import annotations

import os
from pathlib import Path

GIB_KIB = 1 << 20
NANO_LINE = ("12-23-2024 22:54:11 RAM 3162/7620MB (lfb 4x2MB) SWAP 0/3810MB (cached 0MB) CPU [1%@729,0%@729,0%@729,0%@729,0%@729,0%@729] "
             "EMC_FREQ 3%@2133 GR3D_FREQ 1%@[306] VIC off cpu@52.8C soc0@50.6C gpu@51.6C tj@52.8C VDD_IN 3913mW/3922mW VDD_SOC 1238mW/1237mW")
NANO_MODES = {0: ("15W", 6), 1: ("25W", 6), 2: ("MAXN_SUPER", 6), 3: ("7W", 4)}
AGX_MODES = {0: ("MAXN", 12), 1: ("15W", 4), 2: ("30W", 8), 3: ("50W", 12)}


class FakeBoard:
    """A folder that is filled step by step."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, text: str | bytes) -> Path:
        """Write one file, at once: a reader sees the old content or the new one."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_name(f".{path.name}.new")
        fresh.write_bytes(text if isinstance(text, bytes) else text.encode())
        os.replace(fresh, path)
        return path

    def program(self, name: str, script: str, folder: str = "usr/bin") -> Path:
        """Write a shell script that answers for a tool."""
        path = self.write(f"{folder}/{name}", f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    def release(self, major: int, revision: str) -> None:
        self.write("etc/nv_tegra_release", f"# R{major} (release), REVISION: {revision}, GCID: 41062509, BOARD: generic, "
                                           "EABI: aarch64, DATE: Mon Jun 16 16:07:13 UTC 2025\n")

    def packages(self, **versions: str) -> None:
        """Debian packages; `_` in a name stands for `-`, `__` for `.`."""
        blocks = [f"Package: {name.replace('__', '.').replace('_', '-')}\nStatus: install ok installed\nArchitecture: arm64\nVersion: {version}\n"
                  for name, version in versions.items()]
        self.write("var/lib/dpkg/status", "\n".join(blocks))

    def memory(self, total_mib: int = 7620, available_mib: int = 4400, nvmap_mib: int | None = 120, swap_free_mib: int = 3810,
               swap_ins: int = 0) -> None:
        lines = [f"MemTotal:       {total_mib * 1024} kB", "MemFree:          200000 kB", f"MemAvailable:   {available_mib * 1024} kB",
                 "SwapTotal:       3901440 kB", f"SwapFree:        {swap_free_mib * 1024} kB"]
        lines += [] if nvmap_mib is None else [f"NvMapMemFree:          0 kB\nNvMapMemUsed:   {nvmap_mib * 1024} kB"]
        self.write("proc/meminfo", "\n".join(lines) + "\n")
        self.write("proc/vmstat", f"nr_free_pages 50000\npswpin {swap_ins}\npswpout 0\n")

    def zone(self, number: int, name: str, celsius: float | str, trips: tuple[tuple[str, float], ...] = ()) -> None:
        folder = f"sys/class/thermal/thermal_zone{number}"
        self.write(f"{folder}/type", f"{name}\n")
        self.write(f"{folder}/temp", f"{celsius if isinstance(celsius, str) else round(celsius * 1000)}\n")
        for at, (kind, limit) in enumerate(trips):
            self.write(f"{folder}/trip_point_{at}_type", f"{kind}\n")
            self.write(f"{folder}/trip_point_{at}_temp", f"{round(limit * 1000)}\n")

    def tj(self, celsius: float) -> None:
        """The zone that decides, with the trips of an Orin Nano."""
        self.zone(8, "tj-thermal", celsius, (("active", 35.0), ("active", 74.0), ("passive", 95.0), ("critical", 104.5)))

    def cooling(self, number: int, name: str, state: int) -> None:
        self.write(f"sys/class/thermal/cooling_device{number}/type", f"{name}\n")
        self.write(f"sys/class/thermal/cooling_device{number}/cur_state", f"{state}\n")

    def over_current(self, oc1: int = 0, oc2: int = 0, oc3: int = 0) -> None:
        self.write("sys/class/hwmon/hwmon0/name", "tmp451\n")
        self.write("sys/class/hwmon/hwmon3/name", "soctherm_oc\n")
        for name, count in (("oc1", oc1), ("oc2", oc2), ("oc3", oc3)):
            self.write(f"sys/class/hwmon/hwmon3/{name}_event_cnt", f"{count}\n")
            self.write(f"sys/class/hwmon/hwmon3/{name}_throt_en", "1\n")

    def cpus(self, count: int, online: int, khz: int = 1_728_000, low: int = 729_600, high: int = 1_728_000) -> None:
        for core in range(count):
            folder = f"sys/devices/system/cpu/cpu{core}"
            self.write(f"{folder}/online", f"{int(core < online)}\n")
            if core < online:
                self.write(f"{folder}/cpufreq/scaling_cur_freq", f"{khz}\n")
                self.write(f"{folder}/cpufreq/scaling_min_freq", f"{low}\n")
                self.write(f"{folder}/cpufreq/scaling_max_freq", f"{high}\n")

    def gpu(self, hz: int = 612_000_000, low: int = 306_000_000, high: int = 918_000_000, load: int = 130) -> None:
        folder = "sys/class/devfreq/17000000.gpu"
        for name, value in (("cur_freq", hz), ("min_freq", low), ("max_freq", high), ("device/load", load)):
            self.write(f"{folder}/{name}", f"{value}\n")

    def power(self, number: int, table: dict[int, tuple[str, int]], cores: int) -> None:
        """Mode `number` is set; `nvpmodel -q` and the status file agree on it."""
        text = "< PARAM TYPE=FILE NAME=CPU_ONLINE >\nCORE_0 /sys/devices/system/cpu/cpu0/online\n\n"
        for key, (name, online) in table.items():
            text += f"< POWER_MODEL ID={key} NAME={name} >\n"
            text += "".join(f"CPU_ONLINE CORE_{core} {int(core < online)}\n" for core in range(cores)) + "GPU MAX_FREQ 918000000\n\n"
        self.write("etc/nvpmodel.conf", text + "< PM_CONFIG DEFAULT=1 >\n")
        self.status(number)
        self.query(table[number][0], number)

    def status(self, number: int) -> None:
        self.write("var/lib/nvpmodel/status", f"pmode:{number:04d}\n")

    def query(self, name: str, number: int) -> None:
        """What `nvpmodel -q` answers."""
        self.program("nvpmodel", f"[ \"$1\" = -q ] && printf 'NV Power Mode: {name}\\n{number}\\n'", folder="usr/sbin")

    def tegrastats(self, line: str) -> None:
        self.program("tegrastats", f"while :; do echo '{line}'; sleep 0.1; done")

    def libraries(self, *names: str) -> None:
        for name in names:
            self.write(f"usr/lib/aarch64-linux-gnu/{name}", b"\x7fELF")

    def python(self, version: str, **wheels: str) -> None:
        self.write(f"usr/bin/python{version}", b"")
        for name, number in wheels.items():
            self.write(f"usr/local/lib/python{version}/dist-packages/{name}-{number}.dist-info/METADATA", "")


def orin_nano_jp62(root: Path) -> FakeBoard:
    """Orin Nano 8 GB, JetPack 6.2.1, 25 W, all well."""
    board = FakeBoard(root)
    board.write("proc/sys/kernel/osrelease", "5.15.148-tegra\n")
    board.write("proc/device-tree/model", "NVIDIA Jetson Orin Nano Developer Kit\0")
    board.release(36, "4.4")
    l4t = "36.4.4-20250616085344"
    board.packages(nvidia_l4t_core=l4t, nvidia_l4t_cuda=l4t, nvidia_l4t_kernel=f"5.15.148-tegra-{l4t}",
                   libnvinfer10="10.3.0.26-1+cuda12.5", cuda_cudart_12_6="12.6.68-1", docker_ce="5:27.5.1-1~ubuntu.22.04~jammy")
    board.libraries("nvidia/libcuda.so.1", "nvidia/libnvdla_compiler.so", "libnvinfer.so.10.3.0")
    board.write("dev/nvmap", b"")
    board.python("3.10", onnxruntime="1.23.2")
    board.memory()
    board.zone(0, "cpu-thermal", 51.5, (("passive", 95.0),))
    board.zone(1, "cv0-thermal", "-256000")
    board.zone(2, "cv1-thermal", 0.0)
    board.tj(52.8)
    board.cooling(0, "pwm-fan", 3)
    board.cooling(1, "cpufreq-cpu0", 0)
    board.cooling(2, "gpu-throttle-alert", 0)
    board.over_current()
    board.cpus(6, 6)
    board.gpu()
    board.power(1, NANO_MODES, 6)
    board.tegrastats(NANO_LINE)
    board.program("jetson_clocks", "printf 'SOC family:tegra234\\ncpu0: Online=1 Governor=schedutil MinFreq=729600 MaxFreq=1728000 CurrentFreq=1728000 "
                                   "IdleStates: WFI=1 c7=1\\nGPU MinFreq=306000000 MaxFreq=918000000 CurrentFreq=306000000\\n"
                                   "EMC MinFreq=204000000 MaxFreq=3199000000 CurrentFreq=665600000 FreqOverride=0\\nNV Power Mode: 25W\\n'")
    return board


def agx_orin_jp72(root: Path) -> FakeBoard:
    """AGX Orin 64 GB, JetPack 7.2, SBSA userspace, MAXN."""
    board = orin_nano_jp62(root)
    board.write("proc/sys/kernel/osrelease", "6.8.12-1021-tegra\n")
    board.write("proc/device-tree/model", "NVIDIA Jetson AGX Orin Developer Kit\0")
    board.release(39, "2.0")
    l4t = "39.2.0-20260601092848"
    board.packages(nvidia_l4t_core=l4t, nvidia_l4t_cuda=l4t, libnvinfer10="10.16.2.10-1+cuda13.2", cuda_cudart_13_2="13.2.86-1",
                   docker_ce="5:29.1.0-1~ubuntu.24.04~noble")
    board.write("lib/modules/6.8.12-1021-tegra/modules.dep", "kernel/net/ipv4/netfilter/iptable_raw.ko: \n")
    board.libraries("libnvinfer_builder_resource_sm87.so.10.16.2", "libnvinfer_builder_resource_sm110.so.10.16.2")
    board.python("3.12", onnxruntime="1.31.1")
    (board.root / "usr/bin/python3.10").unlink()
    for old in (board.root / "usr/local/lib/python3.10/dist-packages").glob("*.dist-info"):
        (old / "METADATA").unlink()
        old.rmdir()
    board.memory(total_mib=62817, available_mib=51000, nvmap_mib=800)
    board.cpus(12, 12)
    board.power(0, AGX_MODES, 12)
    return board


def bare_container(root: Path) -> FakeBoard:
    """A container on an Orin that was started without --runtime nvidia and without mounts: the kernel alone tells."""
    board = FakeBoard(root)
    board.write(".dockerenv", "")
    board.write("proc/sys/kernel/osrelease", "5.15.148-tegra\n")
    board.libraries("libnvinfer.so.10.3.0")
    board.python("3.10", onnxruntime="1.23.2")
    board.memory()
    return board


def throttling_board(root: Path) -> FakeBoard:
    """An Orin Nano that is too hot and counts over-current events."""
    board = orin_nano_jp62(root)
    board.tj(96.5)
    board.cooling(2, "gpu-throttle-alert", 1)
    board.over_current(oc3=27390)
    return board


def mixed_packages(root: Path) -> FakeBoard:
    """Half of an upgrade: three packages of 36.4.7 among those of 36.4.4."""
    board = orin_nano_jp62(root)
    new = "36.4.7-20250918154033"
    board.packages(nvidia_l4t_core="36.4.4-20250616085344", nvidia_l4t_cuda="36.4.4-20250616085344", nvidia_l4t_init=new,
                   nvidia_l4t_firmware=new, nvidia_l4t_tools="36.4.4-20250616085344", libnvinfer10="10.3.0.26-1+cuda12.5")
    return board


def pc(root: Path) -> FakeBoard:
    """A workstation: no Tegra anywhere."""
    board = FakeBoard(root)
    board.write("proc/sys/kernel/osrelease", "6.8.0-45-generic\n")
    board.memory(total_mib=31000, available_mib=20000, nvmap_mib=None)
    board.zone(0, "x86_pkg_temp", 48.0, (("passive", 100.0),))
    board.cpus(4, 4)
    board.write("sys/devices/system/cpu/cpu0/thermal_throttle/core_throttle_count", "7\n")
    board.python("3.11", onnxruntime="1.31.1")
    return board
