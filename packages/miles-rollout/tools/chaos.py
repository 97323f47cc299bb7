"""Chaos under load: engines killed, stopped and slowed, the router killed, weights updated, and every output recomputed.

    python packages/miles-rollout/tools/chaos.py [--seconds 120] [--workers 3] [--clients 12] [--seed 1] [--json FILE]

Starts workers (`miles-rollout serve`, a tiny model) under our supervisor and a router in a process of its own, all on loopback.
Demands: no wrong token (each is recomputed under the version it states), no request without an answer, no answer twice, nothing
sampled under a version older than the one whose update had succeeded before the request was sent, and an update
that succeeds within a minute after the mischief has ended. Exit code 1 otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from miles_rollout.child import Child, free_port
from miles_rollout.launch import load_embedded
from miles_rollout.router.config import RouterConfig
from miles_rollout.router.fleet import Fleet
from miles_rollout.router.supervise import Supervisor
from miles_rollout.text import CharTokenizer
from miles_rollout.upstream import Upstream, UpstreamError
from miles_rollout.wire import GenerateRequest, SamplingParams

TOKENIZER = CharTokenizer("0123456789+= abcdefghijklmnopqrstuvwxyz")
NUM_MODELS = 4
JSON = "Content-Type: application/json\r\n"
ANSWER_S = 30.0
CALM_S = 60.0
"""How long the service may take, once left alone, until all its workers take an update."""
TOKEN = "chaos-secret"


def make_models(folder: Path) -> list[Path]:
    """Tiny models of one shape; weight version v is model v % NUM_MODELS."""
    from miles_kernels.nn.checkpoint import random_decoder, save_decoder
    from miles_kernels.nn.config import DecoderConfig

    shape = DecoderConfig(
        family="qwen3", vocab_size=TOKENIZER.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=256, initializer_range=0.3,
    )  # fmt: skip
    found = []
    for seed in range(NUM_MODELS):
        path = folder / f"v{seed}"
        save_decoder(random_decoder(shape, seed), path)
        TOKENIZER.save(path)
        found.append(path)
    return found


class Record(msgspec.Struct):
    """One request and what became of it."""

    number: int
    prompt: list[int]
    max_new_tokens: int
    seed: int
    stream: bool
    least_version: int
    """The newest version whose update had succeeded when the request was sent."""
    outcome: str = "unanswered"
    token_ids: list[int] = []
    logprobs: list[float] = []
    spans: list[tuple[int, int, int]] = []
    finished: bool = False


class Chaos:
    """The whole theatre."""

    def __init__(self, folder: Path, seconds: float, workers: int, clients: int, seed: int) -> None:
        self.rng = random.Random(seed)
        self.seconds, self.num_clients = seconds, clients
        self.models = make_models(folder)
        self.state = folder / "router.json"
        self.env = os.environ | {"MILES_ROLLOUT_ADMIN_TOKEN": TOKEN, "MILES_ROLLOUT_WORKER_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
        self.ports = [free_port() for _ in range(workers)]
        self.router_port = free_port()
        self.router: Child | None = None
        self.records: list[Record] = []
        self.events: Counter[str] = Counter()
        self.recoveries: list[tuple[float, float]] = []
        """(seconds from listening to ready, seconds from the kill to ready)"""
        self.confirmed = 0
        self.tried = 0
        self.calm = asyncio.Event()
        """Set when the mischief has ended; the load goes on."""
        self.whole = asyncio.Event()
        """Set by the first update that was sent after that and succeeded."""
        self.over = False
        self.problems: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.router_port}"

    def worker_command(self, port: int) -> list[str]:
        line = [sys.executable, "-m", "miles_rollout.cli", "serve", str(self.models[0]), "--port", str(port), "--threads", "1"]
        line += ["--device", "cpu"]  # what recomputes is there, too
        return [*line, "--kv-memory-mib", "4", "--max-running", "32", "--log-level", "critical", "--drain-s", "0.5"]

    async def start_router(self) -> None:
        line = [sys.executable, "-m", "miles_rollout.cli", "route", *(f"http://127.0.0.1:{port}" for port in self.ports)]
        line += ["--port", str(self.router_port), "--state", str(self.state), "--health-interval-s", "0.2", "--health-s", "1"]
        line += ["--update-s", "10", "--wait-s", "10", "--drain-s", "0.5", "--log-level", "critical"]
        self.router = await Child.start(line, env=self.env)

    # ------------------------------------------------------------------ load

    async def client(self, upstream: Upstream) -> None:
        while not self.over:
            number = len(self.records)
            count = self.rng.randint(4, 24)
            prompt = [self.rng.randrange(4, TOKENIZER.vocab_size) for _ in range(self.rng.randint(2, 24))]
            record = Record(
                number=number, prompt=prompt, max_new_tokens=count, seed=self.rng.randrange(2**40),
                stream=self.rng.random() < 0.5, least_version=self.confirmed,
            )  # fmt: skip
            self.records.append(record)
            try:
                async with asyncio.timeout(ANSWER_S):
                    await self.ask(upstream, record)
            except TimeoutError:
                record.outcome = "unanswered"
            except UpstreamError:
                record.outcome = "connection"  # the router was killed: the caller sees a refused or broken connection
            if record.outcome != "ok":
                await asyncio.sleep(0.1)

    async def ask(self, upstream: Upstream, record: Record) -> None:
        sampling = {"max_new_tokens": record.max_new_tokens, "ignore_eos": True, "sampling_seed": record.seed}
        body: dict[str, Any] = {"rid": f"q{record.number}", "input_ids": record.prompt, "sampling_params": sampling}
        body |= {"return_logprob": True, "stream": record.stream, "stream_incremental": record.stream}
        response = await upstream.open("POST", "/generate", msgspec.json.encode(body), JSON)
        if response.status != 200:
            message = (await response.read()).decode(errors="replace")
            record.outcome = f"HTTP {response.status}"
            if "message" not in message:
                self.problems.append(f"request {record.number}: HTTP {response.status} without a reason: {message[:100]}")
            return
        if not record.stream:
            self.take(record, msgspec.json.decode(await response.read()))
            record.outcome = "ok" if record.finished else "unfinished"
            return
        rest, ended = b"", False
        async for part in response.chunks():
            *lines, rest = (rest + part).split(b"\n")
            for line in lines:
                if line == b"data: [DONE]":
                    ended = True
                elif line.startswith(b"data: "):
                    event = msgspec.json.decode(line[6:])
                    if "error" in event:
                        record.outcome = "stream error"
                    else:
                        self.take(record, event)
        if not ended:
            self.problems.append(f"request {record.number}: its stream ended without [DONE]")
        if record.outcome == "unanswered":
            record.outcome = "ok" if record.finished else "unfinished"

    def take(self, record: Record, reply: dict[str, Any]) -> None:
        """One reply or event; incremental events are put one after the other."""
        meta = reply["meta_info"]
        if record.finished:
            self.problems.append(f"request {record.number}: something came after its end")
        record.token_ids = record.token_ids + reply["output_ids"]
        record.logprobs = record.logprobs + [entry[0] for entry in meta["output_token_logprobs"]]
        record.spans = [(span["version"], span["start"], span["stop"]) for span in meta["weight_spans"]]
        record.finished = meta["finish_reason"] is not None
        if len(record.token_ids) != meta["completion_tokens"]:
            self.problems.append(
                f"request {record.number}: {len(record.token_ids)} tokens came, {meta['completion_tokens']} made"
            )
        if record.finished and meta["finish_reason"]["type"] == "abort":
            record.outcome = "aborted"

    # ------------------------------------------------------------------ mischief

    async def updater(self) -> None:
        upstream = Upstream(self.url, token=TOKEN)
        while not self.over:
            await asyncio.sleep(self.rng.uniform(1.0, 3.0))
            self.tried += 1
            version, calm = self.tried, self.calm.is_set()
            body = {"model_path": str(self.models[version % NUM_MODELS]), "weight_version": version}
            try:
                status, _ = await upstream.request("POST", "/update_weights_from_disk", msgspec.json.encode(body), timeout_s=25)
            except UpstreamError:
                status = 0
            self.events["update done" if status == 200 else "update failed"] += 1
            if status == 200:
                self.confirmed = version
                if calm:
                    self.whole.set()
        upstream.abort_all()

    async def mischief(self, supervisor: Supervisor) -> None:
        deeds = ["kill", "stop", "slow", "router"]
        watches: list[asyncio.Future[None]] = []
        while not self.calm.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.calm.wait(), self.rng.uniform(1.5, 3.5))
                break
            deed = self.rng.choice(deeds)
            port = self.rng.choice(self.ports)
            child = supervisor.children.get(port)
            if deed != "router" and (child is None or not child.running):
                continue
            self.events[deed] += 1
            with contextlib.suppress(ProcessLookupError):
                if deed == "router":
                    assert self.router is not None
                    os.kill(self.router.pid, signal.SIGKILL)
                    await self.router.wait()
                    await self.start_router()
                elif deed == "kill":
                    assert child is not None
                    os.kill(child.pid, signal.SIGKILL)
                    await child.wait()
                    watches.append(asyncio.ensure_future(self.recovery(port)))
                elif deed == "stop":  # for good, or until the supervisor loses patience
                    assert child is not None
                    os.kill(child.pid, signal.SIGSTOP)
                    if self.rng.random() < 0.5:
                        await asyncio.sleep(self.rng.uniform(0.3, 2.0))
                        os.kill(child.pid, signal.SIGCONT)
                else:
                    assert child is not None
                    for _ in range(15):
                        os.kill(child.pid, signal.SIGSTOP)
                        await asyncio.sleep(0.08)
                        os.kill(child.pid, signal.SIGCONT)
                        await asyncio.sleep(0.02)
        await asyncio.gather(*watches)

    async def recovery(self, port: int) -> None:
        """How long until a killed worker listens again, and then until the router gives it requests."""
        killed = time.monotonic()
        listening = None
        upstream = Upstream(self.url, token=TOKEN)
        while not self.over and time.monotonic() < killed + 30:
            if listening is None:
                with contextlib.suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", port)
                    writer.close()
                    listening = time.monotonic()
            else:
                with contextlib.suppress(UpstreamError, msgspec.MsgspecError):
                    _, raw = await upstream.request("GET", "/workers", timeout_s=2)
                    found = {worker["url"]: worker["state"] for worker in msgspec.json.decode(raw)["workers"]}
                    if found.get(f"http://127.0.0.1:{port}") == "ready":
                        now = time.monotonic()
                        self.recoveries.append((now - listening, now - killed))
                        break
            await asyncio.sleep(0.03)
        upstream.abort_all()

    # ------------------------------------------------------------------ the play

    async def run(self) -> None:
        fleet = Fleet(RouterConfig(worker_token=TOKEN, health_interval_s=0.2, health_s=1.0))
        supervisor = Supervisor(fleet, self.worker_command, self.ports, env=self.env, hung_s=3.0, start_s=60.0, grace_s=2.0)
        supervisor.start()
        await self.start_router()
        upstream = Upstream(self.url)
        try:
            await self.until_ready(upstream)
            tasks = [asyncio.ensure_future(self.client(upstream)) for _ in range(self.num_clients)]
            tasks += [asyncio.ensure_future(self.updater()), asyncio.ensure_future(self.mischief(supervisor))]
            await asyncio.wait(tasks, timeout=self.seconds, return_when=asyncio.FIRST_EXCEPTION)
            self.calm.set()
            try:
                await asyncio.wait_for(self.whole.wait(), CALM_S)
            except TimeoutError:
                self.problems.append(f"no update succeeded in the {CALM_S:g} s after the last mischief")
            self.over = True
            done, late = await asyncio.wait(tasks, timeout=ANSWER_S + 35)
            for task in late:
                task.cancel()
                self.problems.append("a task of the load did not end")
            for task in done:
                if task.exception() is not None:
                    self.problems.append(f"the harness failed: {task.exception()!r}")
        finally:
            self.over = True
            upstream.abort_all()
            if self.router is not None:
                await self.router.stop()
            await supervisor.stop()
            await fleet.close()

    async def until_ready(self, upstream: Upstream) -> None:
        """All workers serve."""
        watch = Upstream(self.url, token=TOKEN)
        async with asyncio.timeout(120):
            while True:
                with contextlib.suppress(UpstreamError, msgspec.MsgspecError):
                    _, raw = await watch.request("GET", "/workers", timeout_s=2)
                    if [w["state"] for w in msgspec.json.decode(raw)["workers"]] == ["ready"] * len(self.ports):
                        watch.abort_all()
                        return
                await asyncio.sleep(0.1)

    async def control(self) -> int:
        """Tokens found wrong among two records one of which was tampered with; must be 1."""
        good = [record for record in self.records if record.outcome == "ok"][:2]
        everything, self.records = self.records, [msgspec.structs.replace(record) for record in good]
        if good:
            last = good[0].token_ids[-1]
            self.records[0].token_ids = [*good[0].token_ids[:-1], last - 1 if last > 4 else last + 1]
        _, wrong = await self.recompute()
        self.records = everything
        return wrong

    async def recompute(self) -> tuple[int, int]:
        """(tokens recomputed, tokens that differ): every span under the weights of its version, from what came before it."""
        from miles_rollout.engines.embedded.config import EmbeddedConfig

        pieces: dict[int, list[tuple[Record, int, int]]] = {}
        for record in self.records:
            at = 0
            for version, start, stop in record.spans:
                if start != at:
                    self.problems.append(f"request {record.number}: its weight spans have a gap at {at}")
                at = stop
                if stop > start:
                    pieces.setdefault(version % NUM_MODELS, []).append((record, start, stop))
                if version < record.least_version:
                    least = record.least_version
                    self.problems.append(
                        f"request {record.number}: sent when version {least} was in place, sampled under {version}"
                    )
            if at != len(record.token_ids):
                self.problems.append(f"request {record.number}: spans cover {at} of {len(record.token_ids)} tokens")
        total = wrong = 0
        for model, found in pieces.items():
            config = EmbeddedConfig(kv_memory_bytes=16 << 20, max_running=64)
            engine, _, _ = load_embedded(str(self.models[model]), config, dtype="float32", threads=1)
            asked = [
                GenerateRequest(
                    request_id=f"{record.number}-{start}",
                    input_ids=tuple(record.prompt + record.token_ids[:start]),
                    sampling=SamplingParams(max_new_tokens=stop - start, ignore_eos=True, seed=record.seed),
                )
                for record, start, stop in found
            ]
            results = await asyncio.gather(*(engine.generate(each) for each in asked))
            await engine.close()
            for (record, start, stop), result in zip(found, results, strict=True):
                completion = result.completions[0]
                total += stop - start
                pairs = zip(record.token_ids[start:stop], record.logprobs[start:stop], strict=True)
                good = zip(completion.token_ids, completion.logprobs, strict=True)
                wrong += sum(mine != theirs for mine, theirs in zip(pairs, good, strict=True))
        return total, wrong


async def play(seconds: float, workers: int, clients: int, seed: int) -> dict[str, Any]:
    """The report; `problems` is empty when everything held."""
    with tempfile.TemporaryDirectory(prefix="miles-chaos-") as folder:
        chaos = Chaos(Path(folder), seconds, workers, clients, seed)
        started = time.monotonic()
        await chaos.run()
        ran_s = time.monotonic() - started
        tokens, wrong = await chaos.recompute()
        control = await chaos.control()
    outcomes = Counter(record.outcome for record in chaos.records)
    if control != 1:
        chaos.problems.append(f"one token was changed on purpose, {control} were found wrong")
    if wrong:
        chaos.problems.append(f"{wrong} of {tokens} tokens are wrong")
    for outcome in ("unanswered", "unfinished"):
        if outcomes[outcome]:
            chaos.problems.append(f"{outcomes[outcome]} requests {outcome}")
    after, in_all = ([pair[i] for pair in chaos.recoveries] for i in (0, 1))
    return {
        "seconds": round(ran_s, 1), "requests": len(chaos.records), "outcomes": dict(outcomes), "tokens_recomputed": tokens,
        "tokens_wrong": wrong, "control_found": control, "events": dict(chaos.events), "last_version": chaos.confirmed,
        "spans_over_versions": sum(len(record.spans) > 1 for record in chaos.records),
        "recovery_s": {"count": len(after), "max_after_listening": round(max(after, default=0), 3),
                       "max_after_kill": round(max(in_all, default=0), 3)},
        "problems": chaos.problems,
    }  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--clients", type=int, default=12)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", default="")
    given = parser.parse_args()
    report = asyncio.run(play(given.seconds, given.workers, given.clients, given.seed))
    print(json.dumps(report, indent=1))
    if given.json:
        Path(given.json).write_text(json.dumps(report, indent=1))
    raise SystemExit(bool(report["problems"]))
