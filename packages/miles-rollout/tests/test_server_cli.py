"""The command line: help, version, one-line errors with exit code 2, a port in use noticed before anything is loaded."""

import asyncio
import contextlib
import json
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from miles_rollout import __version__, launch
from miles_rollout.cli import app
from miles_rollout.extras import MissingExtraError
from miles_rollout.server import bind, listen
from miles_rollout.testing import ScriptedEngine, serving
from miles_rollout.text import CharTokenizer

TOKENIZER = CharTokenizer("0123456789+= ")


def invoke(*args: str, code: int = 0, **options: Any) -> Any:
    """Run the command in this process and check its exit code."""
    result = CliRunner().invoke(app, list(args), **options)
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture
def url() -> Iterator[str]:
    """A scripted server in a thread of its own."""
    ready: list[str] = []
    up, stop = threading.Event(), threading.Event()

    async def main() -> None:
        async with serving(ScriptedEngine(TOKENIZER), TOKENIZER) as where:
            ready.append(where)
            up.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    assert up.wait(20)
    yield ready[0]
    stop.set()
    thread.join(30)
    assert not thread.is_alive()


def test_version_and_help() -> None:
    assert invoke("--version").output == f"miles-rollout {__version__}\n"
    assert {"serve", "generate"} <= set(invoke("--help").output.split())
    assert "--admin-token" in invoke("serve", "--help", env={"COLUMNS": "200", "TERM": "dumb"}).output


def test_help_in_a_fresh_process_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['miles-rollout', '--version']\nfrom miles_rollout.cli import main\ntry:\n    main()\nfinally:\n"
    )
    code += "    print(sorted({'torch', 'starlette', 'uvicorn', 'transformers', 'httpx'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"miles-rollout {__version__}\n[]\n", done


