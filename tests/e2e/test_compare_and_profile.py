"""Two runs laid side by side, and a step under the profiler, which must change no bit of it."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from miles_core.debug.profile import profile_section
from miles_core.profile import ops_of


def edit(file: Path, line: int, change: Any) -> None:
    """Apply `change` to one JSON line of a file."""
    lines = [json.loads(text) for text in file.read_text().splitlines()]
    change(lines[line])
    file.write_text("".join(json.dumps(text) + "\n" for text in lines))


def test_a_profiled_run_is_the_same_run_and_its_report_says_where_the_time_went(micro: Any) -> None:
    profiled = ("--name", "profiled", "--run.profile_steps", "[2]", "--engine.page_size", "32")
    for more in ((), profiled):
        code, said = micro.miles("train", "micro.toml", "--steps", "4", *more)
        assert code == 0, said
    code, said = micro.miles("compare", "micro", "profiled", "--html", "page.html")
    assert code == 0 and "the same numbers in both" in said
    assert re.search(r"samples +equal in 4 steps\nmetrics +equal in 5 rows\nweights +equal in step_000002, step_000004", said)
    assert "engine.page_size: None -> 32" in said
    page = (micro.folder / "page.html").read_text()
    assert page.count("<svg") >= 5 and ">profiled<" not in page and "micro and profiled" in page

    folder = micro.run("profiled") / "profile"
    assert sorted(file.name for file in folder.iterdir()) == [
        f"step_000002_{part}{end}" for part in ("publish", "rollout", "train") for end in (".json.gz", ".summary.json")
    ]
    trace = json.loads(gzip.decompress((folder / "step_000002_train.json.gz").read_bytes()))
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])
    summary = json.loads((folder / "step_000002_train.summary.json").read_text())
    assert 0 < sum(op["cpu_s"] for op in summary["ops"]) <= summary["seconds"] * 1.5
    report = (micro.run("profiled") / "report.html").read_text()
    assert "step 2, train" in report and "in no torch op" in report
    (folder / "step_000002_train.summary.json").write_text("{}")
    code, said = micro.miles("report", "profiled")
    assert code == 2 and "step_000002_train.summary.json: not a profile's summary" in said
    code, said = micro.miles("train", "micro.toml", "--name", "x", "--run.profile_steps", "1", "--cluster.num_engines", "1")
    assert code == 2 and "run.profile_steps records this process" in said
    code, said = micro.miles("train", "micro.toml", "--name", "x", "--run.profile_steps", "[2, 7]")
    assert code == 2 and "profile_steps = [7]: not among the steps of this run, 1 to 6" in said


def test_time_on_a_device_is_counted_once(tmp_path: Path) -> None:
    def row(key: str, device: str, cpu: float, on_device: float, annotation: bool = False) -> Any:
        times = {"self_cpu_time_total": cpu, "self_device_time_total": on_device}
        return SimpleNamespace(key=key, count=3, device_type=SimpleNamespace(name=device), is_user_annotation=annotation, **times)

    rows = [row("aten::mm", "CPU", 2e3, 9e3), row("gemm", "CUDA", 0, 9e3), row("train", "CUDA", 0, 9e3, annotation=True)]
    ops = ops_of([*rows, *(row(f"k{i}", "CUDA", 0, 10) for i in range(20))])
    assert sum(op["device_s"] for op in ops) == pytest.approx(9e-3 + 20e-5) and sum(op["cpu_s"] for op in ops) == 2e-3
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "step_000003_train.summary.json").write_text(json.dumps({"seconds": 0.02, "ops": ops}))
    table = profile_section(tmp_path)
    assert "step 3, train: 20.0 ms" in table and "device, ms" in table and "aten::mm" not in table
    assert "<code>gemm</code></td><td>3</td><td>9.00" in table and "<code>9 others</code></td><td>27</td><td>0.09" in table
    assert "<code>idle</code></td><td></td><td>10.80" in table


@pytest.mark.parametrize("what", ["token", "logprob", "reward", "metric", "tensor"])
def test_the_first_difference_is_found_wherever_it_is(micro: Any, what: str, twins: tuple[Path, Path]) -> None:
    a, b = twins
    file = b / "samples" / "step_000002.jsonl"
    sample = json.loads(file.read_text().splitlines()[3])
    place = sample["loss_mask"].index(True)
    name = f"step 2: samples: sample {sample['sample_id']} ({sample['prompt_id']})"
    if what == "token":
        edit(file, 3, lambda row: row["token_ids"].__setitem__(place, 4 + (row["token_ids"][place] - 3) % 10))
        expected = f"{name}: token {place} of {len(sample['token_ids'])}: {sample['token_ids'][place]} and "
    elif what == "logprob":
        edit(file, 3, lambda row: row["rollout_logprobs"].__setitem__(place, row["rollout_logprobs"][place] * (1 + 2**-52)))
        expected = f"{name}: log-probability of token {place}"
    elif what == "reward":
        edit(file, 3, lambda row: row.update(reward=0.125))
        expected = f"{name}: reward "
    elif what == "metric":
        edit(b / "metrics.jsonl", 3, lambda row: row.update({"train/loss": row["train/loss"] + 1e-12, "perf/step_s": 9.0}))
        expected = "step 3: metrics: train/loss "
    else:
        weights = next((b / "checkpoints" / "step_000004" / "trainer" / "model").glob("*.safetensors"))
        tensors = load_file(weights)
        changed = sorted(tensors)[1]
        bits = tensors[changed].view(torch.int32).flatten()
        bits[0] ^= 1
        save_file(tensors, weights, metadata={"format": "pt"})
        expected = f"step 4: weights: 1 of {len(tensors)} tensors of step_000004 differ, the first by name is {changed}"
    code, said = micro.miles("compare", str(a), str(b))
    assert code == 1 and f"they part at {expected}" in said, said


@pytest.fixture
def twins(micro: Any) -> tuple[Path, Path]:
    """A run and its copy."""
    assert micro.miles("train", "micro.toml", "--steps", "4")[0] == 0
    shutil.copytree(micro.run("micro"), micro.run("copy"))
    assert micro.miles("compare", "micro", "copy")[0] == 0
    return micro.run("micro"), micro.run("copy")
