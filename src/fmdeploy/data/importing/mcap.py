"""MCAP logs: chosen topics, sampled at a steady rate, cut into drives.

At each frame an array holds the newest message at or before it ("zero-order hold"), so nothing looks into the future; a
frame for which some topic has none yet, or none younger than `max_age_s`, is left out, and a gap ends the drive. A log
is read once, in the order of its time: what is in memory at a time is one drive, and one message a topic.

Legend: T frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fmdeploy.arrays import Array, Arrays
from fmdeploy.data.importing.drives import Drive, safe_id
from fmdeploy.data.importing.mcap_clouds import Cloud, stack_clouds
from fmdeploy.data.importing.mcap_log import Message, clock, messages_of, metadata_of
from fmdeploy.data.importing.mcap_values import value_of
from fmdeploy.errors import ConfigError, DataError

NS = 1_000_000_000
TIME = "time_ns"
COUNT = "_count"
COLUMNS = "_columns"
MAX_FRAMES = 20_000_000  # of one log: 46 days at 5 a second


class Topic(NamedTuple):
    """`NAME=/topic:field.path`: an array from one field of a topic's messages; `NAME=/topic`: from all of them."""

    name: str
    topic: str
    field: str

    @classmethod
    def parse(cls, text: str) -> Topic:
        """From the command line.

        Raises:
            ConfigError: it is not of that form.
        """
        name, equal, rest = text.partition("=")
        topic, colon, field = rest.rpartition(":") if ":" in rest else (rest, "", "")
        if not (name.isidentifier() and equal and topic and bool(colon) == bool(field)):
            raise ConfigError("is no topic", where=f"topic {text!r}",
                              expected="NAME=/topic:field, such as speed=/odom:twist.x, or NAME=/topic")
        return cls(name, topic, field)


