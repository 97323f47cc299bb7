"""The client against a real server on loopback: the same answers as the engine itself, deadlines, retries, refusals."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_rollout.client import RolloutClient, ServerError
from miles_rollout.engine import EngineRefusal
from miles_rollout.server import ServerConfig, bind
from miles_rollout.testing import ScriptedEngine, serving
from miles_rollout.text import CharTokenizer
from miles_rollout.wire import GenerateChunk, GenerateRequest, SamplingParams

TOKENIZER = CharTokenizer("0123456789\u2028\x85é世")
LINES = CharTokenizer("\u2028\x85\x0b\x0c\n\r\x1c")


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run an async test with a deadline."""

    async def limited() -> None:
        async with asyncio.timeout(40):
            await main()

    asyncio.run(limited())


def request(name: str = "r", **fields: Any) -> GenerateRequest:
    """A request of a few tokens that do not end early."""
    base: dict[str, Any] = {"seed": 9, "max_new_tokens": 6, "ignore_eos": True}
    whole = {key: fields.pop(key) for key in ("input_ids", "sample_ids", "return_prompt_logprobs") if key in fields}
    return GenerateRequest(request_id=name, sampling=SamplingParams(**base | fields), **{"input_ids": (5, 6, 7)} | whole)


REQUESTS = [
    request(),
    request(n=3),
    request(n=2, sample_ids=(70, 12)),
    request(return_prompt_logprobs=True),
    request(return_prompt_logprobs=True, input_ids=(5,), n=2),
    request(temperature=0.5, top_k=3, top_p=0.5, min_p=0.25, min_new_tokens=2),
    request(ignore_eos=False, max_new_tokens=60),
    request(stop=("4", "77"), max_new_tokens=60),
    request(stop_token_ids=(9,), max_new_tokens=60, seed=2**63 - 1),
]


@pytest.mark.parametrize("number", range(len(REQUESTS)))
def test_the_client_gives_what_the_engine_gives(number: int) -> None:
    async def main() -> None:
        engine = ScriptedEngine(TOKENIZER)
        asked = REQUESTS[number]
        async with serving(engine, TOKENIZER) as url, RolloutClient(url) as client:
            direct = await engine.generate(asked)
            assert await client.generate(asked) == direct
            assert [chunk async for chunk in client.stream(asked)] == [chunk async for chunk in engine.stream(asked)]
            assert client.info() == engine.info()
            assert (await client.refresh()) == engine.info()
            assert client.metrics()["num_generated_tokens"] == engine.num_tokens > 0

    run(main)


def test_line_separators_in_text_do_not_break_a_stream() -> None:
    async def main() -> None:
        engine = ScriptedEngine(LINES)
        asked = request(max_new_tokens=64)
        async with serving(engine, LINES) as url, RolloutClient(url) as client:
            assert [chunk async for chunk in client.stream(asked)] == [chunk async for chunk in engine.stream(asked)]

    run(main)


sampling_params = st.builds(
    SamplingParams,
    max_new_tokens=st.integers(1, 20),
    temperature=st.just(0.0) | st.floats(1e-6, 4),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 0.9),
    top_k=st.sampled_from([-1, 1, 50]),
    seed=st.integers(0, 2**63 - 1),
    n=st.integers(1, 3),
    ignore_eos=st.booleans(),
    stop=st.lists(st.text(alphabet="0123456789", min_size=1, max_size=2), max_size=2).map(tuple),
    stop_token_ids=st.lists(st.integers(0, 10), max_size=2).map(tuple),
)


@settings(max_examples=4, deadline=None)
@given(st.lists(sampling_params, min_size=8, max_size=8))
def test_every_sampling_field_arrives(params: list[SamplingParams]) -> None:
    seen: list[GenerateRequest] = []

    class Spy(ScriptedEngine):
        async def generate(self, request: GenerateRequest) -> Any:
            seen.append(request)
            return await super().generate(request)

    async def main() -> None:
        async with serving(Spy(TOKENIZER), TOKENIZER) as url, RolloutClient(url) as client:
            asked = [GenerateRequest(request_id="x", input_ids=(5,), sampling=each) for each in params]
            for each in asked:
                await client.generate(each)
            assert seen == asked

    run(main)


