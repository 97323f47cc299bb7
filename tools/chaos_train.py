"""Kill processes of a training run with SIGKILL at random times, and see what becomes of it.

    python tools/chaos_train.py [--runs 20] [--steps 4] [--trainers 2] [--engines 1] [--kind local|ray] [--plain]

One run is left alone first. Then, in each of the others, one process (driver, a trainer or an engine) is killed at a random
moment: during the start, or within a step that is drawn. If the driver lives, it must end within the deadline with a message
that names the dead process; then the run is resumed, once, and must end with the weights, optimizer, samples and metrics of the
run left alone, bit for bit. Nothing may hang and no process may be left.
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
from dataclasses import dataclass
from itertools import pairwise
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


def command(recipe: Path, name: str, args: argparse.Namespace, *, resume: bool, plain: bool = False) -> list[str]:
    """The run's command line."""
    words = [sys.executable, "-m", "miles_core.cli", "train", str(recipe), "--name", name, "--cluster.deadline_s", "300"]
    if not plain:
        words += ["--cluster.num_trainers", str(args.trainers), "--cluster.num_engines", str(args.engines)]
        words += ["--cluster.kind", args.kind, "--cluster.layout", "disaggregated"]
    return [*words, "--resume"] if resume else words


def launch(folder: Path, words: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start it in `folder`."""
    with log.open("ab") as output:
        return subprocess.Popen(words, cwd=folder, stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"})


def descendants(driver: int) -> dict[int, str]:
    """Pids of the driver's children, their children and so on, with their command lines."""
    found = subprocess.run(["ps", "-e", "-o", "pid=,ppid=,args="], capture_output=True, text=True).stdout
    rows = [(int(pid), int(parent), words) for pid, parent, words in (line.split(None, 2) for line in found.splitlines())]
    family: dict[int, str] = {}
    parents = {driver}
    while parents:
        born = {pid: words for pid, parent, words in rows if parent in parents}
        family |= born
        parents = set(born)
    return family


def workers(family: dict[int, str]) -> list[int]:
    """The trainers and engines among a driver's descendants."""
    return [pid for pid, words in family.items() if "miles_core.cluster.process" in words or words.startswith("ray::Actor")]


def num_rows(run: Path) -> int:
    """Metrics rows written so far: one before the first step, one after each."""
    file = run / "metrics.jsonl"
    return len(file.read_bytes().splitlines()) if file.exists() else 0


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def everything(run: Path) -> dict[str, str]:
    """Digests of what a run leaves: samples, metrics without seconds and memory, and the tensors of the last checkpoint."""
    from safetensors import safe_open

    from miles_kernels.checksum import tensor_hash

    found: dict[str, str] = {}
    for file in sorted((run / "samples").iterdir()):
        found[file.name] = hashlib.sha256(file.read_bytes()).hexdigest()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    machine = ("perf/", "memory/", "time")
    kept = [{key: float(value) for key, value in row.items() if not key.startswith(machine)} for row in rows]
    found["metrics"] = json.dumps(kept)
    last = sorted((run / "checkpoints").glob("step_*"))[-1]
    for file in sorted(last.rglob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            found |= {f"{file.name}:{name}": tensor_hash(handle.get_tensor(name)) for name in handle.keys()}
    found["state"] = (last / "state.json").read_text()
    return found


@dataclass(frozen=True)
class Usual:
    """What the run left alone took and left."""

    start_s: float
    step_s: list[float]
    """Of each step; the first takes longer."""
    left: dict[str, str]


def left_alone(folder: Path, recipe: Path, args: argparse.Namespace) -> Usual:
    """The run that nobody disturbs."""
    started = time.monotonic()
    driver = launch(folder, command(recipe, "alone", args, resume=False, plain=args.plain), folder / "alone.log")
    while num_rows(folder / "runs" / "alone") < 1 and driver.poll() is None:
        time.sleep(0.02)
    at = [time.monotonic()]
    while len(at) <= args.steps and driver.poll() is None:
        time.sleep(0.005)
        at += [time.monotonic()] * (num_rows(folder / "runs" / "alone") - len(at))
    if driver.wait(DEADLINE_S) != 0:
        raise SystemExit((folder / "alone.log").read_text())
    step_s = [after - before for before, after in pairwise(at)]
    return Usual(at[0] - started, step_s, everything(folder / "runs" / "alone"))


def moment(draw: random.Random, usual: Usual) -> tuple[int, float, str]:
    """When to kill: so many metrics rows there, so many seconds after; in words."""
    if draw.random() < 0.3:
        after = draw.uniform(0.05, 1.0) * usual.start_s
        return 0, after, f"{after:.1f} s after the start"
    rows = draw.randint(1, len(usual.step_s))
    after = draw.uniform(0.0, 1.0) * usual.step_s[rows - 1]
    return rows, after, f"{after:.2f} s into step {rows}"


def one(number: int, folder: Path, recipe: Path, args: argparse.Namespace, usual: Usual) -> str:
    """One killed run; says what happened, beginning with FAILED when it is not as promised."""
    draw = random.Random(args.seed * 1000 + number)
    name, log = f"run{number}", folder / f"run{number}.log"
    run = folder / "runs" / name
    rows, after, when = moment(draw, usual) if args.after is None else (args.after, 0.0, f"after step {args.after}")
    driver = launch(folder, command(recipe, name, args, resume=False), log)
    while num_rows(run) < rows and driver.poll() is None:
        time.sleep(0.02)
    end = time.monotonic() + after
    while time.monotonic() < end and driver.poll() is None:
        time.sleep(0.01)
    family = descendants(driver.pid)
    if driver.poll() is not None:
        early = f"run {number}: ended before the kill {when}"
        return early if driver.returncode == 0 else fail(log, "ended by itself")
    victim = draw.choice([driver.pid, *workers(family)])
    os.kill(victim, signal.SIGKILL)
    killed = time.monotonic()
    try:
        code = driver.wait(END_S)
    except subprocess.TimeoutExpired:
        driver.kill()
        return fail(log, f"hung after its process {victim} was killed {when}")
    took = time.monotonic() - killed
    said = log.read_text(errors="replace")
    if victim != driver.pid and code != 0:
        pattern = rf"(\w+-\d+) \(pid {victim}(?:\)|, a Ray actor).*|(engine-\d+)\b.*(cannot be reached|did not answer)"
        named = re.search(pattern, said)
        if named is None:
            return fail(log, f"did not name process {victim}, killed {when}")
        what = f"worker killed {when}, named {named[1] or named[2]} after {took:.1f} s"
    else:
        what = f"driver killed {when}" if victim == driver.pid else f"worker killed {when}, at the very end"
    gone = time.monotonic() + (120 if args.kind == "ray" else 15)  # Ray's agents look for their raylet now and then
    while left := [pid for pid in family if alive(pid)]:
        if time.monotonic() > gone:
            return fail(log, f"left processes behind: {[family[pid] for pid in left]}")
        time.sleep(0.05)
    if code != 0:
        begun = (run / "config.toml").exists()
        again = launch(folder, command(recipe, name, args, resume=begun), log)
        if again.wait(DEADLINE_S) != 0:
            return fail(log, "could not be resumed")
        what += ", resumed" if begun else ", started again"
    found = everything(run)
    wrong = [key for key in usual.left if found.get(key) != usual.left[key]]
    if wrong or found.keys() != usual.left.keys():
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
    parser.add_argument("--after", type=int, help="kill after this step instead of at a random time")
    parser.add_argument("--trainers", type=int, default=2)
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--kind", default="local", choices=["local", "ray"])
    parser.add_argument("--plain", action="store_true", help="the run left alone takes one process, as good as one trainer")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.runs < 1 or args.steps < 1:
        parser.error("--runs, --steps: at least 1, or nothing is shown")
    if args.plain and args.trainers > 1:
        parser.error("--plain: two trainers add gradients in another order than one process does; use --trainers 1")
    folder = Path(tempfile.mkdtemp(prefix="miles-chaos-"))
    recipe = folder / "chaos.toml"
    recipe.write_text(RECIPE.format(steps=args.steps))
    usual = left_alone(folder, recipe, args)
    steps = ", ".join(f"{each:.2f}" for each in usual.step_s)
    shown = f"{usual.start_s:.1f} s to start, steps of {steps} s, {len(usual.left)} things to compare"
    print(f"left alone, {args.kind}: {shown}", flush=True)
    failures = 0
    for number in range(args.runs):
        verdict = one(number, folder, recipe, args, usual)
        failures += verdict.startswith("FAILED")
        print(verdict, flush=True)
    print(f"{args.runs - failures} of {args.runs} runs as promised", flush=True)
    if failures:
        raise SystemExit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
