"""Compile every Triton kernel for Hopper (sm_90) on a machine without a GPU, at the sizes and launches that the ops choose.

    python tools/compile_kernels.py                       everything: minutes with cold caches
    python tools/compile_kernels.py moe norm --early      some groups; launched early, as for few rows

The ops run as they are, over tensors that have no memory; a driver that launches nothing stands in for CUDA. So what is compiled
is what a GPU would compile, for sizes that divide no tile as well, and one that does not compile or needs more shared memory than
there is, is a failure. Where numbers of a row are summed across threads in floating point, the order follows from the layout
that the compiler chose: one problem (say, rows of 1024) summed in two layouts is a failure too, because its bits would depend on
what told its calls apart (the number of rows, the alignment of a view). Needs triton; exit code 1 when something failed.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

SHARED_BYTES = 232_448
"""Shared memory that a program may have on Hopper."""
CAPABILITY = 90


class Built(NamedTuple):
    """One compiled variant of a kernel."""

    kernel: str
    problem: str
    call: str
    shared: int
    registers: int
    stack: int
    """bytes, spilled registers among them"""
    sums: tuple[str, ...]
    """layouts in which floating-point sums are reduced across threads"""
    constants: str


class Recorder:
    """What was compiled, by the case that asked for it."""

    def __init__(self) -> None:
        self.case = ("", "")
        self.built: list[Built] = []
        self.failures: list[str] = []

    def add(self, src: Any, metadata: Any, asm: Any) -> None:
        """Read a compiled kernel: its resources and how it sums."""
        registers, stack = usage(asm["cubin"])
        constants = {src.fn.arg_names[at[0]]: value for at, value in src.constants.items()}
        text = " ".join(f"{k}={v}" for k, v in constants.items() if k.isupper() and k != "EARLY")
        self.built.append(Built(metadata.name, *self.case, metadata.shared, registers, stack, float_sums(asm["ttgir"]), text))


def usage(cubin: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes of its stack)."""
    import tempfile

    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[1]), int(found[2])


def float_sums(ttgir: str) -> tuple[str, ...]:
    """Layouts of every reduction by addition of floating-point numbers, in the order of the program."""
    named = dict(re.findall(r"^(#\w+) = (#.*)$", ttgir, re.MULTILINE))
    found = []
    for axis, body, operand in re.findall(r'"tt\.reduce"\(.*?axis = (\d+).*?\n(.*?)\}\) : \((tensor<.*?)\) ->', ttgir, re.DOTALL):
        layout = re.search(r"(\d[\dx]*)x(?:f\d+|bf16), (#\w+)", operand)
        if "arith.addf" in body and layout is not None and layout[1].split("x")[int(axis)] != "1":
            found.append(f"{layout[1]} {named.get(layout[2], layout[2])}")
    return tuple(found)


def launch_nothing(*args: Any) -> None:
    """In place of a launch: refuse what CUDA would."""
    if max(args[1], args[2]) > 65_535:
        raise ValueError(f"a grid of {args[:3]} is too large")
    for each in args:
        if type(each).__name__ == "TensorDescriptor" and min(each.shape) < 1:
            raise ValueError(f"a descriptor of {each.shape}: bulk copies need at least one element")


