"""What comes in over HTTP is refused before it is believed: JSON, binary tensors, encodings, sizes."""

from __future__ import annotations

import asyncio
import gzip
import json
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest

from fmdeploy.runtime.backends.protocol import DeviceLostError
from fmdeploy.runtime.frame import Reason
from fmdeploy.runtime.serve.body import ClientGone, headers_of, pack, read_body, unpack
from fmdeploy.runtime.serve.config import ServeConfig
from fmdeploy.runtime.serve.errors import RequestError
from fmdeploy.runtime.serve.metrics import Metrics
from fmdeploy.runtime.serve.reply import status_of
from fmdeploy.runtime.serve.request import InferRequest, parse_infer
from fmdeploy.runtime.serve.station import Station
from fmdeploy.runtime.state import EventKind
from support.bundles import io_spec
from support.runtimes import frame, toy_bundle
from support.servers import binary_request

IO = io_spec()
FRAME = frame(1)


def parse(headers: dict[str, str], body: bytes | bytearray) -> InferRequest:
    return parse_infer(IO, {name.lower().encode(): value.encode() for name, value in headers.items()}, body)


def as_json(**changes: Any) -> dict[str, Any]:
    inputs = [{"name": n, "shape": [1, *a.shape], "datatype": "FP32", "data": a.reshape(-1).tolist()}
              for n, a in FRAME.items()]
    return {"inputs": inputs, **changes}


def refusal(root: Any) -> str:
    with pytest.raises(RequestError) as caught:
        parse({}, root if isinstance(root, bytes) else json.dumps(root).encode())
    assert caught.value.status == 400
    return caught.value.text


def test_binary_and_json_are_the_same_frame() -> None:
    headers, body = binary_request(FRAME)
    nested = as_json()
    nested["inputs"][0]["data"] = FRAME["lidar"][None].tolist()
    texts = [json.dumps(root).encode() for root in (as_json(), nested)]
    for request in (parse(headers, body), *(parse({}, text) for text in texts)):
        assert request.inputs.keys() == FRAME.keys()
        for name, array in request.inputs.items():
            assert array.dtype == np.float32
            assert np.array_equal(array, FRAME[name])


def test_binary_tensors_are_views_of_the_body() -> None:
    headers, body = binary_request(FRAME)
    assert all(array.base is not None for array in parse(headers, bytearray(body)).inputs.values())


def test_parameters() -> None:
    options = {"stamp_ns": 7, "deadline_ms": 50, "layouts": "lidar=CHW,camera=CHW", "missing": "camera",
               "allow_invalid": True}
    found = parse({}, json.dumps(as_json(id="a", parameters=options, outputs=[{"name": "scene"}])).encode())
    assert (found.stamp_ns, found.deadline_ms, found.layouts, found.missing, found.allow_invalid, found.id) == (
        7, 50.0, {"lidar": "CHW", "camera": "CHW"}, ("camera",), True, "a")
    assert found.outputs == (("scene", False),)
    assert parse({}, json.dumps(as_json(parameters={"timeout": 2500})).encode()).deadline_ms == 2.5


@pytest.mark.parametrize("text", ["-1", "0", "abc", "1e3", "+5", " 5", "", "0x10", "999999999", "9" * 40, "٣"])
def test_bad_header_lengths(text: str) -> None:
    _, body = binary_request(FRAME)
    with pytest.raises(RequestError, match="Inference-Header-Content-Length"):
        parse_infer(IO, {b"inference-header-content-length": text.encode()}, body)


@pytest.mark.parametrize("shift", [-1, 1, 4, 1000])
def test_a_header_length_that_is_not_the_json_is_refused(shift: int) -> None:
    headers, body = binary_request(FRAME)
    length = str(int(headers["Inference-Header-Content-Length"]) + shift)
    with pytest.raises(RequestError):
        parse({"Inference-Header-Content-Length": length}, body)


