"""POST /generate over the scripted engine: SGLang's shapes, our extensions, batches, streams."""

import asyncio
import json
import re
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import pytest

from miles_rollout.client import RolloutClient
from miles_rollout.server import ServerConfig, create_app
from miles_rollout.server.sse import event_bytes
from miles_rollout.testing import ScriptedEngine, serving
from miles_rollout.text import CharTokenizer
from miles_rollout.wire import GenerateRequest, SamplingParams

ALPHABET = "0123456789+= abc"
META = {
    "id", "finish_reason", "prompt_tokens", "weight_version", "completion_tokens", "cached_tokens", "sample_id", "sampling_seed",
    "weight_spans", "contract_digest", "e2e_latency",
}  # fmt: skip
META_LOGPROB = {"input_token_logprobs", "output_token_logprobs", "output_token_logprobs_length", "output_token_sampling_logprobs"}


class Setting:
    """A server in this process, asked without a socket."""

    def __init__(self, **config: Any) -> None:
        self.tokenizer = CharTokenizer(ALPHABET)
        self.engine = ScriptedEngine(self.tokenizer)
        self.app = create_app(self.engine, self.tokenizer, ServerConfig(**config))
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(self.app, client=("127.0.0.1", 5)), base_url="http://test")

    async def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        return await self.http.post(path, json=body, **options)

    async def generate(self, **body: Any) -> Any:
        response = await self.post("/generate", body)
        assert response.status_code == 200, response.text
        return response.json()

    async def events(self, path: str = "/generate", **body: Any) -> list[Any]:
        response = await self.post(path, body | {"stream": True})
        assert response.status_code == 200, response.text
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]


def run(test: Callable[[Setting], Coroutine[Any, Any, None]], **config: Any) -> None:
    """Run an async test with a deadline."""

    async def main() -> None:
        async with asyncio.timeout(30):
            await test(Setting(**config))

    asyncio.run(main())


def test_one_prompt_has_sglangs_shape_and_the_engines_tokens() -> None:
    async def body(s: Setting) -> None:
        sampling = {"temperature": 1.0, "max_new_tokens": 8, "ignore_eos": True, "sampling_seed": 7}
        reply = await s.generate(text="1+1=", rid="mine", sampling_params=sampling)
        assert set(reply) == {"text", "output_ids", "meta_info"}
        assert set(reply["meta_info"]) == META
        meta = reply["meta_info"]
        assert meta["id"] == "mine"
        assert meta["finish_reason"] == {"type": "length", "length": 8}
        assert (meta["prompt_tokens"], meta["completion_tokens"]) == (4, 8)
        assert meta["weight_version"] == "0" and meta["weight_spans"] == [{"version": 0, "start": 0, "stop": 8}]
        assert (meta["sample_id"], meta["sampling_seed"], meta["contract_digest"]) == (0, 7, "mk1-scripted")
        params = SamplingParams(max_new_tokens=8, seed=7, ignore_eos=True)
        direct = await s.engine.generate(
            GenerateRequest(request_id="x", input_ids=tuple(s.tokenizer.encode("1+1=")), sampling=params)
        )
        assert reply["output_ids"] == list(direct.completions[0].token_ids)
        assert reply["text"] == direct.completions[0].text == s.tokenizer.decode(reply["output_ids"])

    run(body)


