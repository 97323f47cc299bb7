"""`miles doctor`: versions, the torch build, the numeric contract proven on this machine, and which extras are there."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable

PACKAGES = ("miles-core", "miles-rollout", "miles-spec", "miles-kernels", "miles-lean")
EXTRAS = {
    "transformers": ("miles-rollout[text]", "tokenizers and chat templates of pretrained models"),
    "starlette": ("miles-rollout[server]", "the rollout service"),
    "pyarrow": ("miles-core[parquet]", "parquet files"),
    "math_verify": ("miles-core[math]", "the math_verify reward"),
    "pebble": ("miles-core[math]", "rewards in processes that can be killed"),
    "reasoning_gym": ("miles-core[gym]", "reasoning-gym tasks and rewards"),
    "gguf": ("miles-core[gguf]", "the smollm2 recipe, converting GGUF files"),
    "matplotlib": ("miles-core[report]", "report.html"),
}
"""Module to (what installs it, what it is for)."""


def examine(say: Callable[[str], None]) -> bool:
    """Say everything; False when something is broken that every run needs."""
    from miles_kernels.env import prepare_process

    cbwr = prepare_process()
    import torch

    from miles_kernels.contract import Contract
    from miles_kernels.probe import probe

    say(f"python       {platform.python_version()} on {platform.system()} {platform.machine()}, {sys.prefix}")
    for name in PACKAGES:
        say(f"{name:12} {_version(name)}")
    gpu = "yes" if torch.cuda.is_available() else "no"
    say(f"torch        {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, GPU {gpu}")
    say(
        f"threads      {torch.get_num_threads()} by default (run.threads sets it), {len(os.sched_getaffinity(0))} cores to run on"
    )
    say(f"MKL_CBWR     {cbwr}")
    report = probe()
    took = f"{report.num_cases} cases in {report.seconds * 1000:.0f} ms"
    say(f"numerics     {report.mode} matmul, {took}, fingerprint {report.fingerprint}")
    for failure in report.failures:
        say(f"             not batch-invariant natively: {failure} (so the exact mode is used, slower, same guarantee)")
    for dtype in ("float32", "bfloat16"):
        say(f"contract     {Contract.reference(dtype=dtype).digest} ({dtype})")
    _say_extras(say)
    _say_cache(say)
    return importlib.util.find_spec("safetensors") is not None


def _say_extras(say: Callable[[str], None]) -> None:
    for module, (extra, purpose) in EXTRAS.items():
        there = importlib.util.find_spec(module) is not None
        say(f"{'have' if there else 'missing':8} {module:14} {purpose}" + ("" if there else f'; pip install "{extra}"'))


def _say_cache(say: Callable[[str], None]) -> None:
    from miles_core.convert.fetch import cache_dir

    folder = cache_dir()
    models = sorted(path.name for path in (folder / "models").glob("*") if path.is_dir() and not path.name.startswith("."))
    parent = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(parent).free / 2**30
    say(f"cache        {folder} ({', '.join(models) or 'no models yet'}; {free:.1f} GiB free); MILES_CACHE moves it")


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed; pip install {name}"
