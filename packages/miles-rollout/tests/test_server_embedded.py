"""The whole service: a model directory, the embedded engine, HTTP, the client, weights from disk, the command itself."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest

from miles_kernels.nn.checkpoint import random_decoder, save_decoder
from miles_kernels.nn.config import DecoderConfig
from miles_rollout.client import RolloutClient
from miles_rollout.engine import Engine
from miles_rollout.engines.embedded.config import EmbeddedConfig
from miles_rollout.launch import load_embedded
from miles_rollout.server import ServerConfig
from miles_rollout.server.service import Service
from miles_rollout.testing import ScriptedEngine, serving
from miles_rollout.text import CharTokenizer
from miles_rollout.wire import GenerateRequest, SamplingParams

TOKENIZER = CharTokenizer("0123456789+=")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two tiny models of one shape with different weights."""
    shape = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": TOKENIZER.vocab_size, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": True,
        "hidden_act": "silu", "initializer_range": 0.2, "eos_token_id": 2,
    }  # fmt: skip
    paths = []
    for seed in (1, 2):
        path = tmp_path_factory.mktemp("model") / f"m{seed}"
        save_decoder(random_decoder(DecoderConfig.from_hf(shape), seed), path)
        TOKENIZER.save(path)
        paths.append(path)
    return paths[0], paths[1]


