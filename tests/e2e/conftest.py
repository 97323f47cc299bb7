"""A run small enough for a test: one layer, hidden size 32, digits to sort, a reward that gives partial credit."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from miles_core.cli.app import main

MICRO = """
[run]
num_steps = 6

[model]
alphabet = "0123456789="

[model.architecture]
model_type = "qwen3"
architectures = ["Qwen3ForCausalLM"]
hidden_size = 32
intermediate_size = 64
num_hidden_layers = 1
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 16
max_position_embeddings = 32
tie_word_embeddings = true
initializer_range = 0.2

[data]
train = "miles_core.recipes.sorting:problems?size=30&min_length=2&max_length=3"
eval = "miles_core.recipes.sorting:problems?size=6&min_length=2&max_length=3&split=eval"

[rollout]
prompts_per_step = 4
group_size = 4

[sampling]
max_new_tokens = 4

[reward]
name = "scores.py:share"

[optimizer]
lr = 3e-3

[eval]
every = 4

[checkpoint]
every = 2

[engine]
kv_memory_bytes = 1048576
"""

SCORES = '''
"""Rewards for the tests; asynchronous, so they run in this process."""

import asyncio


async def share(text, label, metadata):
    """Share of the answer's digits that the completion holds: varies even for random weights."""
    return sum(digit in text for digit in label) / len(label)


async def raises(text, label, metadata):
    raise KeyError("the scorer broke")


async def nan(text, label, metadata):
    return float("nan")


async def hangs(text, label, metadata):
    await asyncio.Event().wait()
'''


@dataclass(frozen=True)
class Micro:
    """A folder with micro.toml and scores.py, and the command line run in it."""

    folder: Path
    capsys: Any

    def miles(self, *arguments: str) -> tuple[int, str]:
        """Exit code and everything said, run in this process."""
        self.capsys.readouterr()
        code: Any = 0
        try:
            main(arguments)
        except SystemExit as stop:
            code = stop.code or 0
        said = self.capsys.readouterr()
        return int(code), said.out + said.err

    def start(self, *arguments: str, program: str = "from miles_core.cli.app import main; main()") -> subprocess.Popen[str]:
        """The same in a process of its own."""
        command = [sys.executable, "-c", program, *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            command, cwd=self.folder, env=environment, text=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def run(self, name: str) -> Path:
        """Folder of a run."""
        return self.folder / "runs" / name


def result_of(run: Path) -> dict[str, Any]:
    """Everything about a run that must not depend on how often it was stopped: weights, metrics without timing, samples."""
    last = max((run / "checkpoints").glob("step_*"))
    weights = {}
    for file in sorted((last / "trainer").rglob("*.safetensors")):
        # tensor by tensor: the header's metadata has no fixed order
        weights |= {f"{file.stem}.{name}": hashlib.sha256(value.tobytes()).hexdigest() for name, value in load_file(file).items()}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{key: value for key, value in row.items() if not key.startswith("perf/")} for row in rows]
    samples = {file.name: file.read_text() for file in sorted((run / "samples").iterdir())}
    state = json.loads((last / "state.json").read_text())
    return {"step": last.name, "weights": weights, "metrics": metrics, "samples": samples, "state": state}


@pytest.fixture
def micro(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Micro:
    """A fresh folder, which is also the current one."""
    (tmp_path / "micro.toml").write_text(MICRO)
    (tmp_path / "scores.py").write_text(SCORES)
    monkeypatch.chdir(tmp_path)
    return Micro(tmp_path, capsys)


@pytest.fixture(scope="session")
def micro_text() -> str:
    """What micro.toml holds."""
    return MICRO


@pytest.fixture(scope="session")
def result() -> Any:
    """The function `result_of`."""
    return result_of
