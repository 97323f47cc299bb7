"""`miles-kernels doctor`: what serves on this machine, what does not, and what to do about it."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_to(commands: Any) -> None:
    """Add the command to the subparsers of `miles-kernels`. Imports no torch."""
    parser = commands.add_parser("doctor", help="say which kernels serve on this machine, and what to install for the others")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Print one line for each thing. Exit code 1 when there is a GPU whose kernels cannot run, else 0."""
    from miles_kernels.env import prepare_process

    prepare_process()
    import torch

    from miles_kernels import native
    from miles_kernels.cuda import ready
    from miles_kernels.probe import probe

    native.library()
    report = probe()
    print(f"python {sys.version.split()[0]}, torch {torch.__version__}, triton {ready.triton_version() or 'not installed'}")
    print(f"CPU: {report.mode} products, C kernels {native.status()}")
    devices = torch.cuda.device_count()
    if not devices:
        print(f"GPU: none; {ready.problem()}")
        return 0
    problems = [ready.problem(device) for device in range(devices)]
    for device, found in enumerate(problems):
        print(f"GPU {device}: {torch.cuda.get_device_name(device)}: {found or ', '.join(_backends())}")
    return 1 if any(problems) else 0


def _backends() -> list[str]:
    from miles_kernels.cuda import gemm_deep, gemm_lt

    names = ["triton"]
    try:
        gemm_lt.library()
        names.append("cublaslt")
    except (gemm_lt.LtError, OSError) as error:
        names.append(f"no cublaslt ({error})")
    names.append("deepgemm" if gemm_deep.available() else "no deepgemm (optional: pip install sgl-deep-gemm, and nvcc)")
    return names