def test_many_at_once() -> None:
    async def main() -> None:
        engine = ScriptedEngine(TOKENIZER)
        asked = [request(f"r{i}", sample_ids=(i,)) for i in range(64)]
        async with serving(engine, TOKENIZER) as url, RolloutClient(url) as client:
            results = await asyncio.gather(*(client.generate(each) for each in asked))
            assert results == [await engine.generate(each) for each in asked]

    run(main)


def test_refusals_are_the_engines() -> None:
    async def main() -> None:
        async with serving(ScriptedEngine(TOKENIZER), TOKENIZER) as url, RolloutClient(url) as client:
            for bad, words in (
                (request(max_new_tokens=10**6), "context"),
                (request(input_ids=(999,)), "999"),
                (request(n=0), "n=0"),
            ):
                with pytest.raises(EngineRefusal, match=words):
                    await client.generate(bad)
                with pytest.raises(EngineRefusal, match=words):
                    await anext(client.stream(bad))

    run(main)


def test_failures_of_the_engine_are_server_errors() -> None:
    async def main() -> None:
        engine = ScriptedEngine(TOKENIZER, fail_after=2)
        async with serving(engine, TOKENIZER) as url, RolloutClient(url) as client:
            with pytest.raises(ServerError, match="500"):
                await client.generate(request())
            assert len(engine.started) == 1, "a failed request is not sent again"
            chunks: list[GenerateChunk] = []
            with pytest.raises(ServerError, match="failed"):
                async for chunk in client.stream(request()):
                    chunks.append(chunk)
            assert len(chunks) == 2

    run(main)


def test_leaving_a_stream_and_cancelling_a_call_abort_the_request() -> None:
    async def main() -> None:
        engine = ScriptedEngine(TOKENIZER)
        async with serving(engine, TOKENIZER) as url, RolloutClient(url) as client:
            engine.hold_after(1)
            async with contextlib.aclosing(client.stream(request("s", max_new_tokens=100))) as chunks:
                await anext(chunks)
            await engine.until(lambda: engine.aborted == ["s"])
            call = asyncio.ensure_future(client.generate(request("g")))
            await engine.until(lambda: engine.started == ["s", "g"])
            call.cancel()
            await engine.until(lambda: engine.aborted == ["s", "g"])

    run(main)


def test_abort_ends_a_request_with_what_it_has() -> None:
    async def main() -> None:
        engine = ScriptedEngine(TOKENIZER)
        async with serving(engine, TOKENIZER, ServerConfig(admin_token="secret")) as url:
            async with RolloutClient(url, "secret") as client, RolloutClient(url) as stranger:
                engine.hold_after(2)
                call = asyncio.ensure_future(client.generate(request("a", max_new_tokens=100)))
                await engine.until(lambda: engine.num_tokens == 2)
                with pytest.raises(ServerError, match="admin token"):
                    await stranger.abort("a")
                assert await client.abort("a")
                (completion,) = (await call).completions
                assert (completion.finish_reason, len(completion.token_ids)) == ("abort", 2)

    run(main)


def test_deadlines() -> None:
    async def main() -> None:
        engine = ScriptedEngine(TOKENIZER)
        async with serving(engine, TOKENIZER) as url, RolloutClient(url, timeout_s=0.3) as client:
            engine.hold()
            with pytest.raises(TimeoutError, match="0.3 s"):
                await client.generate(request("g"))
            await engine.until(lambda: engine.aborted == ["g"])
            with pytest.raises(TimeoutError, match="0.3 s"):
                await anext(client.stream(request("s")))
            await engine.release()
            engine.hold_after(1)
            with pytest.raises(TimeoutError, match="0.3 s"):
                async for _ in client.stream(request("t")):
                    pass

    run(main)


def test_a_server_that_is_not_there() -> None:
    async def main() -> None:
        with contextlib.closing(bind("127.0.0.1", 0)) as sock:
            url = f"http://127.0.0.1:{sock.getsockname()[1]}"
            client = RolloutClient(url, retries=1, backoff_s=0.0)
            with pytest.raises(ServerError, match=f"{url} did not serve the request in 2 attempts"):
                await client.generate(request())
            with pytest.raises(ServerError, match="not been asked"):
                client.info()
            with pytest.raises(ServerError):
                async with client:
                    pass

    run(main)


