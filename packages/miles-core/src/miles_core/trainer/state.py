"""A trainer's state on disk: `model/`, a Hugging Face model directory, and `optimizer*.safetensors`; the same for every layout.

Tensors are put together one at a time and written in files of bounded size, so no process ever holds a whole model more.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles_core.trainer.model import WholeModel
from miles_core.trainer.optim import AdamW
from miles_core.trainer.tensorfile import read_tensors, save_tensors
from miles_core.trainer.weights import Owned
from miles_kernels.nn.checkpoint import INDEX, SINGLE, iter_tensors
from miles_kernels.nn.config import DecoderConfig

MAX_FILE_BYTES = 256 * 2**20


def write_state(directory: Path, model: WholeModel, optimizer: AdamW, facts: dict[str, Any], *, writer: bool) -> None:
    """Write a trainer's state; collective, and only the process that is the `writer` touches the disk."""
    weights = [(piece.name, piece.numel * piece.dtype(model.dtype).itemsize) for piece in model.slices]
    write_model(directory / "model", model.decoder.config, model.dtype, weights, model.export(), writer=writer)
    states = owned_state(model, optimizer)
    sizes = [(name, owned.bounds[-1][1] * 4) for name, owned in states.items()]
    whole = ((name, owned.read(0, owned.shape, torch.float32)) for name, owned in states.items())
    _write(directory, "optimizer", sizes, whole, writer)
    if writer:
        _write_json(directory / "trainer.json", facts)


def write_model(
    folder: Path,
    config: DecoderConfig,
    dtype: torch.dtype,
    sizes: list[tuple[str, int]],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    writer: bool,
) -> None:
    """Write a model directory of (HF name, tensor) pairs that come in the order of `sizes` (HF name, bytes); collective."""
    if writer:
        folder.mkdir(parents=True, exist_ok=True)
    placed = _write(folder, "model", sizes, tensors, writer)
    if not writer:
        return
    if len(set(placed.values())) > 1:
        index = {"metadata": {"total_size": sum(size for _, size in sizes)}, "weight_map": placed}
        _write_json(folder / INDEX, index)
    else:
        assert set(placed.values()) == {SINGLE}
    _write_json(folder / "config.json", config.to_hf(dtype=str(dtype).removeprefix("torch.")))


def read_state(directory: Path, model: WholeModel, optimizer: AdamW) -> None:
    """Read what `write_state` wrote, bit for bit. Raises ValueError naming file and tensor when something does not fit."""
    with torch.no_grad():
        model.load(iter_tensors(directory / "model"))
        states = owned_state(model, optimizer)
        files = sorted(directory.glob("optimizer*.safetensors"))
        shapes = {name: (owned.shape, torch.float32) for name, owned in states.items()}
        for name, tensor in read_tensors(files or [directory / "optimizer.safetensors"], shapes):
            states[name].write(0, tensor)


def owned_state(model: WholeModel, optimizer: AdamW) -> dict[str, Owned]:
    """The optimizer's tensors by name, as this process holds them: cut as the weights they belong to."""
    weights = model.weights()
    return {name: weights[name.partition(".")[2]].with_local(local, name) for name, local in optimizer.state().items()}


def _write(
    folder: Path, stem: str, sizes: list[tuple[str, int]], tensors: Iterable[tuple[str, Tensor]], writer: bool
) -> dict[str, str]:
    """Write tensors, in the order of `sizes`, into as few files as MAX_FILE_BYTES allows; returns the file of every name."""
    files: list[list[str]] = [[]]
    used = 0
    for name, size in sizes:
        if files[-1] and used + size > MAX_FILE_BYTES:
            files.append([])
            used = 0
        files[-1].append(name)
        used += size
    count = len(files)
    titles = [f"{stem}.safetensors" if count == 1 else f"{stem}-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    passing = iter(tensors)
    placed: dict[str, str] = {}
    for title, names in zip(titles, files, strict=True):
        _write_file(folder / title, names, passing, writer, checksums=stem == "model")
        placed |= dict.fromkeys(names, title)
    return placed


def _write_file(file: Path, names: list[str], passing: Iterator[tuple[str, Tensor]], writer: bool, checksums: bool) -> None:
    held: dict[str, Tensor] = {}
    for expected in names:
        name, tensor = next(passing)
        assert name == expected, f"{name} passes by where {expected} was planned"
        if writer:
            held[name] = tensor.detach().cpu().clone()
    if writer:
        save_tensors(file, held, checksums=checksums)


def _write_json(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
