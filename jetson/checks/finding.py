"""What a check has to say, and the machine that it looks at."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from fmdeploy.jetson.machine import PACKAGES, board_model, is_jetson, l4t_release
from fmdeploy.jetson.reading import children, read_text

MAX_STATUS_BYTES = 1 << 26
LIBRARIES = ("usr/lib/*-linux-gnu", "usr/lib/*-linux-gnu/tegra", "usr/lib/*-linux-gnu/nvidia", "usr/lib",
             "usr/local/cuda/lib64", "usr/local/cuda/compat", "usr/local/lib", "usr/lib/wsl/lib")
Version = tuple[int, ...]


class Severity(str, Enum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Diagnosis:
    """One line of the doctor.

    Attributes:
        check: Name of the check.
        severity: How bad it is.
        what: What was found, in one sentence.
        expected: What should be there; empty where nothing in particular should.
        found: What is there.
        fix: What to do; empty where there is nothing to do.
    """

    check: str
    severity: Severity
    what: str
    expected: str = ""
    found: str = ""
    fix: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {**asdict(self), "severity": self.severity.value}


class User(NamedTuple):
    """Who would run the runtime."""

    uid: int
    groups: frozenset[int]

    @staticmethod
    def this() -> User:
        """The user of this process."""
        return User(os.geteuid(), frozenset({os.getegid(), *os.getgroups()}))


@dataclass(frozen=True)
class Site:
    """One machine, real or below a folder.

    Attributes:
        root: Folder below which everything is read.
        user: Who would run the runtime.
    """

    root: Path = Path("/")
    user: User = field(default_factory=User.this)

    @property
    def here(self) -> bool:
        """Whether this is the machine that the doctor runs on; another one's Python cannot be asked."""
        return self.root.resolve() == Path("/")

    @functools.cached_property
    def jetson(self) -> bool:
        """Whether it is a Jetson."""
        return is_jetson(self.root)

    @functools.cached_property
    def l4t(self) -> str | None:
        """Release of Jetson Linux."""
        return l4t_release(self.root)

    @functools.cached_property
    def board(self) -> str | None:
        """Name of the board."""
        return board_model(self.root)

    @functools.cached_property
    def container(self) -> bool:
        """Whether this is the inside of a container."""
        marks = ("run/.containerenv", ".dockerenv")
        groups = read_text(self.root / "proc/1/cgroup") or ""
        return any((self.root / mark).exists() for mark in marks) or "docker" in groups or "kubepods" in groups

    @functools.cached_property
    def packages(self) -> dict[str, str]:
        """Installed Debian packages, name to version."""
        found = {}
        for block in re.split(r"\n\s*\n", read_text(self.root / PACKAGES, MAX_STATUS_BYTES) or ""):
            fields = dict(re.findall(r"^(Package|Version|Status): (.+)$", block, re.MULTILINE))
            if "Package" in fields and "Version" in fields and fields.get("Status", "installed").endswith("installed"):
                found[fields["Package"]] = fields["Version"]
        return found

    def package(self, pattern: str) -> tuple[str, str] | None:
        """Return the first installed package whose whole name matches, with its version."""
        return next(((name, version) for name, version in sorted(self.packages.items())
                     if re.fullmatch(pattern, name)), None)

    def library(self, pattern: str) -> Path | None:
        """Return the first shared library below the usual folders that matches a glob."""
        for folder in LIBRARIES:
            for place in children(self.root, folder):
                if found := children(place, pattern):
                    return found[-1]
        return None


Check = Callable[[Site], list[Diagnosis]]


def version_of(text: str | None) -> Version:
    """Return the leading numbers of a version, such as (10, 3, 0, 26) of `10.3.0.26-1+cuda12.5`; () for none."""
    found = re.match(r"(?:\d+:)?(\d{1,9}(?:\.\d{1,9})*)", text or "")
    return tuple(int(part) for part in found[1].split(".")) if found else ()