def stand_in(recorder: Recorder) -> None:
    """Make triton compile for Hopper and launch nothing; make the ops believe that tensors without memory are on one."""
    import triton
    from triton.backends.compiler import GPUTarget

    class Utils:
        @staticmethod
        def load_binary(name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
            return 1, 1, 0, 0, 1024

        @staticmethod
        def get_device_properties(device: int) -> dict[str, int]:
            return {"max_shared_mem": SHARED_BYTES, "multiprocessor_count": 132, "warpSize": 32}

    class Driver:
        utils = Utils

        @staticmethod
        def launcher_cls(src: Any, metadata: Any) -> Any:
            return launch_nothing

        @staticmethod
        def get_current_device() -> int:
            return 0

        @staticmethod
        def get_current_stream(device: int) -> int:
            return 0

        @staticmethod
        def get_current_target() -> GPUTarget:
            return GPUTarget("cuda", CAPABILITY, 32)

    triton.runtime.driver.set_active(Driver())
    from triton.compiler import compiler

    made = compiler.CompiledKernel.__init__

    def init(self: Any, src: Any, metadata_group: Any, hash: Any) -> None:
        made(self, src, metadata_group, hash)
        recorder.add(src, self.metadata, self.asm)

    compiler.CompiledKernel.__init__ = init


def pretend(early: bool) -> None:
    """Replace what the launchers ask of a GPU."""
    import torch

    from miles_kernels.cuda import dispatch, gemm_triton, launch, moe

    gemm_triton.num_sms = lambda device: 132
    moe.few_proven = lambda *kind: True
    dispatch._usable = lambda device: frozenset({"triton"})
    dispatch._device_name = lambda device: "NVIDIA H200"
    for name, module in list(sys.modules.items()):
        if name.startswith("miles_kernels.cuda."):
            for what, value in (
                ("early_for", lambda rows, tensor: early and rows <= launch.FEW_ROWS),
                ("starts_early", lambda device: early),
                ("num_sms", lambda device: 132),
            ):
                if hasattr(module, what):
                    setattr(module, what, value)
    torch.set_default_device("meta")


def parse() -> argparse.Namespace:
    """Arguments."""
    from compile_cases import GROUPS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", help=f"any of: {', '.join(GROUPS)}; all by default")
    parser.add_argument("--early", action="store_true", help="compile the variants that start while their predecessor runs")
    parser.add_argument("--verbose", action="store_true", help="name every variant")
    args = parser.parse_args()
    unknown = sorted(set(args.groups) - set(GROUPS))
    if unknown:
        parser.error(f"no group {', '.join(unknown)}; known: {', '.join(GROUPS)}")
    return args


def main() -> int:
    """Compile, then print a table of resources and what failed."""
    try:
        import triton
    except ImportError:
        print("compile_kernels: triton is not installed here: pip install triton (no GPU is needed)", file=sys.stderr)
        return 2
    from compile_cases import GROUPS

    args, recorder = parse(), Recorder()
    stand_in(recorder)
    pretend(args.early)
    for group in args.groups or GROUPS:
        began = time.monotonic()
        for problem, variant, call in GROUPS[group]():
            recorder.case = f"{group}, {problem}", variant
            before = len(recorder.built)
            try:
                call()
            except Exception as error:  # whatever the compiler raises is what this looks for
                recorder.failures.append(f"{': '.join(recorder.case)}: {type(error).__name__}: {str(error).strip()[-300:]}")
            if args.verbose:
                for each in recorder.built[before:]:
                    print(f"  {each.problem}: {each.call}: {each.kernel} {each.constants}", *each[3:7])
        print(f"{group}: {time.monotonic() - began:.0f} s", flush=True)
    report(recorder)
    print(f"triton {triton.__version__}, sm_{CAPABILITY}: {len(recorder.built)} variants, {len(recorder.failures)} failures")
    return 1 if recorder.failures else 0


def report(recorder: Recorder) -> None:
    """Print resources by kernel, add variants that sum in different orders to the failures, print those."""
    kernels, orders = defaultdict(list), defaultdict(dict)
    for each in recorder.built:
        kernels[each.kernel].append(each)
        orders[each.kernel, each.problem, each.constants].setdefault(each.sums, each.call)
    print(f"{'kernel':24} variants  shared bytes  registers  stack bytes (largest)")
    for name, found in sorted(kernels.items()):
        largest = [max(getattr(each, what) for each in found) for what in ("shared", "registers", "stack")]
        print(f"{name:24} {len(found):8} {largest[0]:13} {largest[1]:10} {largest[2]:12}")
    for (kernel, problem, constants), by_sums in orders.items():
        if len(by_sums) > 1:
            told = "; ".join(f"{call}: {', '.join(sums)}" for sums, call in by_sums.items())
            recorder.failures.append(f"{problem}: {kernel} {constants} sums in {len(by_sums)} orders: {told}")
    for failure in recorder.failures:
        print(f"FAILED {failure}")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())
