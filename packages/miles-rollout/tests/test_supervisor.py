"""`miles-rollout route`: with servers of its own that are killed, with a chaos of ten seconds, and its one-line mistakes."""

import asyncio
import contextlib
import importlib.util
import json
import os
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from miles_rollout.child import Child, free_port
from miles_rollout.cli import app
from miles_rollout.text import CharTokenizer

TOOLS = Path(__file__).parent.parent / "tools"
WORKER = """
import asyncio, os, sys
from miles_rollout.server import ServerConfig, bind, create_app, serve
from miles_rollout.testing import ScriptedEngine
from miles_rollout.text import CharTokenizer
from miles_rollout.wire import TensorSpec, WeightManifest
tokenizer = CharTokenizer("0123456789")

def load(directory, version, digest):
    return WeightManifest(version=version, tensors=(TensorSpec(name="a", dtype="float32", shape=(1,), hash="0"),),
                          contract_digest=digest), [("a", None)]

config = ServerConfig(admin_token=os.environ["MILES_ROLLOUT_ADMIN_TOKEN"], drain_s=0.2)
engine = ScriptedEngine(tokenizer)
app = create_app(engine, tokenizer, config, load_weights=load)
asyncio.run(serve(app, bind("127.0.0.1", int(sys.argv[1])), log_level="error"))
"""


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def until(condition: Any, what: str, timeout_s: float = 30.0) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            while not (await condition()):
                await asyncio.sleep(0.03)
    except TimeoutError:
        raise AssertionError(f"{what} did not happen within {timeout_s:g} s") from None


