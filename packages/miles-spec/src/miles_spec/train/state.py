"""A draft trainer's files: tensors as safetensors, counters as JSON. The only place of this package that names safetensors."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def save_tensors(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors."""
    _library("safetensors.torch").save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, file)


@torch.no_grad()
def load_tensors(file: Path, like: Mapping[str, Tensor]) -> None:
    """Copy the tensors of `file` into `like`, bit for bit.

    Raises ValueError naming the file and every tensor that is missing, unexpected, or of another shape or dtype; nothing is
    copied then.
    """
    try:
        found = _library("safetensors.torch").load_file(file)
    except FileNotFoundError:
        raise ValueError(f"{file}: it is not there; resume from another checkpoint") from None
    except _library("safetensors").SafetensorError as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error}); resume from another checkpoint") from None
    wrong = [f"{name} is missing" for name in sorted(set(like) - set(found))]
    wrong += [f"{name} is unexpected" for name in sorted(set(found) - set(like))]
    for name in sorted(set(found) & set(like)):
        have, want = found[name], like[name]
        if have.shape != want.shape or have.dtype != want.dtype:
            wrong.append(f"{name} is {have.dtype} {list(have.shape)}, expected {want.dtype} {list(want.shape)}")
    if wrong:
        raise ValueError(f"{file}: {'; '.join(wrong[:8])}{' ...' if len(wrong) > 8 else ''}. It belongs to another draft")
    for name, tensor in found.items():
        like[name].copy_(tensor)


def write_facts(file: Path, facts: Mapping[str, Any]) -> None:
    """Write a JSON object."""
    file.write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_facts(file: Path) -> dict[str, Any]:
    """Read a JSON object; ValueError naming the file when it is none."""
    try:
        facts = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); resume from another checkpoint") from None
    if not isinstance(facts, dict):
        raise ValueError(f"{file}: not a JSON object; resume from another checkpoint")
    return facts


def _library(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError('a draft\'s files need safetensors: pip install "miles-kernels[hf]"') from error
