"""Kill processes of a training run with SIGKILL at random times, and see what becomes of it.

    python tools/chaos_train.py [--runs 20] [--steps 4] [--trainers 2] [--engines 1] [--seed 0]

One run is left alone first. Then, in each of the others, one process (driver, a trainer or an engine) is killed at a random
moment. If the driver lives, it must end within the deadline with a message that names the dead process; then the run is
resumed, once, and must end with the weights, optimizer, samples and metrics of the run left alone, bit for bit. Nothing may
hang and no process may be left.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DEADLINE_S = 600.0
"""Of one run, far above what a loaded machine takes."""
END_S = 60.0
"""From the kill to the end of a driver that lives."""
RECIPE = """
[run]
num_steps = {steps}
seed = 3
[model]
path = "recipe:quickstart"
[data]
train = "miles_core.recipes.sorting:problems?size=400&seed=1&split=train"
[rollout]
prompts_per_step = 4
group_size = 4
[sampling]
max_new_tokens = 8
[reward]
name = "exact_match"
[optimizer]
lr = 3e-4
[checkpoint]
every = 1
"""


def command(recipe: Path, name: str, args: argparse.Namespace, *, resume: bool) -> list[str]:
    """The run's command line."""
    words = [sys.executable, "-m", "miles_core.cli", "train", str(recipe), "--name", name, "--cluster.deadline_s", "300"]
    words += ["--cluster.num_trainers", str(args.trainers), "--cluster.num_engines", str(args.engines)]
    return [*words, "--resume"] if resume else words


def launch(folder: Path, words: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start it in `folder`."""
    with log.open("ab") as output:
        return subprocess.Popen(words, cwd=folder, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"})


def workers(driver: int) -> dict[int, str]:
    """Pids of the driver's workers."""
    found = subprocess.run(["ps", "-o", "pid=,args=", "--ppid", str(driver)], capture_output=True, text=True).stdout
    return {int(line.split()[0]): line for line in found.splitlines() if "miles_core.cluster.process" in line}


def everything(run: Path) -> dict[str, str]:
    """Digests of what a run leaves: samples, metrics without seconds, and the tensors of the last checkpoint."""
    from safetensors import safe_open

    from miles_kernels.checksum import tensor_hash

    found: dict[str, str] = {}
    for file in sorted((run / "samples").iterdir()):
        found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{key: float(value) for key, value in row.items() if not key.startswith("perf/") and key != "time"} for row in rows]
    found["metrics"] = json.dumps(kept)
    last = sorted((run / "checkpoints").glob("step_*"))[-1]
    for file in sorted(last.rglob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            found |= {f"{file.name}:{name}": tensor_hash(handle.get_tensor(name)) for name in handle.keys()}
    found["state"] = (last / "state.json").read_text()
    return found


def one(number: int, folder: Path, recipe: Path, args: argparse.Namespace, whole_s: float, expected: dict[str, str]) -> str:
    """One killed run; returns what happened. Raises AssertionError when it is not as promised."""
    draw = random.Random(args.seed * 1000 + number)
    name, log = f"run{number}", folder / f"run{number}.log"
    driver = launch(folder, command(recipe, name, args, resume=False), log)
    moment = draw.uniform(0.1, 0.9) * whole_s
    end = time.monotonic() + moment
    while time.monotonic() < end and driver.poll() is None:
        time.sleep(0.02)
    if driver.poll() is not None:
        early = f"run {number}: ended before the kill at {moment:.1f} s"
        return early if driver.returncode == 0 else fail(log, "ended by itself")
    there = workers(driver.pid)
    victim = draw.choice([driver.pid, *there])
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    try:
        code = driver.wait(END_S)
    except subprocess.TimeoutExpired:
        driver.kill()
        return fail(log, f"hung after its process {victim} was killed")
    took = time.monotonic() - killed
    said = log.read_text(errors="replace")
    if victim != driver.pid and code != 0:
        pattern = rf"(\w+-\d+) \(pid {victim}\) was killed by SIGKILL|(engine-\d+)\b.*(cannot be reached|did not answer)"
        named = re.search(pattern, said)
        if named is None:
            return fail(log, f"did not name process {victim}")
        what = f"worker killed at {moment:.1f} s, named {named[1] or named[2]} after {took:.1f} s"
    else:
        what = f"driver killed at {moment:.1f} s" if victim == driver.pid else f"worker killed at {moment:.1f} s, at the very end"
    gone = time.monotonic() + 15
    while any(Path(f"/proc/{pid}").exists() for pid in there):
        if time.monotonic() > gone:
            return fail(log, "left worker processes behind")
        time.sleep(0.05)
    if code != 0:
        begun = (folder / "runs" / name / "config.toml").exists()
        again = launch(folder, command(recipe, name, args, resume=begun), log)
        if again.wait(DEADLINE_S) != 0:
            return fail(log, "could not be resumed")
        what += ", resumed" if begun else ", started again"
    found = everything(folder / "runs" / name)
    wrong = [key for key in expected if found.get(key) != expected[key]]
    if wrong or found.keys() != expected.keys():
        return fail(log, f"differs from the run left alone in {wrong[:5]}")
    return f"run {number}: {what}, equal to the run left alone"


def fail(log: Path, why: str) -> str:
    """The verdict of a bad run, with the end of its log."""
    return f"FAILED: {log.stem} {why}; it said:\n{log.read_text(errors='replace')[-3000:]}"


def main() -> None:
    """Entry point; exit code 1 when a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--trainers", type=int, default=2)
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="miles-chaos-"))
    recipe = folder / "chaos.toml"
    recipe.write_text(RECIPE.format(steps=args.steps))
    started = time.monotonic()
    alone = launch(folder, command(recipe, "alone", args, resume=False), folder / "alone.log")
    if alone.wait(DEADLINE_S) != 0:
        raise SystemExit((folder / "alone.log").read_text())
    whole_s = time.monotonic() - started
    expected = everything(folder / "runs" / "alone")
    print(f"left alone: {whole_s:.1f} s, {len(expected)} things to compare", flush=True)
    failures = 0
    for number in range(args.runs):
        verdict = one(number, folder, recipe, args, whole_s, expected)
        failures += verdict.startswith("FAILED")
        print(verdict, flush=True)
    print(f"{args.runs - failures} of {args.runs} runs as promised", flush=True)
    if failures:
        raise SystemExit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
