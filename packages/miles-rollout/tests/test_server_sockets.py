"""The service on a real loopback socket: hang-ups abort, draining has a deadline, ports are checked first."""

import asyncio
import contextlib
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import pytest

from miles_rollout.server import PortInUse, ServerConfig, bind, create_app, listen, serve
from miles_rollout.testing import ScriptedEngine, serving
from miles_rollout.text import CharTokenizer

TOKENIZER = CharTokenizer("0123456789")
ENDLESS = {"max_new_tokens": 400, "ignore_eos": True}


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run an async test with a deadline."""

    async def limited() -> None:
        async with asyncio.timeout(30):
            await main()

    asyncio.run(limited())


async def raw_request(url: str, body: dict[str, Any]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A POST /generate written by hand, so that the connection can be cut at will."""
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    content = json.dumps(body).encode()
    head = f"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    await writer.drain()
    return reader, writer


@pytest.mark.parametrize("prompts", [[5], [[5], [6]]])
@pytest.mark.parametrize("stream", [False, True])
def test_a_caller_who_hangs_up_aborts_the_request(stream: bool, prompts: list[Any]) -> None:
    async def main() -> None:
        engine = ScriptedEngine(TOKENIZER)
        async with serving(engine, TOKENIZER) as url:
            engine.hold()
            count = len(prompts) if isinstance(prompts[0], list) else 1
            reader, writer = await raw_request(url, {"input_ids": prompts, "sampling_params": ENDLESS, "stream": stream})
            await engine.until(lambda: len(engine.started) == count)
            writer.close()
            await engine.until(lambda: len(engine.aborted) == count)
            await engine.release()
            async with httpx.AsyncClient(base_url=url) as http:
                assert (await http.get("/get_server_info")).json()["num_requests"] == 0
                assert 'path="/generate",status="499"} 1' in (await http.get("/metrics")).text
            assert engine.finished == []

    run(main)


def test_hanging_up_in_mid_stream_aborts_the_request() -> None:
    async def main() -> None:
        engine = ScriptedEngine(TOKENIZER)
        async with serving(engine, TOKENIZER) as url:
            engine.hold_after(3)
            async with httpx.AsyncClient(base_url=url) as http:
                body = {"input_ids": [5], "sampling_params": ENDLESS, "stream": True}
                async with http.stream("POST", "/generate", json=body) as response:
                    lines = response.aiter_lines()
                    seen = 0
                    while seen < 3:
                        seen += (await anext(lines)).startswith("data: ")
            await engine.until(lambda: len(engine.aborted) == 1)

    run(main)


def test_stopping_lets_requests_finish_and_refuses_new_ones() -> None:
    async def main() -> None:
        engine = ScriptedEngine(TOKENIZER)
        sock = bind("127.0.0.1", 0)
        url = f"http://127.0.0.1:{sock.getsockname()[1]}"
        stop = asyncio.Event()
        app = create_app(engine, TOKENIZER, ServerConfig(drain_s=20))
        server = asyncio.ensure_future(serve(app, sock, stop=stop, log_level="error"))
        async with httpx.AsyncClient(base_url=url) as http:
            engine.hold()
            running = asyncio.ensure_future(
                http.post("/generate", json={"input_ids": [5], "sampling_params": {"max_new_tokens": 3}})
            )
            await engine.until(lambda: len(engine.started) == 1)
            stop.set()
            while not app.state.service.draining:
                await asyncio.sleep(0)
            assert (await http.post("/generate", json={"input_ids": [5]})).status_code == 503
            assert not server.done()
            await engine.release()
            assert (await running).json()["meta_info"]["finish_reason"]["type"] in ("length", "stop")
        await server
        assert engine.closed
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")

    run(main)


def test_draining_has_a_deadline_after_which_requests_are_aborted() -> None:
    async def main() -> None:
        engine = ScriptedEngine(TOKENIZER)
        async with httpx.AsyncClient() as http:
            async with serving(engine, TOKENIZER, ServerConfig(drain_s=0.05)) as url:
                engine.hold()
                running = asyncio.ensure_future(http.post(f"{url}/generate", json={"input_ids": [5]}))
                await engine.until(lambda: len(engine.started) == 1)
            assert (await running).json()["meta_info"]["finish_reason"]["type"] == "abort"
        assert engine.closed

    run(main)


def test_a_port_in_use_is_named_with_the_remedy() -> None:
    with contextlib.closing(bind("127.0.0.1", 0)) as first:
        listen(first)
        port = first.getsockname()[1]
        with pytest.raises(PortInUse, match=f"port {port} on 127.0.0.1 is in use; .* --port"):
            bind("127.0.0.1", port)


def test_a_port_taken_between_bind_and_listen_is_noticed() -> None:
    async def main() -> None:
        first = bind("127.0.0.1", 0)
        second = bind("127.0.0.1", first.getsockname()[1])
        listen(first)
        engine = ScriptedEngine(TOKENIZER)
        with contextlib.closing(first), pytest.raises(PortInUse):
            await serve(create_app(engine, TOKENIZER), second)
        assert engine.closed and second.fileno() == -1

    run(main)


@pytest.mark.parametrize(
    ("host", "port", "words"), [("no such host", 0, "no such host"), ("192.0.2.1", 0, "192.0.2.1"), ("127.0.0.1", 99999, "99999")]
)
def test_addresses_that_cannot_be_bound(host: str, port: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        bind(host, port)


SERVER = """
import asyncio, sys
from miles_rollout.server import ServerConfig, bind, create_app, listen, serve
from miles_rollout.testing import ScriptedEngine
from miles_rollout.text import CharTokenizer

async def main():
    tokenizer = CharTokenizer("0123456789")
    engine = ScriptedEngine(tokenizer)
    if sys.argv[1] == "held":
        engine.hold()
    sock = bind("127.0.0.1", 0)
    listen(sock)
    print(sock.getsockname()[1], flush=True)
    await serve(create_app(engine, tokenizer, ServerConfig(drain_s=float(sys.argv[2]))), sock, log_level="error")
    print("finished", len(engine.finished), "aborted", len(engine.aborted), engine.closed, flush=True)

asyncio.run(main())
"""


def wait_for(http: httpx.Client, condition: Callable[[Any], bool]) -> None:
    """Ask the server about itself until `condition` holds, at most 20 s."""
    end = time.monotonic() + 20
    while not condition(http.get("/get_server_info").json()):
        assert time.monotonic() < end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("drain_s", [0.05, 60.0])
def test_signals_end_the_process_cleanly(number: signal.Signals, drain_s: float) -> None:
    command = [sys.executable, "-c", SERVER, "held", str(drain_s)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            port = int(process.stdout.readline())
            body = json.dumps({"input_ids": [5], "sampling_params": ENDLESS, "stream": False}).encode()
            with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
                head = (
                    f"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
                )
                connection.sendall(head.encode() + body)
                with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=20) as http:
                    wait_for(http, lambda state: state["num_requests"] == 1)
                    process.send_signal(number)
                    if drain_s > 1:
                        wait_for(http, lambda state: state["draining"])
                        process.send_signal(number)  # the second one does not wait for the deadline
                reply = b"".join(iter(lambda: connection.recv(65536), b""))
                assert b'"type":"abort"' in reply
            said, _ = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 0 and said.endswith("True\n"), said