class Scripted:
    """A server that answers with raw bytes, one script per connection, and counts requests."""

    def __init__(self, *replies: bytes) -> None:
        self.replies = list(replies)
        self.num_requests = 0

    @contextlib.asynccontextmanager
    async def serving(self) -> Any:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = await reader.readuntil(b"\r\n\r\n")
            length = [line.split(b":")[1] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
            await reader.readexactly(int(length[0]) if length else 0)
            self.num_requests += 1
            writer.write(self.replies.pop(0))
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def http(status: int, body: bytes) -> bytes:
    """A whole HTTP reply."""
    return b"HTTP/1.1 %d X\r\ncontent-length: %d\r\n\r\n" % (status, len(body)) + body


GOOD = (
    b'{"text":"1","output_ids":[5],"meta_info":{"id":"r","finish_reason":{"type":"length","length":1},"cached_tokens":0,'
    b'"output_token_logprobs":[[-0.5,5,null]],"output_token_sampling_logprobs":[-0.25],"sample_id":0,'
    b'"weight_spans":[{"version":3,"start":0,"stop":1}],"contract_digest":"d"}}'
)
EVENTS = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n"


@pytest.mark.parametrize(
    ("replies", "num_requests", "words"),
    [
        ([b"", http(503, b'{"error":{"message":"draining"}}'), http(200, GOOD)], 3, None),
        ([http(503, b"")] * 3, 3, "3 attempts"),
        ([http(500, b"<html>boom</html>")], 1, "HTTP 500: <html>boom"),
        ([http(200, b"[]")], 1, "0 completions for n=1"),
        ([http(200, GOOD.replace(b'"sample_id":0,', b""))], 1, "does not answer as a Miles rollout server"),
        ([http(200, GOOD.replace(b'{"type":"length","length":1}', b"null"))], 1, "without finish_reason"),
        ([http(401, b'{"detail":"no"}')], 1, "HTTP 401"),
    ],
)
def test_what_is_retried_and_what_is_not(replies: list[bytes], num_requests: int, words: str | None) -> None:
    async def main() -> None:
        server = Scripted(*replies)
        async with server.serving() as url:
            client = RolloutClient(url, backoff_s=0.0)
            async with contextlib.aclosing(_Closing(client)):
                if words is None:
                    assert (await client.generate(request())).completions[0].weight_spans[0].version == 3
                else:
                    with pytest.raises(ServerError, match=words):
                        await client.generate(request())
        assert server.num_requests == num_requests

    run(main)


class _Closing:
    def __init__(self, client: RolloutClient) -> None:
        self.aclose = client.close


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (EVENTS + b"data: " + GOOD + b"\n\n", "ended without"),
        (EVENTS + b"data: " + GOOD + b'\n\ndata: {"error":{"message":"lost"}}\n\n', "failed: lost"),
        (EVENTS[:-2] + b"content-length: 9999\r\n\r\ndata: " + GOOD + b"\n\n", "broke off"),
    ],
)
def test_a_stream_that_has_begun_is_not_retried(reply: bytes, words: str) -> None:
    async def main() -> None:
        server = Scripted(reply)
        async with server.serving() as url:
            client = RolloutClient(url, backoff_s=0.0)
            async with contextlib.aclosing(_Closing(client)):
                chunks = []
                with pytest.raises(ServerError, match=words):
                    async for chunk in client.stream(request()):
                        chunks.append(chunk)
                assert [chunk.token_ids for chunk in chunks] == [(5,)]
        assert server.num_requests == 1

    run(main)


def test_a_stream_is_retried_before_its_first_token() -> None:
    async def main() -> None:
        server = Scripted(b"", http(503, b"{}"), EVENTS + b"data: " + GOOD + b"\n\ndata: [DONE]\n\n")
        async with server.serving() as url:
            client = RolloutClient(url, backoff_s=0.0)
            async with contextlib.aclosing(_Closing(client)):
                assert [chunk.weight_version async for chunk in client.stream(request())] == [3]
        assert server.num_requests == 3

    run(main)


def test_another_schema_is_refused() -> None:
    async def main() -> None:
        info = b'{"model":"m","contract_digest":"d","weight_version":0,"vocab_size":5,"max_context":9,"max_running":1,"schema":2}'
        server = Scripted(http(200, b'{"engine":' + info + b"}"))
        async with server.serving() as url:
            client = RolloutClient(url, backoff_s=0.0)
            async with contextlib.aclosing(_Closing(client)):
                with pytest.raises(ValueError, match="schema 2, this build reads schema 1"):
                    await client.refresh()

    run(main)