def test_logprobs_are_triples_and_keep_every_bit() -> None:
    async def body(s: Setting) -> None:
        ids = s.tokenizer.encode("12+3=")
        sampling = {"max_new_tokens": 4, "ignore_eos": True, "sampling_seed": 3}
        for start in (-1, 0, 2, 5):
            reply = await s.generate(input_ids=ids, sampling_params=sampling, return_logprob=True, logprob_start_len=start)
            meta = reply["meta_info"]
            assert set(meta) == META | META_LOGPROB
            assert [entry[1] for entry in meta["output_token_logprobs"]] == reply["output_ids"]
            assert all(entry[2] is None for entry in meta["output_token_logprobs"])
            request = GenerateRequest(
                request_id="x",
                input_ids=tuple(ids),
                sampling=SamplingParams(max_new_tokens=4, seed=3, ignore_eos=True),
                return_prompt_logprobs=True,
            )
            direct = await s.engine.generate(request)
            assert tuple(entry[0] for entry in meta["output_token_logprobs"]) == direct.completions[0].logprobs
            assert tuple(meta["output_token_sampling_logprobs"]) == direct.completions[0].sampled_logprobs
            assert meta["output_token_logprobs_length"] == 4
            assert direct.prompt_logprobs is not None
            known = [] if start < 0 else [[lp, i, None] for lp, i in zip(direct.prompt_logprobs, ids, strict=True)][start:]
            if known:
                known[0][0] = None
            assert meta["input_token_logprobs"] == known
        with_text = await s.generate(input_ids=ids, sampling_params=sampling, return_logprob=True, return_text_in_logprobs=True)
        assert "".join(entry[2] for entry in with_text["meta_info"]["output_token_logprobs"]) == with_text["text"]

    run(body)


def test_likeliest_tokens_are_triples_too() -> None:
    async def body(s: Setting) -> None:
        body: dict[str, Any] = {
            "text": ["1+1=", "2"],
            "sampling_params": {"max_new_tokens": 4, "ignore_eos": True, "sampling_seed": 3},
            "return_logprob": True,
            "top_logprobs_num": [2, 0],
            "return_text_in_logprobs": True,
        }
        first, second = await s.generate(**body)
        assert "output_top_logprobs" not in second["meta_info"]
        meta = first["meta_info"]
        assert meta["input_top_logprobs"] == [] and len(meta["output_top_logprobs"]) == 4
        for entries, sampled in zip(meta["output_top_logprobs"], meta["output_token_logprobs"], strict=True):
            assert entries[0] == sampled and len(entries) == 2 and entries[1][1] == entries[0][1] + 1
        request = GenerateRequest(
            request_id="t", input_ids=(5, 6), sampling=SamplingParams(max_new_tokens=3, ignore_eos=True), num_top_logprobs=2
        )
        direct = (await s.engine.generate(request)).completions[0].top_logprobs
        async with serving(s.engine, s.tokenizer) as url, RolloutClient(url) as client:
            assert (await client.generate(request)).completions[0].top_logprobs == direct != ()
            chunks = [chunk async for chunk in client.stream(request)]
            assert tuple(each for chunk in chunks for each in chunk.top_logprobs) == direct

    run(body)


def test_batches_and_n_are_lists_in_order() -> None:
    async def body(s: Setting) -> None:
        params = [
            {"max_new_tokens": 2, "ignore_eos": True, "sampling_seed": 1},
            {"max_new_tokens": 3, "ignore_eos": True, "n": 2},
        ]
        replies = await s.generate(text=["1+1=", "2"], rid="pre", sampling_params=params, return_logprob=[True, False])
        assert [each["meta_info"]["id"] for each in replies] == ["pre_0", "pre_1_0", "pre_1_1"]
        assert [each["meta_info"]["completion_tokens"] for each in replies] == [2, 3, 3]
        assert ["output_token_logprobs" in each["meta_info"] for each in replies] == [True, False, False]
        assert replies[1]["output_ids"] != replies[2]["output_ids"], "completions of one prompt have noise of their own"
        one = await s.generate(input_ids=[[5, 6]], sampling_params={"max_new_tokens": 1})
        assert isinstance(one, list) and len(one) == 1
        two = await s.generate(input_ids=[5, 6], sampling_params={"max_new_tokens": 1, "n": 2})
        assert [each["meta_info"]["sample_id"] for each in two] == [0, 1]

    run(body)


def test_sample_ids_and_seeds_key_the_tokens() -> None:
    async def body(s: Setting) -> None:
        sampling = {"max_new_tokens": 6, "ignore_eos": True, "sampling_seed": 11, "n": 2}
        both = await s.generate(input_ids=[5], sampling_params=sampling, sample_ids=[40, 41])
        swapped = await s.generate(input_ids=[[5], [5]], sampling_params=sampling | {"n": 1}, sample_ids=[[41], [40]])
        assert [each["output_ids"] for each in both] == [each["output_ids"] for each in reversed(swapped)]
        unseeded = {"max_new_tokens": 12, "ignore_eos": True}
        first, second = [await s.generate(input_ids=[5], sampling_params=unseeded) for _ in range(2)]
        assert first["output_ids"] != second["output_ids"], "without a seed every request draws its own"
        again = await s.generate(input_ids=[5], sampling_params=unseeded | {"sampling_seed": first["meta_info"]["sampling_seed"]})
        assert again["output_ids"] == first["output_ids"]

    run(body)


