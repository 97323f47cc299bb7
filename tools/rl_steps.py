"""`miles train` on random weights, every sampled token compared with the trainer: tools/rl_steps.py --device cuda --model moe

Writes a configuration, runs it with a deadline, and reads the metrics: how many tokens were compared, how many of those that
followed a weight update, how many differ. `--tensor-parallel 2` divides the engine over two GPUs. With --device cpu the model is
small. Ends with code 1 when a token differs or steps are missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ALPHABET = "0123456789=+-*/ abcdefghijklmnopqrstuvwxyz.,"
PROMPT = "sort the digits of the number below from the smallest to the largest and write nothing else. {prompt}"
MOE = {
    "model_type": "qwen3_moe", "num_experts": 16, "num_experts_per_tok": 4, "moe_intermediate_size": 256, "norm_topk_prob": True,
    "decoder_sparse_step": 1,
}  # fmt: skip


def digits(text: str, label: Any, metadata: Any) -> float:
    """The reward: the share of digits in a completion."""
    return sum(char.isdigit() for char in text) / max(1, len(text))


def settings(args: argparse.Namespace, folder: Path) -> list[str]:
    """The flags of the run."""
    small = args.device == "cpu"
    shape: dict[str, Any] = {
        "model_type": "qwen3", "vocab_size": 2048, "hidden_size": 128 if small else 512, "intermediate_size": 1536,
        "num_hidden_layers": 2 if small else 6, "num_attention_heads": 8, "num_key_value_heads": args.kv_heads, "head_dim": 64,
        "max_position_embeddings": 1024, "initializer_range": 0.05, "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
        "rope_theta": 10000.0, **(MOE if args.model == "moe" else {}),
    }  # fmt: skip
    values: dict[str, Any] = {
        "run.num_steps": args.steps, "run.dir": str(folder), "run.name": "run",
        "model.device": args.device, "model.dtype": "float32" if small else "bfloat16",
        "data.train": "miles_core.recipes.sorting:problems?size=20000&seed=1&split=train",
        "rollout.prompts_per_step": args.groups, "rollout.group_size": args.size,
        "sampling.max_new_tokens": args.new, "sampling.temperature": 0.8, "sampling.ignore_eos": True,
        "reward.name": f"{Path(__file__).resolve()}:digits",
        "algorithm.entropy_coef": 0.01, "optimizer.lr": 1e-4, "checkpoint.every": 1_000_000,
        "engine.page_size": 64, "engine.prefill_chunk": 64, "engine.max_running": 512, "engine.kv_memory_bytes": 4 << 30,
        "engine.tensor_parallel": args.tensor_parallel, "trainer.gradients": args.gradients,
        "engine.cuda_graphs": not args.no_graphs, "model.precision": args.precision,
    }  # fmt: skip
    table = "\n".join(f"{key} = {json.dumps(value)}" for key, value in shape.items())
    model = f"[model]\nalphabet = {json.dumps(ALPHABET)}\n[model.architecture]\n{table}\n"
    (folder / "run.toml").write_text(model + f"[data]\ntemplate = {json.dumps(PROMPT)}\n")
    return [str(folder / "run.toml"), *(part for key, value in values.items() for part in (f"--{key}", json.dumps(value)))]


def main() -> int:
    """Run, then say what was compared."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=("dense", "moe"), default="dense")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--gradients", choices=("summed", "chained"), default="summed")
    parser.add_argument("--precision", choices=("full", "fp8"), default="full")
    parser.add_argument("--no-graphs", action="store_true", help="the engine launches kernel by kernel")
    parser.add_argument("--kv-heads", type=int, default=4, help="fewer than ranks of the engine: they share them")
    for name, value in (("steps", 50), ("groups", 32), ("size", 8), ("new", 88)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--deadline", type=float, default=300.0, help="seconds")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        command = [sys.executable, "-m", "miles_core.cli", "train", *settings(args, folder)]
        try:
            code = subprocess.run(command, timeout=args.deadline).returncode
        except subprocess.TimeoutExpired:
            code = 124
        metrics = folder / "run" / "metrics.jsonl"
        rows = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    rows = [row for row in rows if "mismatch/tokens_unequal" in row and "train/num_tokens" in row]
    tokens = [row["train/num_tokens"] for row in rows]
    unequal = sum(row["mismatch/tokens_unequal"] for row in rows)
    worst = max((row["mismatch/max_abs"] for row in rows), default=0.0)
    print(f"{len(rows)} of {args.steps} steps, {sum(tokens)} tokens compared, {unequal} unequal, max abs {worst}")
    print(f"after each weight update: at least {min(tokens[1:], default=0)} tokens; exit code of the run {code}")
    for part in ("rollout", "train", "publish", "step"):
        times = [row[f"perf/{part}_s"] for row in rows] or [0.0]
        middle, longest = statistics.median(times), max(times[1:], default=0.0)
        print(f"{part}: first {times[0]:.3f} s, median {middle:.3f} s, longest after it {longest:.3f} s")
    return int(unequal > 0 or len(rows) < args.steps or code != 0)


if __name__ == "__main__":
    sys.exit(main())