def test_a_port_in_use_is_noticed_before_the_model_is_looked_at() -> None:
    with contextlib.closing(bind("127.0.0.1", 0)) as sock:
        listen(sock)
        port = str(sock.getsockname()[1])
        result = invoke("serve", "no-such-model", "--port", port, code=2)
        assert result.stderr.startswith(f"error: port {port} on 127.0.0.1 is in use;") and "--port" in result.stderr
        assert "no-such-model" not in result.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["serve", "no-such-model", "--port", "0"], "no-such-model: not a directory"),
        (["serve", "no-such-model", "--port", "70000"], "--port 70000"),
        (["serve", "no-such-model", "--port", "0", "--host", "192.0.2.1"], "192.0.2.1"),
        (["serve", "no-such-model", "--port", "0", "--page-size", "5"], "page_size=5"),
        (["serve", "no-such-model", "--port", "0", "--threads", "0"], "--threads 0"),
        (["serve", "no-such-model", "--port", "0", "--draft", "eagle3"], "draft 'eagle3' needs draft_path"),
        (["serve", ".", "--port", "0", "--device", "tpu"], "--device tpu must be cpu, cuda or auto"),
        (["serve", ".", "--port", "0", "--device", "cuda:1"], "CUDA_VISIBLE_DEVICES"),
        (["serve", "no-such-model", "--port", "0", "--log-level", "loud"], "--log-level loud"),
        (["generate", "no-such-model", "--prompt", "1"], "no-such-model: not a directory"),
        (["doctor", "--port", "70000"], "--port 70000 is no port"),
        (["doctor", "localhost:30000"], "give http://HOST:PORT"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_2(args: list[str], words: str) -> None:
    result = invoke(*args, code=2)
    assert result.stderr.startswith("error: ") and words in result.stderr and result.stderr.count("\n") == 1


class _Gpu:
    """As much of torch as choosing a device and sizing its cache need: one GPU with 40 GiB free."""

    class cuda:
        is_available = staticmethod(lambda: True)
        device_count = staticmethod(lambda: 1)
        set_device = staticmethod(lambda index: None)
        mem_get_info = staticmethod(lambda place: (40 << 30, 80 << 30))

    @staticmethod
    def device(name: str) -> SimpleNamespace:
        return SimpleNamespace(type=name)


def test_a_gpu_is_taken_when_asked_for_and_its_memory_is_shared_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert launch._device(_Gpu, "auto").type == launch._device(_Gpu, "cuda").type == "cuda" and not caplog.records
    assert launch._device(_Gpu, "cpu").type == "cpu" and "--device cuda uses it" in caplog.text
    monkeypatch.setattr(_Gpu.cuda, "is_available", lambda: False)
    assert launch._device(_Gpu, "auto").type == "cpu"
    with pytest.raises(ValueError, match="torch sees no GPU"):
        launch._device(_Gpu, "cuda")
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(10 << 30)
    assert launch._left_on_gpu(_Gpu, "cuda", str(tmp_path), "bfloat16") == int(0.85 * (20 << 30))
    with pytest.raises(ValueError, match="--kv-memory-mib"):
        launch._left_on_gpu(_Gpu, "cuda", str(tmp_path), "float32")


def test_of_a_divided_model_every_gpu_holds_its_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """32 billion weights, which this GPU of 40 GiB does not hold once, over 8 of them."""
    from miles_kernels.nn.config import DecoderConfig

    shape = DecoderConfig(
        family="qwen3", vocab_size=151936, hidden_size=5120, intermediate_size=25600, num_hidden_layers=64,
        num_attention_heads=64, num_key_value_heads=8, head_dim=128, max_position_embeddings=4096, tie_word_embeddings=False,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(shape.to_hf(dtype="bfloat16")))
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(61 << 30)
    with pytest.raises(ValueError, match="--kv-memory-mib"):
        launch._left_on_gpu(_Gpu, "cuda", str(tmp_path), "bfloat16")
    table, layer = 151936 * 5120, 5120 * (2 * 64 + 2 * 8) * 128 + 3 * 5120 * 25600
    part = 2 * (2 * table + 64 * (layer // 8 + 2 * 5120 + 2 * 128) + 5120)
    asked: list[int] = []
    monkeypatch.setattr(launch, "_free_on_gpus", lambda torch, place, ranks: asked.append(ranks) or (40 << 30))
    left = (40 << 30) - 2 * part - 2 * table - launch.NCCL_BYTES
    assert launch._left_on_gpu(_Gpu, "cuda", str(tmp_path), "bfloat16", 8) == int(0.85 * left) and asked == [8]


def test_the_fullest_gpu_of_all_ranks_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked by a process that ends: here torch of another making answers it."""
    (tmp_path / "torch.py").write_text("class cuda:\n    mem_get_info = staticmethod(lambda i: ([70, 20, 60, 5][i], 80))\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(_Gpu.cuda, "device_count", lambda: 4)
    assert launch._free_on_gpus(_Gpu, "cuda", 2) == 20 and launch._free_on_gpus(_Gpu, "cuda", 4) == 5
    monkeypatch.setattr(_Gpu.cuda, "device_count", lambda: 5)
    with pytest.raises(ValueError, match=r"5 GPUs do not tell .*: IndexError: .*--kv-memory-mib"):
        launch._free_on_gpus(_Gpu, "cuda", 8)


def test_doctor_knows_what_every_extra_brings() -> None:
    found = invoke("doctor", "--port", "0").stdout
    extras = re.findall(r"^  \[(\w+)\] (.*)$", found, re.MULTILINE)
    assert [name for name, _ in extras] == ["server", "text", "embedded", "sglang", "otel"]
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]
    for name, line in extras:
        brings = [re.match(r"[\w-]+", each).group() for each in project["optional-dependencies"][name]]  # type: ignore[union-attr]
        assert all(each in line for each in brings if each != "miles-rollout"), line


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def require(module: str, *, extra: str, purpose: str) -> Any:
        raise MissingExtraError(f'{purpose} needs the package "{module}": pip install "miles-rollout[{extra}]"')

    monkeypatch.setattr(launch, "require", require)
    result = invoke("serve", str(tmp_path), "--port", "0", code=2)
    assert 'pip install "miles-rollout[embedded]"' in result.stderr


def test_generate_asks_a_server(url: str) -> None:
    args = [
        "generate",
        url,
        "--prompt",
        "1+1=",
        "--prompt",
        "-",
        "--max-new-tokens",
        "5",
        "--seed",
        "3",
        "-n",
        "2",
        "--ignore-eos",
    ]
    first = invoke(*args, input="2+2=").output
    assert first.count("\n") == 4 and invoke(*args, input="2+2=").output == first
    replies = [json.loads(line) for line in invoke(*args, "--json", input="2+2=").output.splitlines()]
    assert [reply["text"] for reply in replies] == first.splitlines()
    assert all(reply["meta_info"]["sampling_seed"] == 3 for reply in replies)
    chat = invoke("generate", url, "--prompt", "1+1=", "--chat", "--max-new-tokens", "4", "--seed", "1", "--json")
    assert json.loads(chat.output)["message"]["role"] == "assistant"
    for wrong, words in ((["--prompt", "x"], "'x' at 0"), (["--prompt", "1", "--temperature", "-1"], "temperature=-1")):
        assert words in invoke("generate", url, *wrong, code=2).stderr


def test_generate_without_a_server_says_so() -> None:
    with contextlib.closing(bind("127.0.0.1", 0)) as sock:
        where = f"http://127.0.0.1:{sock.getsockname()[1]}"
        assert "is the server running?" in invoke("generate", where, "--prompt", "1", code=2).stderr