def test_stop_reasons() -> None:
    async def body(s: Setting) -> None:
        base = {"max_new_tokens": 40, "ignore_eos": True, "sampling_seed": 5}
        free = await s.generate(input_ids=[5, 6], sampling_params=base)
        word = free["text"][3:5]
        at = free["text"].find(word)
        cut = await s.generate(input_ids=[5, 6], sampling_params=base | {"stop": word})
        assert cut["meta_info"]["finish_reason"] == {"type": "stop", "matched": word}
        assert cut["text"] == free["text"][:at] and len(cut["output_ids"]) == at + 2
        token = free["output_ids"][4]
        stopped = await s.generate(input_ids=[5, 6], sampling_params=base | {"stop_token_ids": [token]})
        assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": token}
        assert stopped["output_ids"][-1] == token

    run(body)


def test_streams_are_cumulative_or_incremental() -> None:
    async def body(s: Setting) -> None:
        sampling = {"max_new_tokens": 5, "ignore_eos": True, "sampling_seed": 2}
        whole = await s.generate(input_ids=[5, 6], sampling_params=sampling, return_logprob=True)
        events = await s.events(input_ids=[5, 6], sampling_params=sampling, return_logprob=True)
        assert [len(each["output_ids"]) for each in events] == [1, 2, 3, 4, 5]
        assert [each["meta_info"]["finish_reason"] for each in events[:-1]] == [None] * 4
        last = events[-1]
        assert (last["text"], last["output_ids"]) == (whole["text"], whole["output_ids"])
        assert "index" not in last
        same = META_LOGPROB | {
            "finish_reason",
            "prompt_tokens",
            "completion_tokens",
            "weight_spans",
            "sample_id",
            "contract_digest",
        }
        assert {name: last["meta_info"][name] for name in same} == {name: whole["meta_info"][name] for name in same}
        pieces = await s.events(input_ids=[5, 6], sampling_params=sampling, return_logprob=True, stream_incremental=True)
        assert "".join(each["text"] for each in pieces) == whole["text"]
        assert [i for each in pieces for i in each["output_ids"]] == whole["output_ids"]
        assert [each["meta_info"]["output_token_logprobs"] for each in pieces] == [
            [entry] for entry in whole["meta_info"]["output_token_logprobs"]
        ]

    run(body)


def test_batch_streams_say_which_completion_they_mean() -> None:
    async def body(s: Setting) -> None:
        sampling = {"max_new_tokens": 3, "ignore_eos": True, "sampling_seed": 2, "n": 2}
        whole = await s.generate(input_ids=[[5], [6, 7]], sampling_params=sampling)
        events = await s.events(input_ids=[[5], [6, 7]], sampling_params=sampling)
        last = {each["index"]: each for each in events}
        assert sorted(last) == [0, 1, 2, 3]
        assert [last[i]["output_ids"] for i in range(4)] == [each["output_ids"] for each in whole]
        assert [last[i]["meta_info"]["prompt_tokens"] for i in range(4)] == [1, 1, 2, 2]

    run(body)


def test_a_failure_in_mid_stream_is_an_event() -> None:
    async def body(s: Setting) -> None:
        s.engine.fail_after = 2
        for prompts in ([5], [[5], [6]]):
            events = await s.events(input_ids=prompts, sampling_params={"max_new_tokens": 5, "ignore_eos": True})
            assert events[-1]["error"]["code"] == 500 and events[-1]["error"]["retryable"] is False
            assert "scripted" not in json.dumps(events[-1]), "what went wrong inside stays in the log"
        assert not s.app.state.service.running

    run(body)


