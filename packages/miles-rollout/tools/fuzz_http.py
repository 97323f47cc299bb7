"""Fuzz a server's HTTP byte by byte: damaged heads, bodies, lengths and encodings; no hang, no crash, no undocumented 5xx.

    python packages/miles-rollout/tools/fuzz_http.py [--cases 10000] [--seed 1]

Serves an engine without a model on a loopback port of its own, and ends it. Exit code 1 on any finding.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import time
from collections import Counter

from miles_rollout.engine import Engine
from miles_rollout.server import ServerConfig
from miles_rollout.testing import ScriptedEngine, serving
from miles_rollout.text import CharTokenizer, Tokenizer

TOKEN = "fuzz-secret"
ALLOWED_5XX = (503, 504)
ANSWER_S = 5.0
"""How long the server may take to answer or to close after it has everything it will get."""
QUIET_S = 0.2
"""After so long without a byte the server is told that no more will come."""
AT_A_TIME = 16
ODD = (
    b"\x00",
    b"\r\n",
    b"\n",
    b"\r",
    b" ",
    b":",
    b"\xff",
    b"\xc3",
    b"{",
    b"}",
    b'"',
    b"\\",
    b"\\ud800",
    b"-",
    b"1e999",
    b"[" * 2000,
    b"A" * 70_000,
)
HEADERS = (
    b"Transfer-Encoding: chunked", b"Content-Length: 0", b"Content-Length: -1", b"Content-Length: 99999999999999999999",
    b"Content-Length: 5", b"Expect: 100-continue", b"Connection: close", b"Connection: Upgrade\r\nUpgrade: websocket",
    b"Content-Type: text/plain", b"Content-Encoding: gzip", b"Host: \x00", b": empty", b"A" * 200 + b": b",
    b"Authorization: Bearer \xff",
    b"X-Request-Id: a b\x7f", b"Transfer-Encoding: gzip, chunked", b"Cookie: " + b"c" * 9000,
)  # fmt: skip


def corpus() -> list[bytes]:
    """Requests that are served as they stand."""
    sampling = {"max_new_tokens": 4, "ignore_eos": True}
    posts = [
        ("/generate", {"input_ids": [5, 6], "sampling_params": sampling}),
        ("/generate", {"text": ["1+1=", "2"], "sampling_params": sampling, "stream": True}),
        ("/generate", {"input_ids": [[5], [6]], "sampling_params": [sampling] * 2, "rid": ["a", "b"], "return_logprob": True}),
        ("/v1/completions", {"prompt": "1+1=", "max_tokens": 3, "logprobs": 0, "echo": True}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "1"}], "max_tokens": 3, "n": 2, "stream": True}),
        ("/abort_request", {"abort_all": True}),
        ("/continue_generation", {}),
        ("/update_weights_from_disk", {"model_path": "/nowhere", "weight_version": 3}),
        ("/resume_memory_occupation", {"tags": ["kv_cache"]}),
    ]
    found = []
    for path, body in posts:
        raw = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\nContent-Type: application/json\r\n"
        head += f"Authorization: Bearer {TOKEN}\r\n"
        found.append(head.encode() + b"Content-Length: %d\r\n\r\n" % len(raw) + raw)
        found.append(head.encode() + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % len(raw) + raw + b"\r\n0\r\n\r\n")
    return [
        *found,
        *(
            f"GET {path} HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n".encode()
            for path in ("/health", "/metrics", "/v1/models/x", "/status")
        ),
    ]


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """One to four changes of a request."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(raw)) if raw else 0
        match rng.randrange(8):
            case 0:  # another byte
                raw = raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]
            case 1:  # an odd piece put in
                raw = raw[:at] + rng.choice(ODD) + raw[at:]
            case 2:  # a piece lost
                raw = raw[:at] + raw[at + rng.randint(1, 12) :]
            case 3:  # cut short
                raw = raw[:at]
            case 4:  # a piece twice
                raw = raw[: at + 20] + raw[at:]
            case 5:  # an odd header
                head, gap, rest = raw.partition(b"\r\n")
                raw = head + gap + rng.choice(HEADERS) + b"\r\n" + rest
            case 6:  # several requests at once
                raw = raw + raw
            case 7:  # a number that is none
                digits = [i for i, byte in enumerate(raw) if 48 <= byte <= 57]
                if digits:
                    i = rng.choice(digits)
                    raw = raw[:i] + rng.choice((b"-1", b"1e400", b"0.5", b"null", b"9" * 30, b"true")) + raw[i + 1 :]
    return raw


async def one(host: str, port: int, raw: bytes) -> list[int]:
    """The statuses that come back. Raises TimeoutError when the server neither answers nor closes."""
    async with asyncio.timeout(ANSWER_S):
        reader, writer = await asyncio.open_connection(host, port, limit=1 << 20)
        try:
            with contextlib.suppress(OSError):
                writer.write(raw)
                await writer.drain()
            got = b""
            told = False
            with contextlib.suppress(OSError):
                while True:
                    try:
                        async with asyncio.timeout(None if told else QUIET_S):
                            part = await reader.read(1 << 16)
                    except TimeoutError:  # it waits for more, which will not come: now it must close
                        told = True
                        writer.write_eof()
                        continue
                    if not part:
                        break
                    got += part
        finally:
            writer.transport.abort()
    lines = [line for line in got.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]
    return [int(line[9:12]) for line in lines]


async def fuzz(
    cases: int, seed: int, engine: Engine | None = None, tokenizer: Tokenizer | None = None
) -> tuple[Counter[int], list[str]]:
    """(count of every status, 0 for none; findings, each with the bytes that caused it)."""
    rng = random.Random(seed)
    valid = corpus()
    tokenizer = tokenizer or CharTokenizer("0123456789+=")
    statuses: Counter[int] = Counter()
    findings: list[str] = []
    config = ServerConfig(admin_token=TOKEN, request_s=2.0, body_s=2.0, drain_s=1.0, weight_roots=("/nowhere",))
    async with serving(engine or ScriptedEngine(tokenizer), tokenizer, config) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        for raw in valid:
            if not any(status in (200, 400, 401, 404) for status in await one(host, int(port), raw + b"")):
                findings.append(f"a valid request is not answered: {raw[:80]!r}")

        async def caller(numbers: range) -> None:
            for number in numbers:
                raw = damaged(rng.choice(valid), rng)
                try:
                    found = await one(host, int(port), raw)
                except TimeoutError:
                    findings.append(f"case {number}: no answer within {ANSWER_S:g} s: {raw[:300]!r}")
                    continue
                except OSError as error:
                    findings.append(f"case {number}: {error!r}: {raw[:300]!r}")
                    continue
                statuses.update(found or [0])
                findings.extend(
                    f"case {number}: HTTP {status}: {raw[:300]!r}"
                    for status in found
                    if status >= 500 and status not in ALLOWED_5XX
                )

        await asyncio.gather(*(caller(range(i, cases, AT_A_TIME)) for i in range(AT_A_TIME)))
        if (alive := await one(host, int(port), valid[0])) != [200]:
            findings.append(f"after it all a valid request is answered {alive}")
    return statuses, findings


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    started = time.perf_counter()
    statuses, findings = asyncio.run(fuzz(given.cases, given.seed))
    print("\n".join(findings[:20]))
    counted = ", ".join(f"{status or 'closed'}: {count}" for status, count in sorted(statuses.items()))
    print(f"{given.cases} cases in {time.perf_counter() - started:.0f} s; replies {counted}; {len(findings)} findings")
    raise SystemExit(bool(findings))