def parse_topics(texts: Sequence[str]) -> tuple[Topic, ...]:
    """All topics of the command line.

    Raises:
        ConfigError: one is not of the form, or two would be one array.
    """
    found = tuple(map(Topic.parse, texts))
    names = [TIME, *(topic.name for topic in found)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError("names an array twice", where="topic", found=twice[0], expected=f"names other than {TIME}")
    return found


@dataclass(frozen=True)
class Rules:
    """How messages become frames.

    Attributes:
        topics: What is read.
        rate_hz: Frames a second.
        max_age_s: Oldest message that a frame may show.
        size: (H, W) of images; None: as they are.
        channels: Of images.
        cloud_points: Points kept of a cloud; None: as many as the fullest cloud of the drive has.
        drive_s: Longest drive.
    """

    topics: tuple[Topic, ...]
    rate_hz: float
    max_age_s: float
    size: tuple[int, int] | None
    channels: int
    cloud_points: int | None = None
    drive_s: float = 60.0


class Moment(NamedTuple):
    """One frame: its number since the first one of the log, its time, and the newest message of each topic."""

    number: int
    time_ns: int
    newest: Mapping[str, Message]


class Grid:
    """The frames of a log, from the moment at which every topic has spoken."""

    def __init__(self, path: Path, start_ns: int, rules: Rules) -> None:
        self.path, self.start_ns = path, start_ns
        self.step, self.max_age_ns = NS / rules.rate_hz, rules.max_age_s * NS
        self._next = 0

    def time(self, number: int) -> int:
        """Of a frame, in ns; the sum in whole numbers: ns since 1970 do not fit the 53 bits of a float64."""
        return self.start_ns + round(number * self.step)

    def before(self, end_ns: int, newest: Mapping[str, Message]) -> Iterator[Moment]:
        """The next frames, as far as they come before `end_ns` and no message is too old for them.

        Raises:
            DataError: they are too many.
        """
        end = int((end_ns - self.start_ns) / self.step) + 2
        while end > 0 and self.time(end - 1) >= end_ns:
            end -= 1
        if end > MAX_FRAMES:
            raise DataError("spans too long a time", where=self.path, expected=f"at most {MAX_FRAMES} frames",
                            found=f"{(end_ns - self.start_ns) / NS:.0f} s",
                            fix="Look for a wrong clock, or lower --rate-hz")
        stale_ns = min(message.time_ns for message in newest.values()) + self.max_age_ns
        for number in range(self._next, end):
            if self.time(number) > stale_ns:
                break
            yield Moment(number, self.time(number), newest)
        self._next = max(end, self._next)


def mcap_drives(path: Path, rules: Rules, name: str) -> Iterator[Drive]:
    """Drives of one log, each `<name>-<number>`, with an array a topic and `time_ns` int64 (T,).

    Args:
        path: The log.
        rules: How messages become frames.
        name: Of the recording; logs of different folders may share a file name.

    Raises:
        DataError: the log is damaged, lacks a topic or a field, or a field is no number, list, image or point cloud.
        MissingDependencyError: a topic needs a decoder that is not installed.
    """
    said = metadata_of(path)
    for number, (moments, values) in enumerate(_stretches(path, rules)):
        time_T = np.array([moment.time_ns for moment in moments], np.int64)
        arrays, about = _stacked(values, rules, f"{path} from {clock(moments[0].time_ns)}")
        metadata = {"recording": name, "date": clock(moments[0].time_ns)[:10], "first_frame": moments[0].number,
                    "frames_per_second": rules.rate_hz, **about, **_position(arrays), **said}
        yield Drive(safe_id(f"{name}-{number:03d}"), {**arrays, TIME: time_T}, metadata)


Values = dict[str, list[Any]]


def _stretches(path: Path, rules: Rules) -> Iterator[tuple[list[Moment], Values]]:
    """Frames that follow each other, at most `drive_s` of them, with what each topic says at each."""
    moments: list[Moment] = []
    values: Values = {topic.name: [] for topic in rules.topics}
    longest = max(1, round(rules.drive_s * rules.rate_hz))
    for moment in _moments(path, rules):
        if moments and (moment.number != moments[-1].number + 1 or len(moments) == longest):
            yield moments, values
            moments, values = [], {topic.name: [] for topic in rules.topics}
        for topic in rules.topics:
            values[topic.name].append(_decoded(moment.newest[topic.topic], topic, rules))
        moments.append(moment._replace(newest={}))
    if moments:
        yield moments, values


def _moments(path: Path, rules: Rules) -> Iterator[Moment]:
    wanted = list(dict.fromkeys(topic.topic for topic in rules.topics))
    newest: dict[str, Message] = {}
    grid, last_ns = None, 0
    for message in messages_of(path, wanted):
        last_ns = message.time_ns
        if grid is not None:
            yield from grid.before(last_ns, newest)
        newest[message.topic] = message
        if grid is None and len(newest) == len(wanted):
            grid = Grid(path, last_ns, rules)
    if grid is None:
        missing = next(topic for topic in wanted if topic not in newest)
        raise DataError(f"has no messages of the topic {missing}", where=path)
    yield from grid.before(last_ns + 1, newest)


def _decoded(message: Message, topic: Topic, rules: Rules) -> Array | Cloud:
    """What a topic says in a message, made once however many frames show it."""
    if topic not in message.values:
        message.values[topic] = value_of(message.content, topic.field, rules.size, rules.channels,
                                         where=message.place(topic.field))
    found: Array | Cloud = message.values[topic]
    return found


def _stacked(values: Values, rules: Rules, where: str) -> tuple[Arrays, dict[str, Any]]:
    """Arrays (T, ...), and what the metadata says of them."""
    arrays: Arrays = {}
    about: dict[str, Any] = {}
    for name, found in values.items():
        cloud = isinstance(found[0], Cloud)
        if len(kinds := {value.columns if isinstance(value, Cloud) else value.shape for value in found}) > 1:
            raise DataError(f"messages of {name} have different {'columns' if cloud else 'shapes'}", where=where,
                            found=" and ".join(sorted(map(str, kinds))[:2]))
        if not cloud:
            arrays[name] = np.stack(found)
            continue
        if name + COUNT in values:
            raise DataError(f"{name + COUNT} is the number of points of {name}", where="topic",
                            fix="Name that topic otherwise")
        arrays[name], arrays[name + COUNT] = stack_clouds(found, rules.cloud_points)
        about[name + COLUMNS] = list(found[0].columns)
    return arrays, about


def _position(arrays: Arrays) -> dict[str, list[float]]:
    """Where the drive begins, where topics called latitude and longitude are read: `--by geography` goes by it."""
    found = [arrays.get(name) for name in ("latitude", "longitude")]
    if any(each is None or each.ndim != 1 for each in found):
        return {}
    return {"position": [round(float(each[0]), 6) for each in found if each is not None]}
