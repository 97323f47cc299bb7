"""The /v1 routes over the scripted engine: OpenAI's shapes, SGLang's additions, our token ids."""

import asyncio
import json
from collections.abc import Callable, Coroutine
from typing import Any

import httpx
import pytest

from miles_rollout.server import ServerConfig, create_app
from miles_rollout.testing import ScriptedEngine
from miles_rollout.text import CharTokenizer
from miles_rollout.wire import GenerateRequest, GenerateResult, SamplingParams

TOKENIZER = CharTokenizer("0123456789+= abc")
FREE = {"ignore_eos": True, "seed": 4}
CHAT = {"messages": [{"role": "user", "content": "1+1="}]}


class Setting:
    """A server in this process, asked without a socket."""

    def __init__(self) -> None:
        self.engine = ScriptedEngine(TOKENIZER)
        self.app = create_app(self.engine, TOKENIZER, ServerConfig(served_model_name="tiny"))
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://test")

    async def ask(self, path: str, **body: Any) -> Any:
        response = await self.http.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    async def events(self, path: str, **body: Any) -> list[Any]:
        response = await self.http.post(path, json=body | {"stream": True})
        assert response.status_code == 200, response.text
        lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
        assert lines[-1] == "[DONE]"
        return [json.loads(line) for line in lines[:-1]]

    async def direct(self, prompt: list[int], **sampling: Any) -> GenerateResult:
        params = SamplingParams(seed=4, ignore_eos=True, **sampling)
        return await self.engine.generate(
            GenerateRequest(request_id="direct", input_ids=tuple(prompt), sampling=params, return_prompt_logprobs=True)
        )


def run(test: Callable[[Setting], Coroutine[Any, Any, None]]) -> None:
    """Run an async test with a deadline."""

    async def main() -> None:
        async with asyncio.timeout(30):
            await test(Setting())

    asyncio.run(main())


def test_models() -> None:
    async def body(s: Setting) -> None:
        listed = (await s.http.get("/v1/models")).json()
        assert listed["object"] == "list"
        (card,) = listed["data"]
        assert set(card) == {"id", "object", "created", "owned_by", "root", "parent", "max_model_len"}
        assert (card["id"], card["object"], card["max_model_len"]) == ("tiny", "model", 512)
        assert (await s.http.get("/v1/models/tiny")).json() == card
        missing = await s.http.get("/v1/models/nope")
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "model_not_found" and missing.json()["error"]["param"] == "model"

    run(body)


def test_a_completion() -> None:
    async def body(s: Setting) -> None:
        reply = await s.ask("/v1/completions", model="tiny", prompt="1+1=", max_tokens=4, return_token_ids=True, **FREE)
        assert set(reply) == {"id", "object", "created", "model", "choices", "usage", "metadata"}
        assert (reply["object"], reply["model"]) == ("text_completion", "tiny") and reply["id"].startswith("cmpl-")
        assert reply["usage"] == {
            "prompt_tokens": 4, "total_tokens": 8, "completion_tokens": 4, "prompt_tokens_details": None, "reasoning_tokens": 0,
        }  # fmt: skip
        assert reply["metadata"] == {"weight_version": "0", "contract_digest": "mk1-scripted", "seed": 4}
        (choice,) = reply["choices"]
        expected = (await s.direct(TOKENIZER.encode("1+1="), max_new_tokens=4)).completions[0]
        assert choice == {
            "index": 0, "text": expected.text, "logprobs": None, "finish_reason": "length", "matched_stop": None,
            "token_ids": list(expected.token_ids), "weight_spans": [{"version": 0, "start": 0, "stop": 4}], "sample_id": 0,
            "prompt_token_ids": TOKENIZER.encode("1+1="),
        }  # fmt: skip
        ids = await s.ask("/v1/completions", prompt=TOKENIZER.encode("1+1="), max_tokens=4, **FREE)
        assert ids["choices"][0]["text"] == expected.text
        assert set(ids["choices"][0]) == {"index", "text", "logprobs", "finish_reason", "matched_stop"}

    run(body)