@pytest.mark.parametrize("extra", [b"\0", b"\0\0\0\0", b"\0" * 4096])
def test_more_or_less_binary_data_is_refused(extra: bytes) -> None:
    headers, body = binary_request(FRAME)
    with pytest.raises(RequestError, match="belong to no input"):
        parse(headers, body + extra)
    with pytest.raises(RequestError, match="bytes are left"):
        parse(headers, body[: -len(extra)])


BAD_TEXT = {
    "not JSON": (b"<html>", "not JSON"),
    "empty": (b"", "not JSON"),
    "not UTF-8": (b'{"id": "\xff"}', "not JSON"),
    "a list": ([], "not a JSON object"),
    "NaN literal": (b'{"inputs": [{"data": [NaN]}]}', "not JSON"),
    "infinity literal": (b'{"inputs": [{"data": [Infinity]}]}', "not JSON"),
    "deep nesting": (b"[" * 100_000, "not JSON"),
    "deep objects": (b'{"inputs":' * 50_000, "not JSON"),
    "huge number": (b'{"inputs": ' + b"9" * 100_000 + b"}", "not JSON"),
    "no inputs": ({}, "inputs must be"),
    "inputs is an object": ({"inputs": {}}, "inputs must be"),
    "too many inputs": ({"inputs": [{}] * 3}, "inputs must be"),
    "unknown key": (as_json(input=1), "unknown key 'input'"),
    "unknown parameter": (as_json(parameters={"stamp": 1}), "unknown parameter 'stamp'"),
    "sequence": (as_json(parameters={"sequence_id": 1}), "unknown parameter"),
    "id is a number": (as_json(id=3), "id is not"),
    "long id": (as_json(id="x" * 257), "id is not"),
    "output unknown": (as_json(outputs=[{"name": "../etc/passwd"}]), "unknown or comes twice"),
    "output twice": (as_json(outputs=[{"name": "bev"}, {"name": "bev"}]), "unknown or comes twice"),
    "output in shared memory": (as_json(outputs=[{"name": "bev", "parameters": {"shared_memory_region": "a"}}]),
                                "unknown parameter"),
    "float stamp": (as_json(parameters={"stamp_ns": 1.5}), "stamp_ns"),
    "negative stamp": (as_json(parameters={"stamp_ns": -1}), "stamp_ns"),
    "huge stamp": (as_json(parameters={"stamp_ns": 2**63}), "stamp_ns"),
    "true stamp": (as_json(parameters={"stamp_ns": True}), "stamp_ns"),
    "deadline 0": (as_json(parameters={"deadline_ms": 0}), "deadline_ms"),
    "deadline text": (as_json(parameters={"deadline_ms": "5"}), "deadline_ms"),
    "flag is a number": (as_json(parameters={"allow_invalid": 1}), "allow_invalid"),
    "layouts list": (as_json(parameters={"layouts": [1]}), "layouts"),
    "missing object": (as_json(parameters={"missing": {}}), "missing"),
}


@pytest.mark.parametrize("name", BAD_TEXT)
def test_bad_requests(name: str) -> None:
    root, words = BAD_TEXT[name]
    assert words in refusal(root)


