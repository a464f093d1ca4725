"""Messages of an MCAP log, each decoded only if it is asked for.

`json` is decoded here, `cdr` (ROS 2, messages defined by .msg files) and `protobuf` by the decoder factories of
mcap-ros2-support and mcap-protobuf-support. That of ROS 1 runs Python which it generates from the log: a log from
elsewhere is no program, so it is left out.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Collection, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from fmdeploy.data.importing.drives import reason_of
from fmdeploy.errors import DataError, FmdeployError
from fmdeploy.optional import require

DECODERS = {"cdr": "mcap_ros2.decoder", "protobuf": "mcap_protobuf.decoder"}
SCHEMAS = {"cdr": "ros2msg", "protobuf": "protobuf"}


class Message:
    """One message of a log, and what was made of it.

    Attributes:
        path: The log.
        topic: Its topic.
        time_ns: When it was logged, in ns since 1970.
        values: Of use to the reader: what it made of this message.
    """

    def __init__(self, path: Path, topic: str, time_ns: int, decode: Callable[[str], Any]) -> None:
        self.path, self.topic, self.time_ns, self._decode = path, topic, time_ns, decode
        self.values: dict[Any, Any] = {}

    def place(self, field: str = "") -> str:
        """File, topic, field and time, for messages to people."""
        return f"{self.path}: {self.topic}{':' if field else ''}{field} at {clock(self.time_ns)}"

    @cached_property
    def content(self) -> Any:
        """Nested dictionaries and lists, or objects with attributes.

        Raises:
            DataError: it cannot be decoded.
            MissingDependencyError: its decoder is not installed.
        """
        return self._decode(self.place())


def clock(time_ns: int) -> str:
    """Nanoseconds since 1970 as UTC, such as `2026-03-31T00:00:01.250000Z`."""
    moment = datetime.datetime(1970, 1, 1) + datetime.timedelta(microseconds=int(time_ns) // 1000)
    return moment.isoformat(timespec="microseconds") + "Z"


def messages_of(path: Path, topics: Collection[str]) -> Iterator[Message]:
    """Messages of these topics in the order in which they were logged.

    Raises:
        DataError: the log is damaged.
    """
    decoders = Decoders()
    reader = require("mcap.reader")
    try:
        with path.open("rb") as stream:
            made = reader.make_reader(stream, validate_crcs=True)
            for schema, channel, message in made.iter_messages(topics=list(topics)):
                yield Message(path, channel.topic, message.log_time,
                              decoders.later(channel.message_encoding, schema, message.data))
    except FmdeployError:
        raise
    except Exception as error:  # of mcap, struct, lz4 and zstandard alike: damage shows wherever it is met first
        raise _damaged(path, error) from error


def metadata_of(path: Path) -> dict[str, str]:
    """What the log's metadata records say: later records win.

    Raises:
        DataError: the log is damaged.
    """
    found: dict[str, str] = {}
    reader = require("mcap.reader")
    try:
        with path.open("rb") as stream:
            for record in reader.make_reader(stream).iter_metadata():
                found |= dict(record.metadata)
    except Exception as error:
        raise _damaged(path, error) from error
    return found


def _damaged(path: Path, error: Exception) -> DataError:
    return DataError(f"cannot be read as an MCAP log: {reason_of(error)}", where=path)


class Decoders:
    """The decoders of one log: each parses a schema once, and knows it by its number in the log."""

    def __init__(self) -> None:
        self._factories: dict[str, Any] = {}

    def later(self, encoding: str, schema: Any, content: bytes) -> Callable[[str], Any]:
        """A function of the message's place that decodes it."""
        return lambda where: self._decode(encoding, schema, content, where)

    def _decode(self, encoding: str, schema: Any, content: bytes, where: str) -> Any:
        if encoding == "json":
            try:
                return json.loads(content)
            except (ValueError, RecursionError) as error:
                raise DataError(f"a message is not JSON: {error}", where=where) from error
        if encoding not in DECODERS:
            raise DataError("messages have an encoding that cannot be decoded", where=where, found=encoding,
                            expected=", ".join(("json", *DECODERS)))
        if encoding not in self._factories:
            self._factories[encoding] = require(DECODERS[encoding]).DecoderFactory()
        try:
            decoder = self._factories[encoding].decoder_for(encoding, schema)
            if decoder is not None:
                return decoder(content)
        except Exception as error:  # of struct, protobuf and the parsers of schemas alike
            raise DataError(f"a message cannot be decoded: {reason_of(error)}", where=where) from error
        raise DataError("messages have a schema that cannot be decoded", where=where, expected=SCHEMAS[encoding],
                        found=getattr(schema, "encoding", "") or "none")