def test_prompt_lists_and_n_number_the_choices() -> None:
    async def body(s: Setting) -> None:
        reply = await s.ask("/v1/completions", prompt=["1", "22"], n=2, max_tokens=3, **FREE)
        assert [choice["index"] for choice in reply["choices"]] == [0, 1, 2, 3]
        assert reply["usage"]["prompt_tokens"] == 3 and reply["usage"]["completion_tokens"] == 12
        by_ids = await s.ask("/v1/completions", prompt=[TOKENIZER.encode("1"), TOKENIZER.encode("22")], n=2, max_tokens=3, **FREE)
        assert [c["text"] for c in by_ids["choices"]] == [c["text"] for c in reply["choices"]]
        events = await s.events("/v1/completions", prompt=["1", "22"], n=2, max_tokens=3, **FREE)
        texts = {i: "".join(e["choices"][0]["text"] for e in events if e["choices"][0]["index"] == i) for i in range(4)}
        assert [texts[i] for i in range(4)] == [c["text"] for c in reply["choices"]]
        swapped = await s.ask("/v1/completions", prompt=["1", "22"], n=2, sample_ids=[[1, 0], [0, 1]], max_tokens=3, **FREE)
        assert [c["text"] for c in swapped["choices"][:2]] == [c["text"] for c in reversed(reply["choices"][:2])]

    run(body)


def test_completion_logprobs_and_echo() -> None:
    async def body(s: Setting) -> None:
        prompt = TOKENIZER.encode("1+1=")
        direct = await s.direct(prompt, max_new_tokens=3)
        expected, known = direct.completions[0], direct.prompt_logprobs
        assert known is not None
        plain = (await s.ask("/v1/completions", prompt="1+1=", max_tokens=3, logprobs=0, **FREE))["choices"][0]["logprobs"]
        assert set(plain) == {"text_offset", "token_logprobs", "tokens", "top_logprobs"}
        assert plain["token_logprobs"] == list(expected.logprobs) and "".join(plain["tokens"]) == expected.text
        assert plain["text_offset"] == [0, 1, 2]
        echoed = (await s.ask("/v1/completions", prompt="1+1=", max_tokens=3, logprobs=0, echo=True, **FREE))["choices"][0]
        assert echoed["text"] == "1+1=" + expected.text
        assert echoed["logprobs"]["token_logprobs"] == [None, *known[1:], *expected.logprobs]
        assert echoed["logprobs"]["text_offset"] == list(range(7))
        quiet = (await s.ask("/v1/completions", prompt="1+1=", max_tokens=3, echo=True, **FREE))["choices"][0]
        assert (quiet["text"], quiet["logprobs"]) == (echoed["text"], None)
        events = await s.events("/v1/completions", prompt="1+1=", max_tokens=3, echo=True, **FREE)
        assert "".join(e["choices"][0]["text"] for e in events) == echoed["text"]
        events = await s.events("/v1/completions", prompt="1+1=", max_tokens=3, logprobs=0, **FREE)
        assert [e["choices"][0]["logprobs"]["text_offset"] for e in events] == [[0], [1], [2]]

    run(body)


def test_a_completion_stream_ends_with_usage_when_asked() -> None:
    async def body(s: Setting) -> None:
        options = {"include_usage": True}
        events = await s.events(
            "/v1/completions", prompt="1+1=", max_tokens=3, stream_options=options, return_token_ids=True, **FREE
        )
        *chunks, last = events
        assert last["choices"] == [] and last["usage"]["total_tokens"] == 7
        assert {e["id"] for e in events} == {last["id"]}
        assert [e["choices"][0]["finish_reason"] for e in chunks] == [None, None, "length"]
        expected = (await s.direct(TOKENIZER.encode("1+1="), max_new_tokens=3)).completions[0]
        assert [i for e in chunks for i in e["choices"][0]["token_ids"]] == list(expected.token_ids)
        assert all("usage" not in e for e in chunks)
        assert all(e["metadata"] == {"weight_version": "0"} for e in chunks)

    run(body)


