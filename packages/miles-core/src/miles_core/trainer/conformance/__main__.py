"""The suite from a shell: python -m miles_core.trainer.conformance package.module:function --processes 4 --options '{"cp": 2}'"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

from miles_core.trainer.conformance.cases import CASES, Layout
from miles_core.trainer.conformance.check import BFLOAT16, Tolerance, check
from miles_core.trainer.conformance.launch import ProcessesFailed, run
from miles_core.trainer.conformance.oracle import expected


def main() -> int:
    """Run cases in one layout and print a line for each; 1 when any does not conform."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backend", help="factory of the trainer, package.module:function")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--options", default="{}", help="JSON the factory is given")
    parser.add_argument("--cases", default=",".join(name for name in CASES if not name.startswith("wide")))
    parser.add_argument("--bfloat16", metavar="DEVICE", help="run the cases in bfloat16 on this device (cpu, cuda)")
    parser.add_argument("--deadline", type=float, default=240.0)
    asked = parser.parse_args()
    unknown = [name for name in asked.cases.split(",") if name not in CASES]
    if unknown:
        parser.error(f"no case {', '.join(unknown)}; there are {', '.join(CASES)}")
    cases = [CASES[name] for name in asked.cases.split(",")]
    if asked.bfloat16:
        cases = [case.on(asked.bfloat16, "bfloat16") for case in cases]
    layout = Layout(f"{asked.options} on {asked.processes}", asked.processes, json.loads(asked.options))
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        try:
            results = run(asked.backend, [(case, layout) for case in cases], Path(folder), deadline_s=asked.deadline)
        except ProcessesFailed as error:
            print(error)
            return 1
    for result in results:
        wrong = check(result, expected(result.case), BFLOAT16 if asked.bfloat16 else Tolerance())
        print("\n".join(wrong) or f"{result.case.name} on {layout.name}: conforms")
        failed += bool(wrong)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