NEUTRAL = {
    "frequency_penalty": 0.0, "presence_penalty": 0, "repetition_penalty": 1.0, "logit_bias": None, "regex": None,
    "skip_special_tokens": True, "no_stop_trim": False, "top_k": None, "stop": None,
}  # fmt: skip


def test_parameters_at_values_without_effect_are_accepted() -> None:
    async def body(s: Setting) -> None:
        sampling = {"max_new_tokens": 1, "sampling_seed": 1}
        plain = await s.generate(input_ids=[5], sampling_params=sampling)
        reply = await s.generate(input_ids=[5], sampling_params=sampling | NEUTRAL, top_logprobs_num=0, lora_path=None)
        assert reply["output_ids"] == plain["output_ids"]

    run(body)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "input_ids"),
    ({"text": "1", "input_ids": [5]}, "one of them"),
    ({"text": ""}, "empty"),
    ({"input_ids": []}, "empty"),
    ({"input_ids": [[5], []]}, "empty"),
    ({"input_ids": [5, [6]]}, r"input_ids\[0\]"),
    ({"input_ids": ["5"]}, "input_ids"),
    ({"input_ids": [-1]}, "-1"),
    ({"input_ids": [9999]}, "9999"),
    ({"input_ids": [5] * 600}, "context"),
    ({"text": "x"}, "'x' at 0"),
    ({"text": 5}, "text"),
    ({"input_ids": [5], "sampling_params": 3}, "sampling_params is a JSON number"),
    ({"input_ids": [5], "sampling_params": [{}]}, "sampling_params is a list"),
    ({"input_ids": [5], "sampling_params": {"max_new_tokens": 0}}, "max_new_tokens=0"),
    ({"input_ids": [5], "sampling_params": {"max_new_tokens": "x"}}, r'"sampling_params.max_new_tokens": expected `int`'),
    ({"input_ids": [5], "sampling_params": {"temperature": -1}}, "temperature=-1"),
    ({"input_ids": [5], "sampling_params": {"temperature": "hot"}}, "sampling_params.temperature"),
    ({"input_ids": [5], "sampling_params": {"top_p": 0, "top_k": 0}}, "top_p=.*top_k=0"),
    ({"input_ids": [5], "sampling_params": {"stop": 5}}, "sampling_params.stop"),
    ({"input_ids": [5], "sampling_params": {"n": 0}}, "n=0"),
    ({"input_ids": [5], "sampling_params": {"n": 10**7}}, "limit of 1024"),
    ({"input_ids": [5], "sampling_params": {"sampling_seed": -4}}, "seed=-4"),
    ({"input_ids": [5], "sampling_params": {"temprature": 1}}, 'did you mean "temperature"'),
    ({"input_ids": [5], "sampling_params": {"frequency_penalty": 0.5}}, '"sampling_params.frequency_penalty" is not supported'),
    ({"input_ids": [5], "sampling_params": {"regex": "a+"}}, '"sampling_params.regex" is not supported'),
    ({"input_ids": [5], "top_logprobs_num": 3}, "top_logprobs_num is of sampled tokens: ask with return_logprob"),
    ({"input_ids": [5], "return_logprob": True, "top_logprobs_num": 21}, "top_logprobs_num=21"),
    ({"input_ids": [5], "return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": 2}, "without logprob_start_len"),
    ({"input_ids": [5], "return_hidden_states": True}, "return_hidden_states"),
    ({"input_ids": [5], "no_such_field": 1}, "no_such_field"),
    ({"input_ids": [5], "return_logprob": True, "logprob_start_len": 9}, "logprob_start_len=9"),
    ({"input_ids": [5], "return_logprob": True, "logprob_start_len": -5}, "logprob_start_len=-5"),
    ({"input_ids": [5], "return_logprob": True, "logprob_start_len": 0, "stream": True}, "logprob_start_len"),
    ({"input_ids": [[5], [6]], "rid": ["a"]}, "rid has 1"),
    ({"input_ids": [[5], [6]], "rid": ["a", "a"]}, "already in use"),
    ({"input_ids": [5], "sample_ids": [1, 2]}, "sample_ids"),
    ({"input_ids": [5], "sample_ids": [2**63]}, "sample_ids holds 9223372036854775808"),
    ({"input_ids": [5], "sample_ids": [-1]}, "sample_ids holds -1"),
    ({"input_ids": [2**70]}, "input_ids holds"),
    ({"input_ids": [5], "sampling_params": {"stop_token_ids": [2**40]}}, "stop_token_ids holds"),
    ({"input_ids": [5], "sampling_params": {"top_k": 2**31}}, "top_k=2147483648"),
    ({"input_ids": [5], "sampling_params": {"temperature": 1e-300}}, "temperature=1e-300"),
    ({"input_ids": [5], "sampling_params": {"temperature": 1e300}}, "temperature=1e.300"),
    ({"input_ids": [5], "sampling_params": {"top_p": 1e-300}}, "top_p=1e-300"),
    ({"input_ids": [[5]], "sample_ids": [1]}, "sample_ids"),
    ({"input_ids": [[5], [6]], "sample_ids": [[1]]}, "sample_ids"),
]


