"""Run one recipe in several layouts and compare all that it leaves, bit for bit: samples, metrics, weights, optimizer.

    python tools/compare_layouts.py [--device cpu|cuda] [--steps 6] [--layouts one,disaggregated] [RECIPE]

Layouts: "one" process; "disaggregated", "colocated", "lent" and "ray" with a trainer and an engine in processes of their own. On
a GPU the first takes two, over NCCL; the next two share one, over CUDA IPC, and "lent" needs one. Every token's log-probability
is compared between engine and trainer, every published tensor is hashed where it was loaded. Last, a control with another seed
must differ.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from chaos_train import everything

APART = ["--cluster.num_trainers", "1", "--cluster.num_engines", "1", "--cluster.deadline_s", "120"]
LAYOUTS: dict[str, list[str]] = {
    "one": [],
    "disaggregated": [*APART, "--cluster.layout", "disaggregated"],
    "colocated": [*APART, "--cluster.layout", "colocated"],
    "lent": [*APART, "--cluster.layout", "colocated", "--sync.kind", "lent"],
    "ray": [*APART, "--cluster.kind", "ray"],
}


def run(name: str, options: list[str], folder: Path, args: argparse.Namespace) -> dict[str, str]:
    """One run of the recipe; prints what it counted, returns digests of what it left."""
    words = [sys.executable, "-m", "miles_core.cli", "train", args.recipe, "--name", name, "--run.dir", str(folder), *options]
    words += ["--run.num_steps", str(args.steps), "--checkpoint.every", str(args.steps), "--model.device", args.device]
    words += ["--model.dtype", args.dtype, "--sync.deadline_s", "60"]
    started = time.monotonic()
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=args.timeout_s, env={**os.environ})
    if done.returncode != 0:
        logs = "".join(f"\n--- {log.name}\n{log.read_text()[-3000:]}" for log in sorted(folder.glob(f"*{name}*/**/*.log")))
        raise RuntimeError(f"{name} ended with {done.returncode}: {(done.stdout + done.stderr)[-3000:]}{logs}")
    took = time.monotonic() - started
    rows = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    unequal = sum(row.get("mismatch/tokens_unequal", 0) + row.get("eval/tokens_unequal", 0) for row in rows)
    tokens = sum(row.get("rollout/num_tokens", 0) for row in rows)
    published = [row["perf/publish_s"] * 1e3 for row in rows if "perf/publish_s" in row]
    said = f"{name}: {len(rows)} rows, {tokens:.0f} tokens trained, {unequal} unequal, {took:.1f} s"
    print(f"{said}, update {min(published):.1f} ms at best" if published else said, flush=True)
    if unequal:
        raise RuntimeError(f"{name}: {unequal} tokens unequal between engine and trainer")
    return everything(folder / name)


def main() -> None:
    """Entry point; exit code 1 when layouts differ, or when the control does not."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="quickstart")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--layouts", default="one,disaggregated,colocated")
    parser.add_argument("--timeout-s", type=float, default=300.0)
    args = parser.parse_args()
    names = args.layouts.split(",")
    if unknown := [name for name in names if name not in LAYOUTS]:
        parser.error(f"no layout {', '.join(unknown)}; there are {', '.join(LAYOUTS)}")
    failed = []
    with tempfile.TemporaryDirectory(prefix="miles-layouts-") as root:
        folder = Path(root)
        first = run(names[0], LAYOUTS[names[0]], folder, args)
        for name in names[1:]:
            try:
                other = run(name, LAYOUTS[name], folder, args)
            except (RuntimeError, subprocess.TimeoutExpired) as error:  # one layout must not end the others
                print(f"{name}: FAILED: {error}", flush=True)
                failed.append(name)
                continue
            wrong = sorted(key for key in first.keys() | other.keys() if first.get(key) != other.get(key))
            print(f"{name} and {names[0]}: {len(first)} things, {len(wrong)} differ {wrong[:5] or ''}", flush=True)
            failed += [name] if wrong else []
        control = run("control", [*LAYOUTS[names[0]], "--run.seed", "12345"], folder, args)
        same = all(control.get(key) == first[key] for key in first)
        print(f"control with another seed: {'THE SAME' if same else 'differs, as it must'}", flush=True)
    if failed or same:
        raise SystemExit(f"not equal: {', '.join(failed) or 'the control is'}")


if __name__ == "__main__":
    main()
