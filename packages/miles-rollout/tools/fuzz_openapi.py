"""Fuzz a server with schemathesis, from its own OpenAPI document: no status that is not documented, no hang, no crash.

    python packages/miles-rollout/tools/fuzz_openapi.py [--cases 10000] [--seed 1]

Serves an engine without a model on a loopback port of its own, and ends it. Exit code 1 on any finding.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec

from miles_rollout.server import ServerConfig, bind, create_app, listen, serve
from miles_rollout.testing import ScriptedEngine
from miles_rollout.text import CharTokenizer
from miles_rollout.upstream import Upstream

TOKEN = "fuzz-secret"
BATCH = 1000
"""Cases of one run of schemathesis; many runs with seeds of their own make up the rest."""
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,ignored_auth"


def load_weights(directory: str, version: int, digest: str) -> Any:
    raise ValueError(f"{directory}: no safetensors there")


def narrowed(document: dict[str, Any]) -> dict[str, Any]:
    """The document with a known model and short completions, so that some of what is drawn is served and not only refused."""
    for schema in document["components"]["schemas"].values():
        properties = schema.get("properties", {})
        if "model" in properties:
            properties["model"] = {"enum": ["default"]}
        for name in ("max_new_tokens", "max_tokens", "max_completion_tokens"):
            for part in [properties.get(name, {}), *properties.get(name, {}).get("anyOf", [])]:
                if part.get("type") == "integer":
                    part["maximum"] = 24
    return document


async def fuzz(cases: int, seed: int, *, workers: int = 1, max_time_s: float = 3000.0) -> tuple[int, list[str], str]:
    """(cases run, findings, schemathesis' own report)."""
    engine = ScriptedEngine(CharTokenizer("0123456789+= abcdefghijklmnopqrstuvwxyz", allow_unknown=True), max_context=64)
    config = ServerConfig(admin_token=TOKEN, request_s=0.5, body_s=2.0, drain_s=1.0, weight_roots=(tempfile.gettempdir(),))
    app = create_app(engine, engine.tokenizer, config, load_weights=load_weights)
    service = app.state.service
    sock = bind("127.0.0.1", 0)
    listen(sock)
    url = f"http://127.0.0.1:{sock.getsockname()[1]}"
    stop = asyncio.Event()
    server = asyncio.ensure_future(serve(app, sock, stop=stop, log_level="critical"))

    async def keep_going() -> None:
        while True:  # a pause that is fuzzed in must not hold everything after it
            await asyncio.sleep(0.02)
            if service.paused is not None:
                await service.resume()

    keeper = asyncio.ensure_future(keep_going())
    upstream = Upstream(url)
    try:
        _, raw = await upstream.request("GET", "/openapi.json", timeout_s=20)
        document = narrowed(msgspec.json.decode(raw))
        bodies = sum("requestBody" in operation for methods in document["paths"].values() for operation in methods.values())
        command = [sys.executable, "-m", "schemathesis.cli", "run", "openapi.json", "--url", url, "--checks", CHECKS]
        command += ["--max-examples", str(-(-cases // bodies)), "--seed", str(seed), "--workers", str(workers)]
        command += ["--phases", "fuzzing", "--mode", "all", "--request-timeout", "10", "--max-failures", "20", "--no-color"]
        command += ["--suppress-health-check", "all", "-H", f"Authorization: Bearer {TOKEN}"]
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "openapi.json").write_bytes(msgspec.json.encode(document))
            child = await asyncio.create_subprocess_exec(
                *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT, cwd=folder
            )
            try:
                async with asyncio.timeout(max_time_s):
                    output, _ = await child.communicate()
            finally:
                if child.returncode is None:
                    child.kill()
                    await child.wait()
        text = output.decode(errors="replace")
        findings = [] if child.returncode == 0 else [line.strip() for line in text.splitlines() if line.strip().startswith("- ")]
        if child.returncode != 0 and not findings:
            findings = [f"schemathesis ended with code {child.returncode}"]
        status, _ = await upstream.request("GET", "/health", timeout_s=20)
        if status != 200:
            findings.append(f"after it all /health answers {status}")
        served = sum(service.num_replies.values())
        undocumented = {
            f"{path} {code}": n for (path, code), n in service.num_replies.items() if code >= 500 and code not in (503, 504)
        }
        return served, findings + [f"{key}: {n} replies" for key, n in undocumented.items()], text
    finally:
        upstream.abort_all()
        keeper.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await keeper
        stop.set()
        await server


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", default="")
    given = parser.parse_args()
    started = time.perf_counter()
    generated, served, all_findings = 0, 0, []
    while generated < given.cases:
        now, findings, text = asyncio.run(fuzz(min(BATCH, given.cases - generated), given.seed))
        counted = re.search(r"(\d+) generated", text)
        generated += int(counted.group(1)) if counted else BATCH
        served += now
        all_findings += findings
        given.seed += 1
        if given.report:
            with Path(given.report).open("a") as file:
                file.write(text)
        elapsed_s = time.perf_counter() - started
        print(f"{generated} cases, {served} requests in {elapsed_s:.0f} s, {len(all_findings)} findings", flush=True)
        if findings:
            print("\n".join(findings), flush=True)
    raise SystemExit(bool(all_findings))
