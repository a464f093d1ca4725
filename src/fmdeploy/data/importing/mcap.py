"""MCAP logs: chosen topics, decoded message by message, sampled at a steady rate.

A topic is decoded by its message encoding: `json` here; `ros1`, `cdr` (ROS 2) and `protobuf` by the decoders of the
packages mcap-ros1-support, mcap-ros2-support and mcap-protobuf-support where they are installed.

At each frame an array holds the newest message at or before it ("zero-order hold"), so nothing looks into the future; a
frame for which some topic has none yet, or none younger than `max_age_s`, is left out, and a gap ends the drive.

Legend: T frames.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import functools
import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fmdeploy.arrays import Array
from fmdeploy.data.importing.drives import Drive, reason_of, safe_id
from fmdeploy.data.importing.pictures import decode_image
from fmdeploy.errors import ConfigError, DataError, FmdeployError
from fmdeploy.optional import require

DECODERS = {"ros1": "mcap_ros1.decoder", "cdr": "mcap_ros2.decoder", "protobuf": "mcap_protobuf.decoder"}
NS = 1_000_000_000
TIME = "time_ns"
LARGEST = float(np.finfo(np.float32).max)
MAX_FRAMES = 20_000_000  # of one log: 46 days at 5 a second


class Topic(NamedTuple):
    """`NAME=/topic:field.path`: an array from one field of a topic's messages."""

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
        topic, colon, field = rest.rpartition(":")
        if not (name.isidentifier() and equal and topic and colon and field):
            raise ConfigError("is no topic", where=f"topic {text!r}",
                              expected="NAME=/topic:field, such as speed=/odom:twist.x")
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
    """

    topics: tuple[Topic, ...]
    rate_hz: float
    max_age_s: float
    size: tuple[int, int] | None
    channels: int


def mcap_drives(path: Path, rules: Rules, name: str) -> Iterator[Drive]:
    """Drives of one log, each `<name>-<number>`, with an array a topic and `time_ns` int64 (T,).

    Args:
        path: The log.
        rules: How messages become frames.
        name: Of the recording; logs of different folders may share a file name.

    Raises:
        DataError: the log is damaged, lacks a topic or a field, or a field is no number, list or image.
        MissingDependencyError: a topic needs a decoder that is not installed.
    """
    series = _read(path, rules)
    decode = functools.partial(_array, rules=rules)
    missing = [topic.topic for topic in rules.topics if not series[topic.name].times]
    if missing:
        raise DataError(f"has no messages of the topic {missing[0]}", where=path)
    metadata = _metadata(path)
    for number, times in enumerate(_stretches(series, rules, path)):
        arrays = {name: each.at(times, decode, path) for name, each in series.items()}
        yield Drive(safe_id(f"{name}-{number:03d}"), {**arrays, TIME: times},
                    {"recording": name, "date": clock(times[0])[:10], "frames_per_second": rules.rate_hz, **metadata})


@dataclass
class Series:
    """The values of one topic over time, as they were logged: an image takes twenty times as much once decoded."""

    topic: Topic
    times: list[int]
    values: list[Any]

    def newest(self, times: Array) -> Array:
        """Number of the newest message at or before each time; -1 where there is none."""
        return np.asarray(np.searchsorted(np.array(self.times), times, side="right") - 1)

    def at(self, times: Array, decode: Callable[..., Array], path: Path) -> Array:
        """The values (T, ...) at those messages, each decoded once.

        Raises:
            DataError: messages of one topic have different shapes, or cannot be decoded.
        """
        newest = self.newest(times).tolist()
        where = f"{path}: {self.topic.topic}:{self.topic.field} at "
        arrays = {k: decode(self.values[k], where=where + clock(self.times[k])) for k in dict.fromkeys(newest)}
        found = [arrays[k] for k in newest]
        if len({value.shape for value in found}) > 1:
            raise DataError(f"messages of {self.topic.name} have different shapes", where="topic",
                            found=" and ".join(sorted({str(value.shape) for value in found})[:2]))
        return np.stack(found)


def clock(time_ns: int) -> str:
    """Nanoseconds since 1970 as UTC, such as `2026-03-31T00:00:01.250000Z`."""
    moment = datetime.datetime(1970, 1, 1) + datetime.timedelta(microseconds=int(time_ns) // 1000)
    return moment.isoformat(timespec="microseconds") + "Z"


def _read(path: Path, rules: Rules) -> dict[str, Series]:
    series = {topic.name: Series(topic, [], []) for topic in rules.topics}
    wanted = {topic.topic: [t for t in rules.topics if t.topic == topic.topic] for topic in rules.topics}
    reader = require("mcap.reader")
    try:
        with path.open("rb") as stream:
            made = reader.make_reader(stream, validate_crcs=True)
            for schema, channel, message in made.iter_messages(topics=list(wanted)):
                content = _decode(channel.message_encoding, schema, message.data, f"{path}: {channel.topic}")
                for topic in wanted[channel.topic]:
                    series[topic.name].times.append(message.log_time)
                    series[topic.name].values.append(_value(content, topic, path))
    except FmdeployError:
        raise
    except Exception as error:  # of mcap, struct, lz4 and zstandard alike: damage shows wherever it is met first
        raise DataError(f"cannot be read as an MCAP log: {reason_of(error)}", where=path) from error
    return series


def _decode(encoding: str, schema: Any, content: bytes, where: str) -> Any:
    """A message as nested dictionaries, lists or objects with attributes."""
    if encoding == "json":
        try:
            return json.loads(content)
        except ValueError as error:
            raise DataError(f"a message is not JSON: {error}", where=where) from error
    if encoding not in DECODERS:
        raise DataError("messages have an encoding that cannot be decoded", where=where, found=encoding,
                        expected=", ".join(("json", *DECODERS)))
    require(DECODERS[encoding].partition(".")[0])
    decoder = importlib.import_module(DECODERS[encoding]).DecoderFactory().decoder_for(encoding, schema)
    if decoder is None:
        raise DataError("messages have a schema that cannot be decoded", where=where,
                        found=getattr(schema, "name", "none"))
    return decoder(content)


def _value(content: Any, topic: Topic, path: Path) -> Any:
    where = f"{path}: {topic.topic}"
    value = content
    for part in topic.field.split("."):
        found = value.get(part) if isinstance(value, Mapping) else getattr(value, part, None)
        if found is None and isinstance(value, Sequence) and part.isdecimal() and int(part) < len(value):
            found = value[int(part)]
        if found is None:
            raise DataError(f"messages have no field {topic.field!r}", where=where, found=_fields(value))
        value = found
    return value


def _array(value: Any, rules: Rules, where: str) -> Array:
    """Numbers and lists of numbers as float32; bytes, or text in base64, as an image."""
    if isinstance(value, str):
        try:
            value = base64.b64decode(value, validate=True)
        except binascii.Error as error:
            raise DataError("a field is text, neither number, list nor image in base64", where=where,
                            found=repr(value)[:40]) from error
    if isinstance(value, (bytes, bytearray, memoryview)):
        return decode_image(bytes(value), rules.size, rules.channels, where=where)
    try:
        found = np.asarray(value, np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise DataError("a field is no number and no list of numbers", where=where, found=repr(value)[:40]) from error
    if (odd := found[~(np.abs(found) <= LARGEST)]).size:
        raise DataError("a field holds a number that is not finite in float32", where=where, found=f"{odd[0]:g}",
                        fix="Import another field, or the log without such messages")
    return found.astype(np.float32)


def _fields(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, Mapping) else type(value).__name__


def _stretches(series: Mapping[str, Series], rules: Rules, path: Path) -> Iterator[Array]:
    """Times (T,) in ns of frames without a gap, one array a drive."""
    start = max(each.times[0] for each in series.values())
    end = max(each.times[-1] for each in series.values())
    step = NS / rules.rate_hz
    if (end - start) / step > MAX_FRAMES:
        raise DataError("spans too long a time", where=path, expected=f"at most {MAX_FRAMES} frames",
                        found=f"{(end - start) / NS:.0f} s", fix="Look for a wrong clock, or lower --rate-hz")
    # The sum in whole numbers: nanoseconds since 1970 do not fit the 53 bits of a float64.
    time_T = start + np.round(np.arange(int((end - start) / step) + 1) * step).astype(np.int64)
    fresh_T = np.ones(len(time_T), bool)
    for each in series.values():
        age_T = time_T - np.array(each.times)[each.newest(time_T)]
        fresh_T &= age_T <= rules.max_age_s * NS
    edges = np.flatnonzero(np.diff(np.concatenate([[0], fresh_T.astype(np.int8), [0]])))
    for first, last in edges.reshape(-1, 2):
        yield time_T[first:last]


def _metadata(path: Path) -> dict[str, Any]:
    """What the log's metadata records say: later records win."""
    with path.open("rb") as stream:
        found: dict[str, Any] = {}
        for record in require("mcap.reader").make_reader(stream).iter_metadata():
            found |= dict(record.metadata)
    return found