def test_a_chat() -> None:
    async def body(s: Setting) -> None:
        prompt = TOKENIZER.apply_chat_template(CHAT["messages"])
        expected = (await s.direct(prompt, max_new_tokens=3)).completions[0]
        reply = await s.ask("/v1/chat/completions", **CHAT, max_tokens=3, logprobs=True, return_token_ids=True, **FREE)
        assert reply["object"] == "chat.completion" and reply["prompt_token_ids"] == prompt
        (choice,) = reply["choices"]
        assert choice["message"] == {"role": "assistant", "content": expected.text, "reasoning_content": None, "tool_calls": None}
        assert [each["logprob"] for each in choice["logprobs"]["content"]] == list(expected.logprobs)
        assert bytes(b for each in choice["logprobs"]["content"] for b in each["bytes"]).decode() == expected.text
        assert all(set(each) == {"token", "bytes", "logprob", "top_logprobs"} for each in choice["logprobs"]["content"])
        assert choice["token_ids"] == list(expected.token_ids)
        parts = [{"type": "text", "text": "1+"}, {"type": "text", "text": "1="}]
        same = await s.ask("/v1/chat/completions", messages=[{"role": "user", "content": parts}], max_completion_tokens=3, **FREE)
        assert same["choices"][0]["message"]["content"] == expected.text
        assert same["usage"]["prompt_tokens"] == len(prompt)
        several = await s.ask("/v1/chat/completions", **CHAT, max_tokens=3, n=3, **FREE)
        assert [each["index"] for each in several["choices"]] == [0, 1, 2]

    run(body)


def test_a_chat_without_limit_may_fill_the_context() -> None:
    async def body(s: Setting) -> None:
        reply = await s.ask("/v1/chat/completions", **CHAT, **FREE)
        assert reply["usage"]["total_tokens"] == 512 and reply["choices"][0]["finish_reason"] == "length"

    run(body)


def test_a_chat_stream() -> None:
    async def body(s: Setting) -> None:
        whole = await s.ask("/v1/chat/completions", **CHAT, max_tokens=3, n=2, **FREE)
        options: dict[str, Any] = {"stream_options": {"include_usage": True}, "logprobs": True, "return_token_ids": True}
        events = await s.events("/v1/chat/completions", **CHAT, max_tokens=3, n=2, **options, **FREE)
        assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == 6
        for i in range(2):
            mine = [e["choices"][0] for e in events[:-1] if e["choices"][0]["index"] == i]
            assert mine[0]["delta"] == {"role": "assistant", "content": ""}
            assert "".join(c["delta"].get("content", "") for c in mine) == whole["choices"][i]["message"]["content"]
            assert [c["finish_reason"] for c in mine] == [None] * 4 + ["length"]
            assert mine[-1]["delta"] == {}
            assert all(len(c["logprobs"]["content"]) == len(c["token_ids"]) == 1 for c in mine[1:-1])

    run(body)


def test_stop_strings_reach_the_reply() -> None:
    async def body(s: Setting) -> None:
        free = (await s.ask("/v1/completions", prompt="1", max_tokens=20, **FREE))["choices"][0]["text"]
        stop = free[5:7]
        for path, prompt in (("/v1/completions", {"prompt": "1"}),):
            choice = (await s.ask(path, **prompt, max_tokens=20, stop=[stop], **FREE))["choices"][0]
            assert (choice["finish_reason"], choice["matched_stop"]) == ("stop", stop)
            assert choice["text"] == free[: free.find(stop)]
            events = await s.events(path, **prompt, max_tokens=20, stop=stop, **FREE)
            assert "".join(e["choices"][0]["text"] for e in events) == choice["text"]
            assert events[-1]["choices"][0]["matched_stop"] == stop

    run(body)


