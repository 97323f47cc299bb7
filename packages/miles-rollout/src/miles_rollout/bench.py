"""A steady load on a server: so many requests at a time, each of random prompt ids; tokens per second and latencies."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from typing import Any

import msgspec

from miles_rollout.upstream import Upstream, UpstreamError

JSON = "Content-Type: application/json\r\n"


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What to send. Example: Load(concurrency=8, requests=64)"""

    concurrency: int = 32
    requests: int = 256
    prompt_tokens: int = 32
    new_tokens: int = 64
    vocab_size: int = 0
    """Prompt ids are drawn below this; 0 asks the server."""
    stream: bool = False
    seed: int = 0
    timeout_s: float = 600.0

    def validate(self) -> None:
        """Raise ValueError naming every setting outside its range."""
        names = ("concurrency", "requests", "prompt_tokens", "new_tokens")
        wrong = [f"{name}={getattr(self, name)} must be at least 1" for name in names if getattr(self, name) < 1]
        if wrong:
            raise ValueError("bench: " + "; ".join(wrong))


class BenchReport(msgspec.Struct, frozen=True, kw_only=True):
    """What came back."""

    wall_s: float
    num_requests: int
    num_failed: int
    failures: dict[str, int]
    num_tokens: int
    tokens_per_s: float
    e2e_s: dict[str, float]
    """p50, p95, p99 and max of whole requests."""
    first_token_s: dict[str, float]
    between_tokens_s: dict[str, float]

    def text(self) -> str:
        """For people."""
        lines = [
            f"{self.num_requests} requests in {self.wall_s:.2f} s, {self.num_failed} failed",
            f"{self.num_tokens} tokens, {self.tokens_per_s:.1f} tokens/s",
        ]
        for name, found in (
            ("request", self.e2e_s),
            ("first token", self.first_token_s),
            ("between tokens", self.between_tokens_s),
        ):
            if found:
                lines.append(f"{name:15}" + "  ".join(f"{key} {value * 1e3:.1f} ms" for key, value in found.items()))
        return "\n".join([*lines, *(f"failed {count} times: {why}" for why, count in self.failures.items())])


async def run_load(url: str, load: Load) -> BenchReport:
    """Send the load. Raises ValueError for settings out of range or when nothing answers at `url`."""
    load.validate()
    upstream = Upstream(url)
    vocab = load.vocab_size or await _vocab(upstream)
    rng = random.Random(load.seed)
    prompts = iter([[rng.randrange(3, vocab) for _ in range(load.prompt_tokens)] for _ in range(load.requests)])
    taken = Taken()
    started = time.perf_counter()
    await asyncio.gather(*(_caller(upstream, load, prompts, taken) for _ in range(min(load.concurrency, load.requests))))
    wall_s = time.perf_counter() - started
    upstream.abort_all()
    return BenchReport(
        wall_s=wall_s,
        num_requests=load.requests,
        num_failed=taken.failures.total(),
        failures=dict(taken.failures),
        num_tokens=taken.num_tokens,
        tokens_per_s=taken.num_tokens / wall_s,
        e2e_s=_quantiles(taken.e2e),
        first_token_s=_quantiles(taken.first),
        between_tokens_s=_quantiles(taken.between),
    )


class Taken:
    """Times and counts as they come."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self.e2e: list[float] = []
        self.first: list[float] = []
        self.between: list[float] = []
        self.failures: Counter[str] = Counter()


async def _vocab(upstream: Upstream) -> int:
    try:
        status, body = await upstream.request("GET", "/get_server_info", timeout_s=30.0)
        info = msgspec.json.decode(body, type=dict[str, Any])
    except (UpstreamError, msgspec.MsgspecError) as error:
        raise ValueError(f"{upstream.url} does not answer as a rollout server does: {error}") from None
    if status != 200:
        raise ValueError(f"{upstream.url}/get_server_info: HTTP {status}")
    return int((info.get("engine") or {}).get("vocab_size", 256))


async def _caller(upstream: Upstream, load: Load, prompts: Any, taken: Taken) -> None:
    for number, prompt in enumerate(prompts):
        sampling = {
            "max_new_tokens": load.new_tokens,
            "ignore_eos": True,
            "temperature": 1.0,
            "sampling_seed": load.seed + number,
        }
        body = {"input_ids": prompt, "sampling_params": sampling, "return_logprob": True, "stream": load.stream}
        body |= {"stream_incremental": True} if load.stream else {}
        started = time.perf_counter()
        try:
            async with asyncio.timeout(load.timeout_s):
                response = await upstream.open("POST", "/generate", msgspec.json.encode(body), JSON)
                if response.status != 200:
                    taken.failures[f"HTTP {response.status}: {(await response.read())[:100].decode(errors='replace')}"] += 1
                    continue
                count = await (_streamed if load.stream else _whole)(response, started, taken)
        except (UpstreamError, TimeoutError, msgspec.MsgspecError) as error:
            taken.failures[str(error) or type(error).__name__] += 1
            continue
        if count != load.new_tokens:
            taken.failures[f"{count} tokens instead of {load.new_tokens}"] += 1
        taken.num_tokens += count
        taken.e2e.append(time.perf_counter() - started)


async def _whole(response: Any, started: float, taken: Taken) -> int:
    reply = msgspec.json.decode(await response.read())
    return int(reply["meta_info"]["completion_tokens"])


async def _streamed(response: Any, started: float, taken: Taken) -> int:
    count, last, rest = 0, 0.0, b""
    async for part in response.chunks():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line.startswith(b"data: {"):
                event = msgspec.json.decode(line[6:])
                if "error" in event:
                    raise UpstreamError(str(event["error"])[:100])
                now = time.perf_counter()
                (taken.between if last else taken.first).append(now - (last or started))
                last, count = now, int(event["meta_info"]["completion_tokens"])
    return count


def _quantiles(values: list[float]) -> dict[str, float]:
    if not values:
        return {}
    ordered = sorted(values)
    at = {f"p{q}": ordered[min(len(ordered) - 1, len(ordered) * q // 100)] for q in (50, 95, 99)}
    return at | {"max": ordered[-1]}
