"""`qwen3-ascend serve` as a program: how it begins, and how it ends."""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
from pathlib import Path
from typing import NoReturn

import pytest
from support.command_line import run
from support.http_client import JSON, connection, get, post
from support.openai_server import server_program

from qwen3_ascend import load
from qwen3_ascend.errors import CheckpointError
from qwen3_ascend.runtime.options import ServeOptions
from qwen3_ascend.runtime.serving.server import Server, open_socket, url_of

SMALL = ("--kv-cache-tokens", "2048", "--block-size", "16")
FOREVER = json.dumps({"prompt": "a", "max_tokens": 1000, "ignore_eos": True, "stream": True})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_begins_and_ends(number: int, tiny_w8a8: Path) -> None:
    with server_program(tiny_w8a8, *SMALL) as server:
        assert server.url.startswith("http://127.0.0.1:")
        loaded, address = server.said.splitlines()
        assert loaded.startswith(f"loaded {tiny_w8a8} in ")
        assert address == f"w8a8 at {server.url}; Ctrl-C ends it"
        assert get(server.url, "/v1/models/w8a8").status == 200
        assert post(server.url, "/v1/completions", {"prompt": "a"}).status == 200
        assert server.end(number) == (0, "")


def test_what_runs_may_end(tiny_w8a8: Path) -> None:
    options = (*SMALL, "--grace", "60", "--served-model-name", "mine", "--access-log")
    with server_program(tiny_w8a8, *options) as server, connection(server.url) as opened:
        body = {"model": "mine", "prompt": "a", "max_tokens": 200, "ignore_eos": True}
        opened.request("POST", "/v1/completions", json.dumps(body | {"stream": True}), JSON)
        reply = opened.getresponse()
        first = reply.readline()
        server.process.send_signal(signal.SIGTERM)
        *_, last, done, end = (first + reply.read()).decode().split("\n\n")
        assert '"finish_reason":"length"' in last and (done, end) == ("data: [DONE]", "")
        _, err = server.process.communicate(timeout=60)
        assert server.process.returncode == 0
        (line,) = err.splitlines()
        assert line.startswith("POST '/v1/completions' 200 ") and line.endswith(" s")


def test_what_does_not_end_is_ended(tiny_w8a8: Path) -> None:
    with server_program(tiny_w8a8, *SMALL, "--grace", "0") as server:
        with connection(server.url) as opened:
            opened.request("POST", "/v1/completions", FOREVER, JSON)
            reply = opened.getresponse()
            assert reply.readline()
            server.process.send_signal(signal.SIGINT)
            assert b"the server is shutting down" in reply.read()
        _, err = server.process.communicate(timeout=60)
        assert (server.process.returncode, err) == (0, "")


def test_the_second_signal_ends_it_at_once(tiny_w8a8: Path) -> None:
    with server_program(tiny_w8a8, *SMALL, "--grace", "600") as server:
        with connection(server.url) as opened:
            opened.request("POST", "/v1/completions", FOREVER, JSON)
            reply = opened.getresponse()
            assert reply.readline()
            server.process.send_signal(signal.SIGINT)
            while get_fails(server.url) is False:  # it has begun to end
                pass
            code, err = server.end(signal.SIGINT)
        assert (code, err) == (128 + signal.SIGINT, "")


def get_fails(url: str) -> bool:
    try:
        get(url, "/health")
    except OSError:
        return True
    return False


def test_a_client_that_goes_away_is_no_defect(tiny_w8a8: Path) -> None:
    """Before its request is whole, and in the middle of a stream: not a word about it."""
    with server_program(tiny_w8a8, *SMALL) as server:
        with connection(server.url) as opened:
            opened.putrequest("POST", "/v1/completions")
            for name, value in {**JSON, "content-length": "1000"}.items():
                opened.putheader(name, value)
            opened.endheaders(b"{")
        with connection(server.url) as opened:
            opened.request("POST", "/v1/completions", FOREVER, JSON)
            assert opened.getresponse().readline()
        assert post(server.url, "/v1/completions", {"prompt": "a"}).status == 200
        assert server.end() == (0, "")


def test_a_stream_that_nobody_reads_holds_nobody_up(tiny_w8a8: Path) -> None:
    with server_program(tiny_w8a8, *SMALL, "--grace", "1") as server:
        host, port = server.url.removeprefix("http://").removesuffix("/v1").split(":")
        with socket.create_connection((host, int(port))) as stalled:
            stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            body = json.dumps({**json.loads(FOREVER), "logprobs": 20, "n": 8}).encode()
            head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            stalled.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            assert stalled.recv(1)
            for _ in range(3):
                assert post(server.url, "/v1/completions", {"prompt": "a"}).status == 200
            code, _ = server.end()
            assert code == 0


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ZeroDivisionError("x"), r"Traceback(.|\n)*\nZeroDivisionError: x\n"),
        (CheckpointError("tensor x: its bytes differ"), "Error: tensor x: its bytes differ\n"),
    ],
)
def test_an_engine_that_has_failed_is_an_exit_code(
    error: Exception,
    said: str,
    tiny_w8a8: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Of what the user can mend, such as a damaged checkpoint, one line says why."""
    llm, options = load(tiny_w8a8, block_size=16, kv_cache_tokens=512), ServeOptions(port=0)

    def fail() -> NoReturn:
        raise error

    monkeypatch.setattr(llm, "step", fail)
    with open_socket(options) as bound:
        server = Server(llm, "tiny", bound, options)

        def fail_and_stop() -> None:
            reply = post(url_of(bound), "/v1/completions", {"prompt": "a"})
            assert reply.status == 503 and str(error) in str(reply.json)
            server.stop()

        client = threading.Thread(target=fail_and_stop)
        with pytest.raises(SystemExit) as end:
            server.run(client.start)
        client.join()
    assert end.value.code == 1 and re.fullmatch(said, capfd.readouterr().err)


def test_an_address_that_cannot_be_had(tiny_w8a8: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        done = run("serve", tiny_w8a8, "--port", port)
        done.one_line_error(f"--port {port}", "in use", "--port 0")
    run("serve", tiny_w8a8, "--host", "no.such.host.invalid").one_line_error("no.such.host.invalid")
    run("serve", tiny_w8a8, "--host", "192.0.2.1").one_line_error("192.0.2.1")
    run("serve", tiny_w8a8, "--port", "65536").one_line_error("--port", "0 to 65535")


def test_what_is_no_checkpoint_is_one_line(tmp_path: Path) -> None:
    run("serve", tmp_path / "nothing", "--port", "0").one_line_error("nothing")


def test_it_points_to_vllm_for_production() -> None:
    assert "vllm serve" in run("serve", "--help").out