def run(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run an async test with a deadline."""

    async def limited() -> None:
        async with asyncio.timeout(60):
            await main()

    asyncio.run(limited())


def ask(number: int, **sampling: Any) -> GenerateRequest:
    """A prompt of its own per number."""
    prompt = tuple(TOKENIZER.encode(f"{number}+{number * 7 % 10}="))
    params = SamplingParams(**{"max_new_tokens": 12, "seed": 5, "n": 2, "ignore_eos": True} | sampling)
    return GenerateRequest(request_id=f"q{number}", input_ids=prompt, sampling=params, return_prompt_logprobs=True)


def test_engines_are_engines(models: tuple[Path, Path]) -> None:
    engine, tokenizer, _ = load_embedded(str(models[0]), EmbeddedConfig(kv_memory_bytes=1 << 20), dtype="float32", threads=None)
    assert isinstance(engine, Engine) and isinstance(ScriptedEngine(tokenizer), Engine)
    asyncio.run(engine.close())


def test_over_http_the_tokens_and_logprobs_are_bitwise_the_engines(models: tuple[Path, Path]) -> None:
    async def main() -> None:
        config = EmbeddedConfig(kv_memory_bytes=4 << 20)
        engine, tokenizer, load_weights = load_embedded(str(models[0]), config, dtype="float32", threads=None)
        asked = [ask(1), ask(2, temperature=0.7, top_k=5), ask(3, temperature=0.0), ask(4, stop=("5",)), ask(5, ignore_eos=False)]
        async with serving(engine, tokenizer, load_weights=load_weights) as url, RolloutClient(url) as client:
            over_http = await asyncio.gather(*(client.generate(each) for each in asked))
            direct = [await engine.generate(each) for each in asked]
            for one, other in zip(over_http, direct, strict=True):
                assert one.completions == other.completions
                assert one.prompt_logprobs == other.prompt_logprobs
                assert one.contract_digest == other.contract_digest == client.info().contract_digest
            for each, result in zip(asked, direct, strict=True):
                chunks = [chunk async for chunk in client.stream(each)]
                for completion in result.completions:
                    mine = [chunk for chunk in chunks if chunk.index == completion.index]
                    assert tuple(i for chunk in mine for i in chunk.token_ids) == completion.token_ids
                    assert tuple(lp for chunk in mine for lp in chunk.logprobs) == completion.logprobs
                    assert "".join(chunk.text for chunk in mine) == completion.text
                    assert (mine[-1].finish_reason, mine[-1].matched_stop) == (completion.finish_reason, completion.matched_stop)
            async with httpx.AsyncClient(base_url=url) as http:
                assert (await http.get("/health_generate")).status_code == 200
                metrics = (await http.get("/metrics")).text
                assert "sglang:generation_tokens_total" in metrics and "sglang:token_usage" in metrics

    run(main)


def test_weights_from_disk_change_the_tokens_and_bad_ones_do_not(models: tuple[Path, Path], tmp_path: Path) -> None:
    async def main() -> None:
        config = EmbeddedConfig(kv_memory_bytes=4 << 20)
        engine, tokenizer, load_weights = load_embedded(str(models[0]), config, dtype="float32", threads=None)
        other, _, _ = load_embedded(str(models[1]), config, dtype="float32", threads=None)
        expected = (await other.generate(ask(1))).completions
        await other.close()
        async with serving(engine, tokenizer, load_weights=load_weights) as url, RolloutClient(url) as client:
            before = await client.generate(ask(1))
            assert [each.token_ids for each in before.completions] != [each.token_ids for each in expected]
            async with httpx.AsyncClient(base_url=url) as http:
                for bad in (str(tmp_path), str(tmp_path / "nowhere")):
                    response = await http.post("/update_weights_from_disk", json={"model_path": bad})
                    assert response.status_code == 400 and response.json()["success"] is False
                assert (await client.generate(ask(1))).completions == before.completions
                response = await http.post("/update_weights_from_disk", json={"model_path": str(models[1]), "weight_version": 4})
                assert response.json()["success"] is True, response.text
            after = await client.generate(ask(1))
            assert [each.token_ids for each in after.completions] == [each.token_ids for each in expected]
            assert [each.logprobs for each in after.completions] == [each.logprobs for each in expected]
            assert {span.version for each in after.completions for span in each.weight_spans} == {4}
            assert after.cached_tokens == 0 and (await client.refresh()).weight_version == 4

    run(main)


def url_of(process: subprocess.Popen[str]) -> str:
    """Where a server says that it listens."""
    assert process.stderr is not None
    while "on http://" not in (line := process.stderr.readline()):
        assert line, "the server ended before it listened"
    return line.rsplit(" ", 1)[1].strip()


def test_a_server_without_weights_says_what_its_requests_wait_for(models: tuple[Path, Path]) -> None:
    async def main() -> None:
        engine, tokenizer, load = load_embedded(str(models[0]), EmbeddedConfig(kv_memory_bytes=1 << 20), device="cpu", threads=1)
        async with (
            serving(engine, tokenizer, load_weights=load) as url,
            httpx.AsyncClient(base_url=url, timeout=50) as http,
        ):

            async def healths() -> list[int]:
                return [(await http.get(path)).status_code for path in ("/health", "/health_live")]

            body = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 1}}
            assert await healths() == [200, 200]
            for path in ("/release_memory_occupation", "/resume_memory_occupation"):
                assert (await http.post(path, json={"tags": ["weights"]})).status_code == 200
            assert await healths() == [503, 200], "at once: there is a reason, and starting it anew mends nothing"
            assert (await http.get("/server_info")).json()["resting"].endswith("waits for a weight update")
            assert "waits for a weight update" in str(Service(engine, tokenizer, ServerConfig())._too_late())
            early = asyncio.ensure_future(http.post("/generate", json=body))
            update = await http.post("/update_weights_from_disk", json={"model_path": str(models[1])})
            assert update.status_code == 200 and await healths() == [200, 200]
            assert (await http.get("/server_info")).json()["resting"] == ""
            assert (await early).json()["meta_info"]["weight_version"] == "1"
        await engine.close()

    run(main)


@pytest.mark.slow
def test_the_command_serves_and_stops(models: tuple[Path, Path]) -> None:
    command = [
        sys.executable,
        "-m",
        "miles_rollout.cli",
        "serve",
        str(models[0]),
        "--port",
        "0",
        "--kv-memory-mib",
        "4",
        "--threads",
        "1",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            url = url_of(process)
            body = {"model": models[0].name, "messages": [{"role": "user", "content": "1+1="}], "max_tokens": 4, "seed": 1}
            reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
            assert reply["usage"]["completion_tokens"] <= 4 and reply["metadata"]["weight_version"] == "0"
            process.send_signal(signal.SIGTERM)
            said = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == 0, said


def test_generate_from_a_model_directory(models: tuple[Path, Path]) -> None:
    from typer.testing import CliRunner

    from miles_rollout.cli import app

    args = ["generate", str(models[0]), "--prompt", "1+1=", "--seed", "3", "--max-new-tokens", "6", "--ignore-eos"]
    first, second = [CliRunner().invoke(app, args) for _ in range(2)]
    assert first.exit_code == 0, first.output
    assert first.output == second.output and len(first.output) >= 2


def test_the_embedded_engine_conforms(tmp_path: Path) -> None:
    from miles_rollout.conformance import Options, run_suite
    from miles_rollout.server import ServerConfig

    shape = DecoderConfig(
        family="qwen3", vocab_size=TOKENIZER.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=2048, initializer_range=0.2,
    )  # fmt: skip
    for seed in (1, 2):
        save_decoder(random_decoder(shape, seed), tmp_path / f"m{seed}")
        TOKENIZER.save(tmp_path / f"m{seed}")

    async def main() -> None:
        config = EmbeddedConfig(kv_memory_bytes=16 << 20)
        engine, tokenizer, load_weights = load_embedded(str(tmp_path / "m1"), config, dtype="float32", threads=1)
        server = ServerConfig(admin_token="secret", weight_roots=(str(tmp_path),))
        async with serving(engine, tokenizer, server, load_weights=load_weights) as url:
            options = Options(admin_token="secret", weights=str(tmp_path / "m2"), timeout_s=20.0)
            report = await run_suite(url, options)
        others = {result.name: result.status for result in report.results if result.status != "pass"}
        known = {"native/stop_string"}  # a first greedy token without text has nothing to stop at
        assert set(others) <= known and set(others.values()) <= {"unsupported"}, report.text()

    run(main)


def test_a_server_whose_engine_has_failed_ends_with_an_error(models: tuple[Path, Path]) -> None:
    """Nobody restarts a process that stays up and answers 500."""
    code = (
        "import sys, miles_rollout.cli as cli\n"
        "from miles_rollout.engines.embedded.core import EngineCore\n"
        "def step(self): raise RuntimeError('device-side assert')\n"
        "EngineCore.step = step\n"
        f"sys.argv = ['miles-rollout', 'serve', {str(models[0])!r}, '--port', '0', '--kv-memory-mib', '4', '--threads', '1']\n"
        "cli.main()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as process:
        try:
            url = url_of(process)
            body = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 4}}
            assert httpx.post(f"{url}/generate", json=body, timeout=60).status_code == 500
            said = process.communicate(timeout=60)[1]
        finally:
            process.kill()
    assert process.returncode == 1 and "the engine has failed" in said and "device-side assert" in said, said