BAD_TENSORS = {
    "datatype": ({"datatype": "FP64"}, "must have datatype FP32"),
    "no datatype": ({"datatype": None}, "must have datatype FP32"),
    "no batch axis": ({"shape": [8, 16, 16]}, "must have shape [1, 8, 16, 16]"),
    "batch of 2": ({"shape": [2, 8, 16, 16]}, "must have shape"),
    "channels last": ({"shape": [1, 16, 16, 8]}, "must have shape"),
    "boolean size": ({"shape": [True, 8, 16, 16]}, "must have shape"),
    "float sizes": ({"shape": [1.0, 8.0, 16.0, 16.0]}, "must have shape"),
    "negative shape": ({"shape": [1, 8, -16, -16]}, "must have shape"),
    "shape text": ({"shape": "1,8,16,16"}, "must have shape"),
    "too few numbers": ({"data": [0.0]}, "must be 2048 numbers"),
    "ragged": ({"data": [[0.0], [0.0, 1.0]]}, "must be 2048 numbers"),
    "text numbers": ({"data": ["0"] * 2048}, "must be 2048 numbers"),
    "booleans": ({"data": [True] * 2048}, "must be 2048 numbers"),
    "null": ({"data": None}, "must be 2048 numbers"),
    "unknown parameter": ({"parameters": {"shared_memory_region": "a"}}, "unknown parameter"),
    "data and binary": ({"parameters": {"binary_data_size": 8192}}, "both data and binary_data_size"),
    "unknown name": ({"name": "radar"}, "is unknown"),
    "name of the other": ({"name": "camera"}, "must have shape"),
    "name is a list": ({"name": []}, "is unknown"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors(name: str) -> None:
    change, words = BAD_TENSORS[name]
    root = as_json()
    root["inputs"][0].update(change)
    assert words in refusal(root)


@pytest.mark.parametrize("size", [8191, 8193, 0, -8192, True, 8192.0, "8192", 2**70])
def test_bad_binary_sizes(size: Any) -> None:
    _, body = binary_request(FRAME)
    inputs = [{"name": n, "shape": [1, *a.shape], "datatype": "FP32", "parameters": {"binary_data_size": a.nbytes}}
              for n, a in FRAME.items()]
    inputs[0]["parameters"] = {"binary_data_size": size}
    head = json.dumps({"inputs": inputs}).encode()
    with pytest.raises(RequestError, match="needs 8192 bytes"):
        parse({"Inference-Header-Content-Length": str(len(head))}, head + body[-20480:])


def test_a_number_beyond_float32_is_left_to_the_guards() -> None:
    root = as_json()
    root["inputs"][0]["data"] = [1e300] * 2048
    assert np.isinf(parse({}, json.dumps(root).encode()).inputs["lidar"]).all()


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_compressed_bodies_are_bounded(encoding: str) -> None:
    plain = b"x" * 100_000
    packed = gzip.compress(plain) if encoding == "gzip" else zlib.compress(plain)
    assert unpack(packed, encoding.encode(), 100_000) == plain
    for body, limit, status in ((packed, 99_999, 413), (packed[:-3], 100_000, 400), (packed + b"more", 100_000, 400),
                                (b"nonsense", 100_000, 400)):
        with pytest.raises(RequestError) as caught:
            unpack(body, encoding.encode(), limit)
        assert caught.value.status == status
    with pytest.raises(RequestError) as caught:
        unpack(packed, b"br", 100_000)
    assert caught.value.status == 415


def test_a_bomb_is_not_unpacked() -> None:
    bomb = gzip.compress(bytes(64 * 1024 * 1024))
    with pytest.raises(RequestError) as caught:
        unpack(bomb, b"gzip", 1000)
    assert caught.value.status == 413


def test_answers_are_packed_for_those_who_accept_it() -> None:
    assert gzip.decompress(pack(b"abc", b"deflate;q=0.5, gzip")[0]) == b"abc"
    assert zlib.decompress(pack(b"abc", b"deflate")[0]) == b"abc"
    assert pack(b"abc", b"identity, br, gzip;q=0") == (b"abc", b"")


TWICE = {
    "at the top": b'{"inputs": [], "inputs": %s}',
    "a stamp": b'{"inputs": %s, "parameters": {"stamp_ns": 1, "stamp_ns": 2}}',
    "spelt differently": b'{"inputs": %s, "parameters": {"stamp_ns": 1, "stamp_\\u006es": 2}}',
    "beside a colon": b'{"id": "a:b", "inputs": %s, "parameters": {"stamp_ns": 1, "stamp_ns": 2}}',
}


@pytest.mark.parametrize("case", TWICE)
def test_a_key_that_comes_twice_is_refused(case: str) -> None:
    """Two readers would understand two requests."""
    assert "duplicate key" in refusal(TWICE[case] % json.dumps(as_json()["inputs"]).encode())
    headers, body = binary_request(FRAME)
    twice = body.replace(b'"datatype": "FP32"', b'"datatype": "FP32", "datatype": "FP32"', 1)
    size = int(headers["Inference-Header-Content-Length"]) + len(twice) - len(body)
    with pytest.raises(RequestError, match="duplicate key"):
        parse({"Inference-Header-Content-Length": str(size)}, twice)


def test_colons_in_texts_are_no_keys() -> None:
    assert parse({}, json.dumps(as_json(id='frame: "12:30"')).encode()).id == 'frame: "12:30"'


@pytest.mark.parametrize("first", ["x" * 100_000, True, None, [0.0], {}, "1.5"])
def test_one_item_that_is_no_number_costs_nothing(first: object) -> None:
    """Beside a long string numpy would make every number as long; beside numbers it takes True for 1."""
    root = as_json()
    root["inputs"][0]["data"][0] = first
    text = json.dumps(root).encode()
    tracemalloc.start()
    try:
        with pytest.raises(RequestError, match="must be 2048 numbers"):
            parse({}, text)
        assert tracemalloc.get_traced_memory()[1] < 10 * len(text) + 2**20
    finally:
        tracemalloc.stop()


def test_headers_that_come_twice() -> None:
    twice = [(b"inference-header-content-length", b"5"), (b"inference-header-content-length", b"6")]
    with pytest.raises(RequestError, match="comes twice"):
        headers_of({"headers": twice})


def test_bodies_stop_at_the_limit() -> None:
    def feed(*pieces: bytes) -> Any:
        messages = [{"type": "http.request", "body": piece, "more_body": at + 1 < len(pieces)}
                    for at, piece in enumerate(pieces)]
        waiting = iter([*messages, {"type": "http.disconnect"}])

        async def receive() -> Any:
            return next(waiting)

        return receive

    assert asyncio.run(read_body({}, feed(b"ab", b"cd"), 4)) == b"abcd"
    with pytest.raises(RequestError) as caught:
        asyncio.run(read_body({}, feed(b"ab", b"cd", b"e"), 4))
    assert caught.value.status == 413
    with pytest.raises(RequestError) as caught:
        asyncio.run(read_body({b"content-length": b"5"}, feed(), 4))  # nothing is read
    assert caught.value.status == 413
    with pytest.raises(ClientGone):
        asyncio.run(read_body({}, feed(), 4))


def test_status_says_whose_fault_it_is() -> None:
    assert status_of((Reason.NOT_FINITE, Reason.UNUSUAL_INPUT)) == 422
    assert status_of((Reason.NOT_FINITE, Reason.BACKEND_ERROR)) == 500
    assert status_of((Reason.NOT_FINITE, Reason.WORKER_LOST)) == 503
    assert status_of((Reason.UNUSUAL_INPUT,)) == status_of(()) == 503
    assert {status_of((reason,)) for reason in Reason} == {422, 500, 503}


def test_a_runtime_that_cannot_be_trusted_ends_the_server() -> None:
    """F7 behind HTTP: never live with a dead device."""
    async def run() -> None:
        config = ServeConfig(bundle=toy_bundle(), tiers=("fp32",), supervisor=False)
        station = Station(config, Metrics())
        await station.load()
        assert station.is_ready()
        runtime: Any = station.runtime
        runtime.publisher.tell(EventKind.DEVICE_LOST, "every call fails")
        assert not station.is_ready()
        try:
            with pytest.raises(DeviceLostError, match="cannot run in this process"):
                await asyncio.wait_for(station.watch(), 30)
        finally:
            assert station.close(30)

    asyncio.run(run())
