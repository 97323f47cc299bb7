"""`miles-kernels verify`: proof, on this machine, that a row's bits depend on nothing but the row."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_to(commands: Any) -> None:
    """Add the command to the subparsers of `miles-kernels`. Imports no torch."""
    parser = commands.add_parser(
        "verify",
        help="prove batch invariance on this machine: ops, whole models, with a negative control",
        description="Compares every op and whole models bit by bit over batch size, order, neighbours, padding, packing, chunk "
        "cuts, decode, pages, threads, process restart, expert load and backward passes. Exit code 1 if one element differs, "
        "if too few were compared, or if the negative control was not caught.",
    )
    parser.add_argument("what", nargs="*", default=["all"], help="op, model, all, or names such as linear or qwen3 (default all)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="folder for report.json, report.md and report.png")
    parser.add_argument("--json", action="store_true", help="print the JSON report instead of a table")
    parser.add_argument(
        "--rows", action="store_true", help="print each axis once it is done: a run cut short says how far it came"
    )
    parser.add_argument("--bisect", action="store_true", help="name the first differing layer and op")
    parser.set_defaults(command=run)


def run(options: argparse.Namespace) -> int:
    """Run the command; exit code 0 only for a run that proves what it should."""
    from miles_kernels.env import prepare_process

    prepare_process()
    from miles_kernels.verify.report import summary
    from miles_kernels.verify.result import AXES, Row
    from miles_kernels.verify.run import verify

    def tell(row: Row) -> None:
        if options.json:
            return
        if not row.equal:
            print(f"  UNEQUAL {row.subject}, axis {row.axis} ({AXES[row.axis]}): {row.worst}", flush=True)
        elif options.rows:
            print(f"  {row.subject}, axis {row.axis}: {row.elements} compared, 0 unequal, {row.seconds:.1f} s", flush=True)

    report = verify(options.what, device=options.device, dtype=options.dtype, seed=options.seed, bisect=options.bisect, tell=tell)
    if options.json:
        print(report.to_json())
    else:
        print(summary(report.rows))
        for control in report.controls:
            print(f"  control {control.subject}: {control.unequal} of {control.elements} differ")
        for problem in report.problems:
            print(f"  {problem}")
        if report.bisect:
            print(f"  bisect: {report.bisect}")
        print(f"{'proved' if report.passed else 'NOT PROVED'} in {report.seconds:.0f} s")
    if options.out is not None:
        for path in report.write(options.out):
            print(path)
    return 0 if report.passed else 1
