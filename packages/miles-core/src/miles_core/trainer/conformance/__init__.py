"""One suite for every `Trainer` backend: the same batch must give the float64 oracle's loss, gradient norm and weights.

A backend is named by a factory, "package.module:function", that every process calls as `function(decoder, case, options)` after
torch.distributed is initialised, and that returns a `Trainer`. `decoder` holds the whole model on the case's device; `options`
is what the layout says ({"cp": 2}); `case` brings algorithm, optimizer and sizes. Nothing of Miles' own backends is assumed.

`python -m miles_core.trainer.conformance FACTORY --processes 2 --options JSON` runs it from a shell.

Example:
    from miles_core.trainer.conformance import CASES, Layout, Tolerance, check, expected, run

    layouts = [Layout("tp2", 2, {"tp": 2}), Layout("alone", 1)]
    for result in run("mine.trainer:build", [(CASES["dense"], layout) for layout in layouts], tmp_path):
        assert check(result, expected(result.case), Tolerance()) == []
"""

from miles_core.trainer.conformance.cases import CASES, Case, Layout
from miles_core.trainer.conformance.check import BFLOAT16, Result, Tolerance, check
from miles_core.trainer.conformance.launch import ProcessesFailed, run, run_processes
from miles_core.trainer.conformance.oracle import Expected, expected

__all__ = [
    "BFLOAT16",
    "CASES",
    "Case",
    "Expected",
    "Layout",
    "ProcessesFailed",
    "Result",
    "Tolerance",
    "check",
    "expected",
    "run",
    "run_processes",
]
