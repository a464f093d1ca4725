"""The server as clients see it, through real sockets: KServe v2, NVIDIA's tritonclient, Prometheus, limits."""

from __future__ import annotations

import contextlib
import gzip
import json
import socket
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fmdeploy.arrays import Arrays
from support.bundles import fp32_model, make_bundle
from support.runtimes import frame, runtime, toy_bundle
from support.servers import Server, binary_request, outputs_of, parameters_of, serving

READ_TIMEOUT_S = 2.0
CONNECTIONS = 16


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    options = ("--no-supervisor", "--tiers", "fp32", "--name", "toy", "--read-timeout-s", str(READ_TIMEOUT_S),
               "--connections", str(CONNECTIONS), "--queue", "64", "--allow-reload")
    with serving(tmp_path_factory.mktemp("serve"), *options) as found:
        yield found


@pytest.fixture(scope="module")
def unix(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A supervised server on a Unix socket, with all defaults."""
    folder = tmp_path_factory.mktemp("unix")
    with serving(folder, "--unix", str(folder / "s"), "--tiers", "fp32") as found:
        yield found


@pytest.fixture(scope="module")
def truth() -> dict[int, Arrays]:
    """What the embedded runtime says of the first frames."""
    with runtime() as reference:
        return {seed: reference.infer(frame(seed)).require_valid().outputs for seed in range(40)}


def same(found: Arrays, wanted: Arrays) -> bool:
    return found.keys() == wanted.keys() and all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_ready_line(server: Server, unix: Server) -> None:
    for one in (server, unix):
        assert set(one.line) == {"model", "address", "tier", "pid"}
        assert one.line["tier"] == "fp32"
        assert one.line["pid"] == one.process.pid
    assert server.address.startswith("127.0.0.1:")
    assert server.model == "toy"
    assert Path(unix.address).is_socket()
    assert unix.model == "bundle"


def test_health(server: Server, unix: Server) -> None:
    for one in (server, unix):
        for path in ("/v2/health/live", "/v2/health/ready", f"/v2/models/{one.model}/ready"):
            assert one.ask("GET", path).status == 200
        health = one.ask("GET", "/health").json()
        assert health["live"]
        assert health["ready"]
        assert health["tier"] == "fp32"


def test_binary_answers_are_the_runtimes(server: Server, unix: Server, truth: dict[int, Arrays]) -> None:
    for one in (server, unix):
        answer = one.infer(frame(0))
        assert answer.status == 200, answer.body
        assert same(outputs_of(answer), truth[0])
        facts = parameters_of(answer)
        assert facts["valid"] is True
        assert facts["tier"] == "fp32"
        assert facts["age_ms"] >= facts["latency_ms"]
        assert all(isinstance(value, (bool, int, float, str)) for value in facts.values()), "KServe: scalars only"


def test_json_answers_are_the_runtimes(server: Server, truth: dict[int, Arrays]) -> None:
    inputs = [{"name": n, "shape": [1, *a.shape], "datatype": "FP32", "data": a.tolist()} for n, a in frame(1).items()]
    root = {"id": "one", "inputs": inputs, "outputs": [{"name": "scene"}]}
    found = server.ask("POST", server.infer_path, json.dumps(root).encode()).json()
    assert found["id"] == "one"
    assert found["model_name"] == "toy"
    assert [o["name"] for o in found["outputs"]] == ["scene"]
    scene = found["outputs"][0]
    assert scene["shape"] == [1, 8]
    assert scene["datatype"] == "FP32"
    assert np.array_equal(np.float32(scene["data"]), truth[1]["scene"])


def test_versions(server: Server) -> None:
    version = server.ask("GET", "/v2/models/toy").json()["versions"][0]
    headers, body = binary_request(frame(2))
    for name in (version, "1"):
        assert server.ask("GET", f"/v2/models/toy/versions/{name}").status == 200
        assert server.ask("POST", f"/v2/models/toy/versions/{name}/infer", body, headers).status == 200


@pytest.mark.parametrize("path", [
    "/v2/models/other", "/v2/models/toy/versions/2", "/v2/models/toy/versions/2/ready", "/v2/models/toy/trace", "/",
    "/v2/models/..%2f..%2fetc%2fpasswd", "/v2/systemsharedmemory/status", "/docs", "/v2/models/toy/versions",
])
def test_unknown_addresses(server: Server, path: str) -> None:
    answer = server.ask("GET", path)
    assert answer.status == 404
    assert answer.json()["error"]


@pytest.mark.parametrize("path", ["/infer", "/v2/models/other/infer", "/v2/models/toy/versions/2/infer",
                                  "/v2/models/toy/x/1/infer", "/v2/models//infer", "/v2/models/../toy/infer"])
def test_infer_of_unknown_models(server: Server, path: str) -> None:
    headers, body = binary_request(frame(2))
    answer = server.ask("POST", path, body, headers)
    assert answer.status == 404
    assert answer.json()["error"]


def test_wrong_methods(server: Server) -> None:
    for method, path in (("GET", server.infer_path), ("POST", "/v2"), ("DELETE", "/v2/models/toy"), ("PUT", "/metrics")):
        answer = server.ask(method, path)
        assert answer.status == 405
        assert answer.json()["error"]


INVALID = {
    "NOT_FINITE": (np.nan, 422), "OUT_OF_RANGE": (255.0, 422), "LOW_INFORMATION": (0.5, 422),
}


@pytest.mark.parametrize("code", INVALID)
def test_an_invalid_frame_never_looks_valid(server: Server, code: str) -> None:
    value, status = INVALID[code]
    bad = {**frame(3), "lidar": np.full_like(frame(3)["lidar"], value)}
    answer = server.infer(bad)
    assert answer.status == status
    assert code in answer.reasons
    assert code in answer.json()["error"]
    assert "outputs" not in answer.json()
    assert answer.json()["parameters"]["valid"] is False
    opted = server.infer(bad, allow_invalid=True)
    facts = parameters_of(opted)
    assert opted.status == 200
    assert opted.json()["outputs"] == [], "also where the model ran: nothing of it may be used"
    assert facts["valid"] is False
    assert code in facts["reasons"]


def test_stamps_and_deadlines_are_the_clients(unix: Server) -> None:
    now = time.monotonic_ns()
    answer = unix.infer(frame(4), stamp_ns=now, deadline_ms=20_000)
    assert answer.status == 200
    assert parameters_of(answer)["stamp_ns"] == now
    for stamp, code in ((now, "BAD_STAMP"), (now + 10**12, "BAD_STAMP")):
        refused = unix.infer(frame(5), stamp_ns=stamp)
        assert refused.status == 422
        assert refused.reasons == [code]
    late = unix.infer(frame(6), deadline_ms=1e-3)
    assert late.status == 503
    assert "LATE" in late.reasons
    assert late.headers["retry-after"]
    assert unix.infer(frame(7), stamp_ns=time.monotonic_ns()).status == 200


def test_wrong_structure_is_a_bad_request(server: Server) -> None:
    answer = server.infer(frame(8), layouts="lidar=HWC")
    assert answer.status == 400
    assert "layout" in answer.json()["error"]
    headers, body = binary_request({"lidar": frame(8)["lidar"]})
    assert server.ask("POST", server.infer_path, body, headers).status == 400


@pytest.mark.parametrize("length", ["-5", "99999999", "abc", "0"])
def test_bad_header_lengths_over_http(server: Server, length: str) -> None:
    _, body = binary_request(frame(8))
    answer = server.ask("POST", server.infer_path, body, {"Inference-Header-Content-Length": length})
    assert answer.status == 400
    assert "Inference-Header-Content-Length" in answer.json()["error"]


def test_a_large_request_is_refused_before_it_is_read(server: Server) -> None:
    head = f"POST {server.infer_path} HTTP/1.1\r\nHost: a\r\nContent-Length: 999999999999\r\n\r\n".encode()
    with raw(server) as sock:
        sock.sendall(head)
        answer = sock.recv(4096)
    assert b" 413 " in answer.partition(b"\r\n")[0]
    body = bytes(3 * 1024 * 1024)
    assert server.ask("POST", server.infer_path, body).status == 413
    chunks = server.ask("POST", server.infer_path, iter([body[: 1 << 20]] * 3))  # http.client sends it chunked
    assert chunks.status == 413


def test_chunked_bodies_work(server: Server, truth: dict[int, Arrays]) -> None:
    headers, body = binary_request(frame(9))
    pieces = iter([body[:1], body[1:5000], body[5000:]])
    answer = server.ask("POST", server.infer_path, pieces, headers)
    assert answer.status == 200
    assert same(outputs_of(answer), truth[9])


def test_pipelined_requests_and_100_continue(server: Server) -> None:
    headers, body = binary_request(frame(10))
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    start = f"POST {server.infer_path} HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n{lines}"
    with raw(server) as sock:
        sock.sendall((start + "\r\n").encode() + body + (start + "Connection: close\r\n\r\n").encode() + body)
        assert everything(sock).count(b"HTTP/1.1 200") == 2
    with raw(server) as sock:
        sock.sendall((start + "Expect: 100-continue\r\nConnection: close\r\n\r\n").encode())
        assert sock.recv(100).startswith(b"HTTP/1.1 100")
        sock.sendall(body)
        assert b"HTTP/1.1 200" in everything(sock)


def test_slow_and_endless_clients_are_cut_off(server: Server) -> None:
    started = time.monotonic()
    with raw(server) as silent, raw(server) as half, raw(server) as endless:
        half.sendall(f"POST {server.infer_path} HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\nxx".encode())
        endless.sendall(b"GET / HTTP/1.1\r\n")
        with contextlib.suppress(OSError):
            for number in range(100_000):
                endless.sendall(b"X-%d: %s\r\n" % (number, b"x" * 1000))
        everything(endless)  # ends; a reset may eat the answer
        for sock in (silent, half):
            assert everything(sock).startswith(b"HTTP/1.1 408")
    assert time.monotonic() - started < READ_TIMEOUT_S + 20
    assert server.ask("GET", "/v2/health/ready").status == 200


def test_large_headers_are_refused(server: Server) -> None:
    with raw(server) as sock:
        sock.sendall(b"GET /v2 HTTP/1.1\r\nX: " + b"x" * 40_000 + b"\r\n\r\n")
        assert everything(sock).startswith(b"HTTP/1.1 431")
    with raw(server) as sock:
        sock.sendall(b"GET /v2 HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n")
        assert everything(sock).startswith(b"HTTP/1.1 431")
    with raw(server) as sock:
        sock.sendall(b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\n\r\n")
        assert everything(sock).startswith(b"HTTP/1.1 431")


def test_connections_are_bounded(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        socks = [stack.enter_context(raw(server)) for _ in range(CONNECTIONS + 4)]
        answers = [everything(sock)[:12] for sock in socks[-3:]]
        assert answers == [b"HTTP/1.1 503"] * 3
    end = time.monotonic() + 20
    while True:  # the server sees the closed ones a moment later
        with contextlib.suppress(OSError):
            if server.ask("GET", "/v2/health/ready").status == 200:
                break
        assert time.monotonic() < end


@pytest.mark.parametrize("text", [b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", bytes(1000),
                                  b"POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
                                  b"POST / HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
                                  b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFFF\r\n",
                                  b"POST /infer HTTP/1.1\r\nContent-Length: -1\r\n\r\n"])
def test_what_is_no_http_gets_400(server: Server, text: bytes) -> None:
    with raw(server) as sock:
        sock.sendall(text)
        assert everything(sock).startswith(b"HTTP/1.1 400")


def test_metrics(unix: Server) -> None:
    before = unix.metric('fmdeploy_frames_total{valid="true"}'), unix.metric('fmdeploy_frames_total{valid="false"}')
    unix.infer(frame(11))
    unix.infer({**frame(12), "lidar": np.full_like(frame(12)["lidar"], np.inf)})
    assert unix.metric('fmdeploy_frames_total{valid="true"}') == before[0] + 1
    assert unix.metric('fmdeploy_frames_total{valid="false"}') == before[1] + 1
    assert unix.metric('fmdeploy_frame_reasons_total{reason="NOT_FINITE"}') >= 1
    assert unix.metric("fmdeploy_infer_seconds_count") >= 2
    assert unix.metric("fmdeploy_ready") == 1
    assert unix.metric("fmdeploy_queue_depth") == 0
    assert unix.metric('fmdeploy_runtime{counter="restarts"}') == 0
    assert unix.metric("fmdeploy_resident_bytes") > 1e7
    page = unix.ask("GET", "/metrics")
    assert 'tier="fp32"' in page.body.decode()
    assert page.headers["content-type"].startswith("text/plain")


def test_tritonclient(server: Server, truth: dict[int, Arrays]) -> None:
    """The acceptance test: NVIDIA's own client, unchanged."""
    triton = pytest.importorskip("tritonclient.http")
    with contextlib.closing(triton.InferenceServerClient(server.address, concurrency=4)) as client:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("toy")
        assert not client.is_model_ready("other")
        assert client.get_server_metadata()["name"] == "fmdeploy"
        about, config = client.get_model_metadata("toy"), client.get_model_config("toy")
        assert [(i["name"], i["datatype"], i["shape"]) for i in about["inputs"]] == [
            ("lidar", "FP32", [1, 8, 16, 16]), ("camera", "FP32", [1, 12, 16, 16])]
        assert config["max_batch_size"] == 0
        assert config["output"][1] == {"name": "scene", "data_type": "TYPE_FP32",
                                                                         "dims": [1, 8]}
        for both in (True, False):
            for algorithm in (None, "gzip", "deflate"):
                result = client.infer("toy", triton_inputs(triton, frame(13), binary=both), request_id="r",
                                      request_compression_algorithm=algorithm, response_compression_algorithm=algorithm,
                                      outputs=[triton.InferRequestedOutput("scene", binary_data=not both),
                                               triton.InferRequestedOutput("bev", binary_data=both)])
                assert result.get_response()["id"] == "r"
                assert result.get_response()["parameters"]["valid"]
                assert same({name: result.as_numpy(name)[0] for name in ("bev", "scene")}, truth[13])
        result = client.infer("toy", triton_inputs(triton, frame(14)), model_version="1",
                              parameters={"stamp_ns": time.monotonic_ns(), "deadline_ms": 30_000})
        assert same({name: result.as_numpy(name)[0] for name in ("bev", "scene")}, truth[14])
        only = client.infer("toy", triton_inputs(triton, frame(15)), outputs=[triton.InferRequestedOutput("scene")])
        assert only.as_numpy("bev") is None
        assert np.array_equal(only.as_numpy("scene")[0], truth[15]["scene"])
        waiting = [(n, client.async_infer("toy", triton_inputs(triton, frame(n)))) for n in range(16, 28)]
        for number, answer in waiting:
            assert np.array_equal(answer.get_result().as_numpy("bev")[0], truth[number]["bev"])
        assert client.get_inference_statistics("toy")["model_stats"][0]["inference_stats"]["success"]["count"] > 0
        assert client.get_model_repository_index()[0]["state"] == "READY"
        client.load_model("toy")
        with pytest.raises(triton.InferenceServerException, match="shape"):
            client.infer("toy", triton_inputs(triton, {**frame(1), "lidar": np.zeros((8, 8, 16), np.float32)}))
        with pytest.raises(triton.InferenceServerException, match="NOT_FINITE") as caught:
            client.infer("toy", triton_inputs(triton, {**frame(1), "lidar": frame(1)["lidar"] * np.nan}))
        assert caught.value.status() == "422"
        with pytest.raises(triton.InferenceServerException, match="unknown model"):
            client.infer("other", triton_inputs(triton, frame(1)))


def triton_inputs(triton: Any, given: Arrays, *, binary: bool = True) -> list[Any]:
    tensors = []
    for name, array in given.items():
        tensor = triton.InferInput(name, [1, *array.shape], "FP32")
        tensor.set_data_from_numpy(array[None], binary_data=binary)
        tensors.append(tensor)
    return tensors


def test_compressed_by_hand(server: Server, truth: dict[int, Arrays]) -> None:
    headers, body = binary_request(frame(30))
    packed = server.ask("POST", server.infer_path, gzip.compress(body),
                        {**headers, "Content-Encoding": "gzip", "Accept-Encoding": "deflate"})
    packed.body = zlib.decompress(packed.body)
    assert packed.headers["content-encoding"] == "deflate"
    assert same(outputs_of(packed), truth[30])
    bomb = server.ask("POST", server.infer_path, gzip.compress(bytes(1 << 26)), {"Content-Encoding": "gzip"})
    assert bomb.status == 413


def test_many_clients_share_one_runtime(server: Server, truth: dict[int, Arrays]) -> None:
    wrong: list[int] = []

    def client(first: int) -> None:
        for seed in range(first, 40, 8):
            answer = server.infer(frame(seed))
            if answer.status != 200 or not same(outputs_of(answer), truth[seed]):
                wrong.append(seed)

    threads = [threading.Thread(target=client, args=(first,)) for first in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []


@contextlib.contextmanager
def raw(server: Server) -> Iterator[socket.socket]:
    host, _, port = server.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=30) as sock:
        yield sock


def everything(sock: socket.socket) -> bytes:
    """Read until the server closes."""
    found = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := sock.recv(65536):
            found += piece
    return found


def test_the_bundle_was_not_touched() -> None:
    from fmdeploy.runtime import open_bundle

    assert open_bundle(toy_bundle()).digest


@pytest.mark.parametrize("head", ["GET / HTTP/1.1\r\nX: ", "POST {path} HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: "],
                         ids=["header", "trailer"])
def test_an_endless_header_is_cut_off_before_it_fills_the_memory(server: Server, head: str) -> None:
    """The parser hands out whole headers only: one without an end would be collected until the read timeout."""
    sent, refused = 0, False
    with raw(server) as sock:
        sock.sendall(head.format(path=server.infer_path).encode())
        try:
            while sent < 64 * 2**20:
                sent += sock.send(bytes(2**16).replace(b"\0", b"a"))
        except OSError:  # reset: it closed with bytes unread
            refused = True
    assert refused
    assert sent < 16 * 2**20, "the kernel's buffers, and not much more"


def test_empty_lines_between_requests_do_not_hold_a_connection(server: Server) -> None:
    with raw(server) as sock:
        sock.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: a\r\n\r\n")
        answer = b""
        while not answer.endswith(b"}") and (piece := sock.recv(4096)):  # head and body may come apart
            answer += piece
        assert b" 200 " in answer
        sock.sendall(b"\r\n")  # begins no request, and ends the keep-alive timer
        sock.settimeout(10 * READ_TIMEOUT_S)
        begin = time.monotonic()
        assert b" 408 " in sock.recv(4096)
        assert time.monotonic() - begin >= 0.9 * READ_TIMEOUT_S
        sock.sendall(b"")


def test_health_says_why_tiers_are_not_used(server: Server) -> None:
    tiers = server.ask("GET", "/health").json()["tiers"]
    assert [(one["tier"], one["admitted"]) for one in tiers] == [("fp32", True)]


def test_a_frame_that_waited_past_the_servers_deadline_is_late(tmp_path: Path) -> None:
    """Without a stamp a frame is as old as its wait: the deadline of `--deadline-ms` counts from its arrival."""
    options = ("--no-supervisor", "--tiers", "fp32", "--queue", "64", "--connections", "64", "--deadline-ms", "60")
    bundle = make_bundle(tmp_path / "slow", models={"fp32": fp32_model(16, 512)}).root
    answers: list[tuple[int, list[str], float]] = []

    def one(server: Server, seed: int) -> None:
        answer = server.infer(frame(seed), allow_invalid=True)
        facts = parameters_of(answer) if answer.status == 200 else {"age_ms": 0.0, "valid": False}
        answers.append((answer.status, answer.reasons or [str(facts["valid"])], float(facts["age_ms"]) * facts["valid"]))

    with serving(tmp_path, *options, bundle=bundle) as server:
        threads = [threading.Thread(target=one, args=(server, seed)) for seed in range(32)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(answers) == 32
    assert max(age for _, _, age in answers) <= 60, "a frame older than the deadline was published as valid"
    assert any(status == 503 and "LATE" in reasons for status, reasons, _ in answers), answers