@contextlib.asynccontextmanager
async def ended(process: asyncio.subprocess.Process) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process that does not outlive a test that fails; its guarded children end with it."""
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def test_a_child_ends_with_whoever_started_it(tmp_path: Path) -> None:
    code = "import asyncio, sys\nfrom miles_rollout.child import Child\n"
    code += (
        "async def main():\n    child = await Child.start([sys.executable, '-c', 'import time; time.sleep(600)'], grace_s=0.3)\n"
    )
    code += "    print(child.pid, flush=True)\n    await asyncio.sleep(600)\nasyncio.run(main())"

    async def main() -> None:
        for stopped in (False, True):
            parent = await asyncio.create_subprocess_exec(sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE)
            assert parent.stdout is not None
            pid = int(await asyncio.wait_for(parent.stdout.readline(), 20))
            if stopped:
                os.kill(pid, signal.SIGSTOP)
            parent.kill()
            await parent.wait()

            async def gone(pid: int = pid) -> bool:
                return not alive(pid)

            await until(gone, f"the end of the child (stopped: {stopped})", 10)
        child = await Child.start([sys.executable, "-c", "raise SystemExit(7)"])
        assert await child.wait() == 7 and not child.running
        sleeper = await Child.start([sys.executable, "-c", "import time; time.sleep(600)"], grace_s=1.0)
        assert await sleeper.stop() == -15
        with pytest.raises(ValueError, match="cannot start"):
            await Child.start([str(tmp_path / "none")])

    asyncio.run(asyncio.wait_for(main(), 60))


def test_dead_and_hung_workers_are_restarted_with_the_fleets_weights(tmp_path: Path) -> None:
    from replay import listening

    from miles_rollout.router import RouterConfig, create_router
    from miles_rollout.router.supervise import Supervisor

    script = tmp_path / "worker.py"
    script.write_text(WORKER)

    async def main() -> None:
        config = RouterConfig(worker_token="w", admin_token="a", health_interval_s=0.1, health_s=0.5, drain_s=0.5)
        router = create_router([], config)
        fleet = router.state.service.fleet
        ports = [free_port(), free_port()]
        env = os.environ | {"MILES_ROLLOUT_ADMIN_TOKEN": "w"}
        supervisor = Supervisor(
            fleet, lambda port: [sys.executable, str(script), str(port)], ports, env=env, gpus=["3", "5"], hung_s=1.5, start_s=30,
            grace_s=1,
        )  # fmt: skip
        supervisor.start()
        headers = {"authorization": "Bearer a"}

        async def ready() -> bool:
            return len(fleet.workers) == 2 and all(w.serves for w in fleet.workers.values())

        async with listening(router) as url, httpx.AsyncClient(base_url=url, headers=headers, timeout=20) as http:
            await until(ready, "both workers serve")
            update = await http.post("/update_weights_from_disk", json={"model_path": "x", "weight_version": 5})
            assert update.json()["success"]
            for sig in (signal.SIGKILL, signal.SIGSTOP):
                child = supervisor.children[ports[0]]
                worker = fleet.workers[f"http://127.0.0.1:{ports[0]}"]
                os.kill(child.pid, sig)

                async def down(worker: Any = worker) -> bool:
                    return not worker.serves

                await until(down, "the worker's loss is noticed", 10)
                body = {"input_ids": [5], "sampling_params": {"max_new_tokens": 2, "ignore_eos": True}}
                assert (await http.post("/generate", json=body)).status_code == 200, "the other one serves"
                await until(ready, "the worker is back")
                assert worker.version == "5", "with the fleet's weights, and not at the next update"
                assert not alive(child.pid)
            assert fleet.counts["restarts"] == 2 and fleet.counts["repushes"] == 2
            pids = [child.pid for child in supervisor.children.values()]
            for port, gpu in zip(ports, (b"3", b"5"), strict=True):  # after the restarts too
                told = Path(f"/proc/{supervisor.children[port].pid}/environ").read_bytes().split(b"\0")
                assert b"CUDA_VISIBLE_DEVICES=" + gpu in told and b"MILES_ROLLOUT_ADMIN_TOKEN=w" in told
            await supervisor.stop()
            assert not any(alive(pid) for pid in pids)
        await router.state.service.close()

    asyncio.run(asyncio.wait_for(main(), 90))


def test_the_command_starts_routes_and_drains(tmp_path: Path) -> None:
    from miles_kernels.nn.checkpoint import random_decoder, save_decoder
    from miles_kernels.nn.config import DecoderConfig

    tokenizer = CharTokenizer("0123456789")
    shape = DecoderConfig(
        family="qwen3", vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    save_decoder(random_decoder(shape, 0), tmp_path / "m")
    tokenizer.save(tmp_path / "m")

    async def main() -> None:
        line = [sys.executable, "-m", "miles_rollout.cli", "route", "--spawn", "1", "--model", str(tmp_path / "m"), "--port", "0"]
        line += ["--drain-s", "2", "--log-format", "json", "--", "--threads", "1", "--kv-memory-mib", "4"]
        async with ended(await asyncio.create_subprocess_exec(*line, stderr=asyncio.subprocess.PIPE)) as process:
            assert process.stderr is not None
            url = ""
            while not url:
                text = (await asyncio.wait_for(process.stderr.readline(), 60)).decode()
                found = re.search(r"routing on (http://[\w.:]+)", text)
                url = found.group(1) if found else ""
            drainer = asyncio.ensure_future(process.stderr.read())
            async with httpx.AsyncClient(base_url=url, timeout=30) as http:

                async def well() -> bool:
                    with contextlib.suppress(httpx.TransportError):
                        return (await http.get("/health")).status_code == 200
                    return False

                await until(well, "the router's worker serves", 90)
                body = {"text": "12", "sampling_params": {"max_new_tokens": 3}}
                assert (await http.post("/generate", json=body)).status_code == 200
                bench = await asyncio.to_thread(
                    CliRunner().invoke,
                    app,
                    ["bench", url, "--requests", "8", "--new-tokens", "4", "--concurrency", "4", "--json"],
                )
                assert bench.exit_code == 0 and json.loads(bench.output)["num_tokens"] == 32
                doctor = await asyncio.to_thread(CliRunner().invoke, app, ["doctor", url])
                assert doctor.exit_code == 0 and "weight version 0" in doctor.output
            process.send_signal(signal.SIGTERM)
            await asyncio.wait_for(process.wait(), 30)
            err = (await drainer).decode()
            assert process.returncode == 0, err[-2000:]
            lines = [json.loads(text) for text in err.splitlines()]
            draining = [entry for entry in lines if entry["message"].startswith("draining")]
            assert len(draining) == 2, "the router's and its server's: what is asked of one holds for the other"
            assert not any("request_id" in entry for entry in draining)

    asyncio.run(asyncio.wait_for(main(), 150))


def test_a_command_that_cannot_start_is_not_started_for_ever() -> None:
    async def main() -> None:
        started = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "miles_rollout.cli", "route", "--port", "0", "--spawn", "2", "--model", "/no/such/model",
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        async with ended(started) as process:
            _, err = await asyncio.wait_for(process.communicate(), 120)
        text = err.decode()
        assert process.returncode == 2 and "error: /no/such/model: not a directory" in text
        assert re.search(r"^error: the worker on port \d+ cannot start as it was asked to; its own message is above$", text, re.M)

    asyncio.run(main())


def test_mistakes_are_one_line() -> None:
    for args, words in (
        (["route", "--spawn", "2"], "go together"),
        (["route", "http://127.0.0.1:1", "--", "--threads", "1"], "are for servers started with --spawn"),
        (["route", "http://127.0.0.1:1", "--gpus", "0", "--port", "0"], "--gpus 0 is for servers started with --spawn"),
        (["route", "http://127.0.0.1:1", "--policy", "best", "--port", "0"], "policy='best'"),
        (["route", "http://127.0.0.1:1", "--hedge-s", "-1", "--port", "0"], "hedge_s=-1.0"),
        (["serve", ".", "--engine", "vllm"], "--engine vllm"),
        (["serve", ".", "--port", "0", "--", "--tp", "2"], "--engine sglang"),
        (["serve", ".", "--engine", "sglang", "--port", "0", "--", "--port", "1"], "--port is set by this engine"),
        (["bench", "http://127.0.0.1:9", "--requests", "0"], "requests=0"),
    ):
        result = CliRunner().invoke(app, args)
        assert result.exit_code == 2 and words in result.stderr and result.stderr.count("\n") == 1, (args, result.output)


def test_chaos() -> None:
    spec = importlib.util.spec_from_file_location("chaos", TOOLS / "chaos.py")
    assert spec is not None and spec.loader is not None
    chaos = importlib.util.module_from_spec(spec)
    sys.modules["chaos"] = chaos
    spec.loader.exec_module(chaos)
    report = asyncio.run(asyncio.wait_for(chaos.play(9.0, 2, 4, 3), 240))
    assert report["problems"] == [], report
    assert report["control_found"] == 1 and report["outcomes"]["ok"] > 20 and report["events"]["update done"] >= 1, report
