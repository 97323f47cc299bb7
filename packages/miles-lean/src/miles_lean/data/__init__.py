"""Problems from the datasets in use, checks of their statements, filters, and rows for training."""

from miles_lean.data.checks import StatementReport, check_statements, decontaminate, type_key
from miles_lean.data.files import read_problems
from miles_lean.data.filters import solvable, win_rates
from miles_lean.data.pack import sft_rows, verified
from miles_lean.data.prompts import FORMATS, render, repair
from miles_lean.data.record import DataError, Problem
from miles_lean.data.rows import problems, proofs
from miles_lean.data.shapes import SHAPES, read_rows

__all__ = [
    "FORMATS",
    "SHAPES",
    "DataError",
    "Problem",
    "StatementReport",
    "check_statements",
    "decontaminate",
    "problems",
    "proofs",
    "read_problems",
    "read_rows",
    "render",
    "repair",
    "sft_rows",
    "solvable",
    "type_key",
    "verified",
    "win_rates",
]
