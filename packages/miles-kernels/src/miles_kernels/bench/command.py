"""`miles-kernels bench [WHAT ...] --out DIR`: see `run`. Importing this loads no torch."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

SECTIONS = {
    "gemm": "gemm:rows",
    "moe": "moe:rows",
    "logprob": "logprob:rows",
    "fp8": "fp8:rows",
    "attention": "attention:rows",
    "sampling": "sampling:rows",
    "model": "model:rows",
}
EXTRA = {
    "model-0.6b": "model:rows_small",
    "model-8b": "model:rows_large",
    "tune": "gemm:tune",
    "moe-tiles": "moe:tiles",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Exit code 0; 2 without a CUDA device or for an unknown section."""
    parser = argparse.ArgumentParser(
        prog="miles-kernels bench", description="Ratios to cuBLAS, SDPA and the hardware floor, in one run."
    )
    add_arguments(parser)
    return run(parser.parse_args(arguments))


def add_to(commands: Any) -> None:
    """Add the command to the subparsers of `miles-kernels`."""
    parser = commands.add_parser(
        "bench",
        help="ratios to cuBLAS, SDPA and the hardware floor on this GPU, and a roofline",
        description="Measures ops and whole models against stock torch and the measured ceilings, all in one run. "
        "Writes bench.md, bench.json and roofline.svg after every row.",
    )
    add_arguments(parser)
    parser.set_defaults(command=run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `bench`, for this module and for the `miles-kernels` command."""
    known = ", ".join([*SECTIONS, *EXTRA])
    parser.add_argument(
        "what", nargs="*", default=[], help=f"sections to run, in order: {known} (default: all of {', '.join(SECTIONS)})"
    )
    parser.add_argument("--out", type=Path, default=Path("bench-out"), help="folder for bench.md, bench.json and roofline.svg")


def load(name: str) -> Callable[[], Any] | None:
    """The function behind a section, or None where this installation does not have it."""
    module, function = {**SECTIONS, **EXTRA}[name].split(":")
    try:
        return getattr(importlib.import_module(f"miles_kernels.bench.{module}"), function)
    except ModuleNotFoundError as error:
        if error.name == f"miles_kernels.bench.{module}":
            return None
        raise


def run(options: argparse.Namespace) -> int:
    """Measure the sections; print each row and write the report after it, so that an interrupted run keeps what it has."""
    import torch

    from miles_kernels.bench.report import Machine, Row, line, markdown, write
    from miles_kernels.bench.timing import copy_bandwidth, gemm_rate

    unknown = sorted(set(options.what) - set(SECTIONS) - set(EXTRA))
    if unknown:
        print(f"miles-kernels bench: no section {', '.join(unknown)}; known: {', '.join([*SECTIONS, *EXTRA])}", file=sys.stderr)
        return 2
    from miles_kernels.cuda import ready

    found_wrong = ready.problem(torch.cuda.current_device() if torch.cuda.is_available() else 0)
    if found_wrong is not None:
        print(f"miles-kernels bench: needs a CUDA device: {found_wrong}", file=sys.stderr)
        return 2
    machine = Machine(torch.cuda.get_device_name(), str(torch.__version__), copy_bandwidth(), gemm_rate())
    found: list[Row] = []
    for name in options.what or SECTIONS:
        section = load(name)
        if section is None:
            continue
        result: Iterable[Row] | dict[str, dict[int, str]] = section()
        if isinstance(result, dict):
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "gemm_table.json").write_text(json.dumps({machine.name: result}, indent=1))
            continue
        for row in result:
            found.append(row)
            print(line(row), flush=True)
            write(found, machine, options.out)
    print(markdown(found, machine))
    return 0
