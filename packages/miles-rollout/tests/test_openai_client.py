"""OpenAI's own client, unmodified, against the server and through the router."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from replay import listening
from test_conformance import TOKENIZER

from miles_rollout.router import RouterConfig, create_router
from miles_rollout.server import ServerConfig
from miles_rollout.testing import ScriptedEngine, serving

openai = pytest.importorskip("openai")
CHAT: list[Any] = [{"role": "system", "content": "add"}, {"role": "user", "content": "1+1="}]


@contextlib.asynccontextmanager
async def served(routed: bool) -> AsyncIterator[Any]:
    async with contextlib.AsyncExitStack() as stack:
        config = ServerConfig(served_model_name="policy")
        url = await stack.enter_async_context(serving(ScriptedEngine(TOKENIZER, max_context=256), TOKENIZER, config))
        if routed:
            app = create_router([url], RouterConfig(health_interval_s=0.05))
            stack.push_async_callback(app.state.service.close)
            url = await stack.enter_async_context(listening(app))
        yield await stack.enter_async_context(
            openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=2, timeout=20)
        )


def run(main: Callable[[Any], Any], routed: bool) -> None:
    async def limited() -> None:
        async with asyncio.timeout(60), served(routed) as client:
            await main(client)

    asyncio.run(limited())


@pytest.mark.parametrize("routed", [False, True])
def test_chat(routed: bool) -> None:
    async def main(client: Any) -> None:
        options: Any = {"model": "policy", "messages": CHAT, "max_tokens": 6, "seed": 5, "n": 2, "temperature": 0.8, "top_p": 0.9}
        reply = await client.chat.completions.create(**options, logprobs=True)
        assert [choice.index for choice in reply.choices] == [0, 1] and reply.model == "policy"
        assert reply.usage.completion_tokens == sum(len(choice.logprobs.content) for choice in reply.choices)
        again = await client.chat.completions.create(**options)
        assert [choice.message.content for choice in again.choices] == [choice.message.content for choice in reply.choices]
        for choice in reply.choices:
            assert choice.message.role == "assistant" and choice.finish_reason in ("length", "stop")
            assert "".join(token.token for token in choice.logprobs.content).startswith(choice.message.content)
            assert all(token.logprob <= 0 for token in choice.logprobs.content)

        texts, reasons, usage = {0: "", 1: ""}, [], None
        stream = await client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True})
        async for event in stream:
            for choice in event.choices:
                texts[choice.index] += choice.delta.content or ""
                reasons += [choice.finish_reason] if choice.finish_reason else []
            usage = event.usage or usage
        assert [texts[0], texts[1]] == [choice.message.content for choice in reply.choices]
        assert len(reasons) == 2 and usage.total_tokens == reply.usage.total_tokens

        stop = next(char for char in reply.choices[0].message.content if char.strip())
        cut = await client.chat.completions.create(**options | {"n": 1}, stop=[stop])
        assert cut.choices[0].finish_reason == "stop" and stop not in cut.choices[0].message.content

    run(main, routed)


@pytest.mark.parametrize("routed", [False, True])
def test_completions(routed: bool) -> None:
    async def main(client: Any) -> None:
        reply = await client.completions.create(
            model="policy", prompt=["1+1=", "2+2="], max_tokens=5, seed=1, logprobs=0, echo=True
        )
        assert [choice.text[:4] for choice in reply.choices] == ["1+1=", "2+2="]
        assert all(len(choice.logprobs.tokens) == len(choice.logprobs.token_logprobs) for choice in reply.choices)
        ids = await client.completions.create(model="policy", prompt=TOKENIZER.encode("1+1="), max_tokens=5, seed=1)
        assert ids.choices[0].text == reply.choices[0].text[4:]
        text = ""
        async for event in await client.completions.create(model="policy", prompt="1+1=", max_tokens=5, seed=1, stream=True):
            text += "".join(choice.text for choice in event.choices)
        assert text == ids.choices[0].text
        extra = {"return_token_ids": True, "min_p": 0.1}
        more = await client.completions.create(model="policy", prompt="1+1=", max_tokens=5, seed=1, extra_body=extra)
        choice = more.choices[0].model_dump()
        assert len(choice["token_ids"]) == more.usage.completion_tokens
        assert choice["weight_spans"][0] == {"version": 0, "start": 0, "stop": len(choice["token_ids"])}
        assert more.model_dump()["metadata"]["weight_version"] == "0"

    run(main, routed)


def test_models_tools_and_errors() -> None:
    async def main(client: Any) -> None:
        assert [model.id async for model in await client.models.list()] == ["policy"]
        assert (await client.models.retrieve("policy")).id == "policy"
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve("other")
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="other", messages=CHAT)
        with pytest.raises(openai.BadRequestError, match="temperature"):
            await client.chat.completions.create(model="policy", messages=CHAT, temperature=-1)
        with pytest.raises(openai.BadRequestError, match="top_logprobs=21"):
            await client.chat.completions.create(model="policy", messages=CHAT, logprobs=True, top_logprobs=21)
        tool: Any = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
        with pytest.raises(openai.BadRequestError, match="tool"):  # the character tokenizer's template has none; see test_text_hf
            await client.chat.completions.create(model="policy", messages=CHAT, tools=[tool], max_tokens=2)

    run(main, False)


def test_likeliest_tokens() -> None:
    async def main(client: Any) -> None:
        reply = await client.chat.completions.create(model="policy", messages=CHAT, logprobs=True, top_logprobs=3, max_tokens=4)
        for each in reply.choices[0].logprobs.content:
            assert len(each.top_logprobs) == 3
            assert (each.top_logprobs[0].token, each.top_logprobs[0].logprob) == (each.token, each.logprob)
        stream = await client.chat.completions.create(
            model="policy", messages=CHAT, logprobs=True, top_logprobs=2, max_tokens=4, stream=True
        )
        parts = [event.choices[0].logprobs async for event in stream]
        told = [each for part in parts if part for each in part.content]
        assert told and all(len(each.top_logprobs) == 2 for each in told)
        legacy = await client.completions.create(model="policy", prompt="1+1=", logprobs=2, max_tokens=4)
        found = legacy.choices[0].logprobs
        assert found.tokens and all(len(each) == 2 for each in found.top_logprobs)
        assert [each[token] for each, token in zip(found.top_logprobs, found.tokens, strict=True)] == found.token_logprobs

    run(main, False)
