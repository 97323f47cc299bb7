"""Axis 11: the bits of a fixed computation in a fresh process, with an empty kernel cache. Prints one digest.

python -m miles_kernels.verify.golden --device cpu --dtype float32
"""

from __future__ import annotations

import argparse
import hashlib
import os
import struct
import subprocess
import sys
import tempfile

import torch

TIMEOUT_S = 240.0


def digest(device: str, dtype: torch.dtype) -> tuple[str, int]:
    """(SHA-256 over the logits' log-probabilities and hidden states of a small model, number of values)."""
    from miles_kernels.verify.backends import backend
    from miles_kernels.verify.blocks import shape
    from miles_kernels.verify.model_axes import ModelCase

    case = ModelCase(backend(device), shape("qwen3_moe", large=False), dtype, [40, 7, 130], seed=21)
    found = hashlib.sha256()
    count = 0
    for pair in case.alone:
        for x in pair:
            values = x.float().contiguous().view(torch.int32).flatten().tolist()
            found.update(struct.pack(f"{len(values)}i", *values))
            count += len(values)
    return found.hexdigest(), count


def digest_of_child(device: str, dtype: torch.dtype) -> str:
    """The same in a child process with a kernel cache of its own. Raises RuntimeError when it fails or exceeds 240 s."""
    name = str(dtype).removeprefix("torch.")
    command = [sys.executable, "-m", "miles_kernels.verify.golden", "--device", device, "--dtype", name]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"the restarted process gave no digest within {TIMEOUT_S:.0f} s: {' '.join(command)}") from None
    if done.returncode:
        raise RuntimeError(f"the restarted process failed: {done.stderr.strip()[-500:]}")
    return done.stdout.split()[-1]


def main() -> None:
    """Print the digest."""
    parser = argparse.ArgumentParser(description="The digest of a fixed computation, for comparison across processes.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    from miles_kernels.env import prepare_process

    prepare_process()
    print(digest(options.device, getattr(torch, options.dtype))[0])


if __name__ == "__main__":
    main()
