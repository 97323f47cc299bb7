"""Prompt sources: readers, dataset shapes, prompt building, SFT examples, ledger and exact resume."""

from miles_core.data.config import DataConfig, FewShot
from miles_core.data.formats import Format, detect_format
from miles_core.data.load import load_prompts, load_rows, load_sft
from miles_core.data.record import DataError, LoadReport, Prompt, PromptGroup, RawRow, Row, SFTExample
from miles_core.data.source import Ledger, PromptSource, as_groups

__all__ = [
    "DataConfig",
    "DataError",
    "FewShot",
    "Format",
    "Ledger",
    "LoadReport",
    "Prompt",
    "PromptGroup",
    "PromptSource",
    "RawRow",
    "Row",
    "SFTExample",
    "as_groups",
    "detect_format",
    "load_prompts",
    "load_rows",
    "load_sft",
]