@pytest.mark.parametrize(("body", "words"), REFUSED, ids=[words for _, words in REFUSED])
@pytest.mark.parametrize("stream", [False, True])
def test_refusals_are_400_and_name_what_is_wrong(body: dict[str, Any], words: str, stream: bool) -> None:
    async def check(s: Setting) -> None:
        response = await s.post("/generate", body | ({"stream": True} if stream else {}))
        assert response.status_code == 400, response.text
        reply = response.json()
        assert set(reply) == {"error"} and set(reply["error"]) == {"message"}

        assert re.search(words, reply["error"]["message"]), reply
        assert not s.app.state.service.running

    run(check)


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"", {}, 400),
        (b"[1,2]", {}, 400),
        (b'"text"', {}, 400),
        (b"\xff\xfe", {}, 400),
        (b"[" * 100000, {}, 400),
        (b'{"input_ids": [5]}', {"content-type": "text/plain"}, 400),
        (b'{"text": "' + b"1" * 5000 + b'"}', {}, 413),
    ],
)
def test_bodies_that_are_no_request(content: bytes, headers: dict[str, str], status: int) -> None:
    async def check(s: Setting) -> None:
        sent = {"content-type": "application/json"} | headers
        response = await s.http.post("/generate", content=content, headers=sent)
        assert response.status_code == status
        assert "message" in response.json()["error"]

        async def chunks() -> Any:
            yield content

        response = await s.http.post("/generate", content=chunks(), headers=sent)
        assert response.status_code == status, "the same without a content-length"

    run(check, max_body_bytes=110000 if status == 400 else 4096)


def test_unknown_routes_and_methods() -> None:
    async def body(s: Setting) -> None:
        for method, path, status in (
            ("GET", "/nowhere", 404), ("POST", "/nowhere", 404), ("GET", "/generate", 405), ("DELETE", "/health", 405),
            ("HEAD", "/health", 405),
        ):  # fmt: skip
            response = await s.http.request(method, path)
            assert response.status_code == status
            if method != "HEAD":
                assert response.json() == {"detail": {404: "Not Found", 405: "Method Not Allowed"}[status]}
        put = await s.http.put("/generate", json={"input_ids": [5], "sampling_params": {"max_new_tokens": 1}})
        assert put.status_code == 200

    run(body)


def test_a_server_without_tokenizer_takes_ids_only() -> None:
    async def main() -> None:
        engine = ScriptedEngine(CharTokenizer(ALPHABET))
        transport = httpx.ASGITransport(create_app(engine))
        async with asyncio.timeout(30), httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            assert (await http.post("/generate", json={"input_ids": [5]})).status_code == 200
            for path, body in (
                ("/generate", {"text": "1"}),
                ("/v1/completions", {"prompt": "1"}),
                ("/v1/chat/completions", {"messages": []}),
            ):
                response = await http.post(path, json=body)
                assert response.status_code == 400 and "no tokenizer" in response.text

    asyncio.run(main())


def test_an_event_is_one_line_to_every_reader() -> None:
    text = "a\x85b\u2028c\u2029d\x1ce\nf"
    event = event_bytes({"text": text})
    lines = event.decode().splitlines()
    assert lines[1:] == [""] and json.loads(lines[0].removeprefix("data: ")) == {"text": text}
