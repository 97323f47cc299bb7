"""The `miles-kernels` command: contract, probe, parity, verify, bench, doctor. torch is imported inside the commands."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

from miles_kernels.bench.command import add_to as add_bench
from miles_kernels.doctor import add_to as add_doctor
from miles_kernels.verify.command import add_to as add_verify

if TYPE_CHECKING:
    from miles_kernels.nn.config import Family
    from miles_kernels.parity import ParityRow

FAMILIES: tuple[Family, ...] = ("llama", "qwen2", "qwen3", "qwen3_moe", "glm4_moe")
DTYPES = ("float32", "bfloat16")
_HEADER = f"  {'schedule':<32} {'threads':>7} {'tokens':>7} {'unequal logprob':>16} {'unequal hidden':>15} {'max abs':>10}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Exit code 0, 1 when a check found unequal bits, 2 for wrong input."""
    options = _parser().parse_args(arguments)
    _prepare()
    try:
        command: Callable[[argparse.Namespace], int] = options.command
        return command(options)
    except ValueError as error:
        print(f"miles-kernels: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="miles-kernels", description="Aligned, batch-invariant transformer ops: what they promise, and checks."
    )
    parser.add_argument("--version", action="version", version=f"miles-kernels {version('miles-kernels')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    contract = commands.add_parser("contract", help="print the numeric contract of this process and its digest")
    contract.add_argument("--dtype", choices=DTYPES, default="float32")
    contract.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    contract.add_argument("--precision", choices=("full", "fp8"), default="full", help="fp8: float8 products in the forward")
    contract.add_argument("--json", action="store_true", help="the canonical JSON the digest is made of")
    contract.set_defaults(command=_contract)

    probe = commands.add_parser("probe", help="check that this machine's BLAS keeps a row's bits whatever surrounds the row")
    probe.set_defaults(command=_probe)

    parity = commands.add_parser(
        "parity",
        help="compare decode, chunked prefill, cached prefix and packed training forwards bit by bit",
        description="Runs a tiny random model through every schedule of an engine and a trainer. Exit code 1 if any token's "
        "hidden state or log-probability differs from that of the sequence alone.",
    )
    parity.add_argument("--family", choices=(*FAMILIES, "all"), default="qwen3")
    parity.add_argument("--dtype", choices=(*DTYPES, "all"), default="float32")
    parity.add_argument("--seed", type=int, default=0, help="of the weights and the sequences")
    parity.add_argument("--threads", type=_thread_counts, default=(1, 2), metavar="1,2", help="torch thread counts to try")
    parity.add_argument("--json", action="store_true", help="one JSON object per line instead of a table")
    parity.set_defaults(command=_parity)

    add_verify(commands)
    add_bench(commands)
    add_doctor(commands)
    return parser


def _thread_counts(text: str) -> tuple[int, ...]:
    counts = tuple(int(part) for part in text.split(","))
    if not counts or min(counts) < 1:
        raise argparse.ArgumentTypeError("thread counts must be at least 1")
    return counts


def _prepare() -> None:
    """Settings that must precede torch. Waiting threads sleep: spinning ones cost a shared machine twentyfold."""
    os.environ.setdefault("GOMP_SPINCOUNT", "0")
    os.environ.setdefault("KMP_BLOCKTIME", "0")


def _contract(options: argparse.Namespace) -> int:
    from miles_kernels.contract import Contract

    contract = Contract.for_device(options.device, options.dtype, options.precision)
    if options.json:
        print(contract.to_json())
        return 0
    print(f"{contract.digest}  dtype {contract.dtype}, matmul {contract.matmul}, platform {contract.platform}")
    for name, op in sorted(contract.ops.items()):
        print(f"  {name:<15} {op.backend:<10} {op.compute:<8} {op.order}")
    return 0


def _probe(options: argparse.Namespace) -> int:
    from miles_kernels.probe import probe

    report = probe()
    print(f"mode {report.mode}, platform {report.fingerprint}: {report.num_cases} cases in {1000 * report.seconds:.0f} ms")
    for failure in report.failures:
        print(f"  native differs: {failure}")
    if report.failures:
        print(
            f"native products are not batch-invariant in this process; the {report.mode} mode replaces them "
            "(invariant, but other bits than native ones, and slower)"
        )
    return 0


def _parity(options: argparse.Namespace) -> int:
    import torch

    from miles_kernels.nn.checkpoint import random_decoder
    from miles_kernels.parity import run_parity, tiny_config

    unequal = 0
    families: tuple[Family, ...] = FAMILIES if options.family == "all" else (options.family,)
    for family in families:
        for dtype in DTYPES if options.dtype == "all" else (options.dtype,):
            model = random_decoder(tiny_config(family), options.seed, dtype=getattr(torch, dtype))
            if not options.json:
                print(f"{family} {dtype}  contract {model.contract.digest}")
                print(_HEADER)
            for row in run_parity(model, seed=options.seed, num_threads=options.threads):
                unequal += not row.equal
                print(_json_line(family, dtype, row) if options.json else _table_line(row), flush=True)
    if not options.json:
        print("bitwise equal" if not unequal else f"UNEQUAL in {unequal} schedules")
    return 1 if unequal else 0


def _table_line(row: ParityRow) -> str:
    return (
        f"  {row.schedule:<32} {row.num_threads:>7} {row.num_tokens:>7} "
        f"{row.unequal_logprob:>16} {row.unequal_hidden:>15} {row.max_abs:>10.3g}"
    )


def _json_line(family: str, dtype: str, row: ParityRow) -> str:
    return json.dumps({"family": family, "dtype": dtype, "equal": row.equal, **vars(row)})


if __name__ == "__main__":
    sys.exit(main())