REFUSED: list[tuple[str, dict[str, Any], str | None, str]] = [
    ("completions", {}, "prompt", "prompt"),
    ("completions", {"prompt": ""}, "prompt", "empty"),
    ("completions", {"prompt": []}, "prompt", "list of"),
    ("completions", {"prompt": [5, "a"]}, "prompt", "list of"),
    ("completions", {"prompt": [[5], "a"]}, "prompt", "list of"),
    ("completions", {"prompt": "1", "max_tokens": 0}, None, "max_new_tokens=0"),
    ("completions", {"prompt": "1", "max_tokens": 99999}, None, "context"),
    ("completions", {"prompt": "1", "logprobs": 21}, "logprobs", "0..20"),
    ("completions", {"prompt": "1", "logprobs": 2, "echo": True}, "logprobs", "echo"),
    ("completions", {"prompt": "1", "suffix": "x"}, "suffix", "not supported"),
    ("completions", {"prompt": "1", "best_of": 4}, "best_of", "only 1"),
    ("completions", {"prompt": "1", "stream_options": {}}, "stream_options", "stream"),
    ("completions", {"prompt": "1", "stream": True, "stream_options": {"x": 1}}, "stream_options", "x"),
    ("completions", {"prompt": "1", "stream": True, "echo": True, "logprobs": 0}, "echo", "stream"),
    ("completions", {"prompt": "1", "sample_ids": [1, 2]}, "sample_ids", "n=1"),
    ("completions", {"prompt": "1", "max_token": 3}, "max_token", 'mean "max_tokens"'),
    ("chat/completions", {}, "messages", "messages"),
    ("chat/completions", {"messages": []}, "messages", "empty"),
    ("chat/completions", {"messages": [{"role": "robot", "content": "1"}]}, "messages[0].role", "robot"),
    ("chat/completions", {"messages": [{"role": "user"}]}, "messages[0].content", "text"),
    ("chat/completions", {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content", "not text"),
    ("chat/completions", {"messages": [{"role": "user", "content": "x"}]}, "messages", "'x' at 0"),
    ("chat/completions", CHAT | {"temperature": -1}, None, "temperature"),
    ("chat/completions", CHAT | {"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    ("chat/completions", CHAT | {"tool_choice": "required"}, "tool_choice", "not supported"),
    ("chat/completions", CHAT | {"response_format": {"type": "json_object"}}, "response_format", "not supported"),
    ("chat/completions", CHAT | {"tools": [{"type": "function"}]}, "messages", "tools"),
    ("chat/completions", CHAT | {"chat_template_kwargs": {"deep": 1}}, "messages", "deep"),
]


@pytest.mark.parametrize(("path", "body", "param", "words"), REFUSED, ids=[f"{p}-{w}" for p, _, _, w in REFUSED])
def test_refusals_name_the_parameter(path: str, body: dict[str, Any], param: str | None, words: str) -> None:
    async def check(s: Setting) -> None:
        response = await s.http.post(f"/v1/{path}", json=body)
        assert response.status_code == 400, response.text
        reply = response.json()
        assert set(reply) == {"object", "message", "type", "param", "code"}
        assert (reply["object"], reply["type"], reply["code"]) == ("error", "BadRequestError", 400)
        assert reply["param"] == param and words in reply["message"], reply

    run(check)


def test_unknown_models_and_engine_failures() -> None:
    async def body(s: Setting) -> None:
        response = await s.http.post("/v1/completions", json={"model": "gpt-4", "prompt": "1"})
        assert response.status_code == 404 and "tiny" in response.json()["error"]["message"]
        s.engine.fail_after = 0
        for path, request in (("completions", {"prompt": "1"}), ("chat/completions", CHAT)):
            response = await s.http.post(f"/v1/{path}", json=request)
            assert response.status_code == 500 and "scripted" not in response.text
            assert response.json()["type"] == "InternalServerError"

    run(body)
