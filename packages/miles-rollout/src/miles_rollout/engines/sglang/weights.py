"""What SGLang does not check before it loads weights from disk: that every tensor is there, whole, and of the right shape."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from miles_rollout.extras import require
from miles_rollout.wire import WeightManifest

MAX_HEADER = 100 << 20
Shapes = dict[str, tuple[tuple[int, ...], str]]
"""Tensor name to (shape, safetensors dtype such as "BF16")."""
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float8_e4m3fn": "F8_E4M3", "int8": "I8", "uint8": "U8"}


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def read_shapes(directory: str | Path) -> Shapes:
    """Names, shapes and dtypes of all safetensors of a directory, from their headers alone.

    Raises ValueError naming the file or tensor at fault: no file, a header that is none, a file cut short, a name twice.
    """
    files = sorted(Path(directory).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{directory}: no *.safetensors file there")
    found: Shapes = {}
    for file in files:
        for name, entry in _header(file).items():
            if name in found:
                raise ValueError(f"{file.name}: tensor {name} is in another file too")
            found[name] = (tuple(entry.shape), entry.dtype)
    return found


def _header(file: Path) -> dict[str, _Entry]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 0 < length <= min(MAX_HEADER, size - 8):
            raise ValueError(f"{file.name}: not a safetensors file")
        raw = stream.read(length)
    try:
        table = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        table.pop("__metadata__", None)
        entries = {name: msgspec.json.decode(value, type=_Entry) for name, value in table.items()}
    except msgspec.MsgspecError as error:
        raise ValueError(f"{file.name}: the header is damaged: {error}") from None
    for name, entry in entries.items():
        if entry.data_offsets[1] > size - 8 - length:
            raise ValueError(f"{file.name}: cut short inside tensor {name}")
    return entries


def check_shapes(given: Shapes, held: Shapes) -> None:
    """Raise ValueError naming the tensors that are missing, unexpected or of another shape or dtype."""
    wrong = []
    for label, names in (("missing", held.keys() - given.keys()), ("unexpected", given.keys() - held.keys())):
        if names:
            some = sorted(names)
            wrong.append(f"tensors {label}: {', '.join(some[:5])}" + (f" and {len(some) - 5} more" if len(some) > 5 else ""))
    unlike = [name for name in sorted(given.keys() & held.keys()) if given[name] != held[name]]
    for name in unlike[:5]:
        (shape, dtype), (shape_held, dtype_held) = given[name], held[name]
        wrong.append(f"{name} is {dtype} {list(shape)}, the server holds {dtype_held} {list(shape_held)}")
    if len(unlike) > 5:
        wrong.append(f"and {len(unlike) - 5} more")
    if wrong:
        raise ValueError("weight update refused: " + "; ".join(wrong))


def put_on_disk(
    manifest: WeightManifest, tensors: Iterable[tuple[str, Any]], held: Shapes, *, version: int, digest: str, root: str
) -> Path:
    """Verify tensors against their manifest and write them where SGLang can read them; the caller removes the directory.

    Raises ValueError as `Engine.update_weights` does.
    """
    weights = require("miles_rollout.weights.stage", extra="embedded", purpose="a weight update from tensors")
    save_file = require("safetensors.torch", extra="sglang", purpose="a weight update from tensors").save_file
    names = {theirs: ours for ours, theirs in DTYPES.items()}
    known = {name: (shape, names.get(dtype, dtype)) for name, (shape, dtype) in held.items()}
    weights.check_manifest(manifest, known, version=version, contract_digest=digest)
    staged = weights.stage(manifest, tensors)
    place = root or ("/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir())
    directory = Path(tempfile.mkdtemp(prefix="miles-weights-", dir=place))
    try:
        save_file({name: staged[name] for name in staged}, directory / "model.safetensors", metadata={"format": "pt"})
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise
    return directory
