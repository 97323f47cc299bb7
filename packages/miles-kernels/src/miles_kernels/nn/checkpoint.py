"""Model directories: config.json and safetensors, one file or shards with an index, in Hugging Face's layout.

What `save_decoder` writes carries a CRC-32 of every tensor in the safetensors header, so a flipped bit is found on loading,
not trained on. Files without checksums (any other writer's) load as well.
"""

from __future__ import annotations

import ctypes
import json
import shutil
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles_kernels.contract import Contract
from miles_kernels.nn.config import DecoderConfig
from miles_kernels.nn.decoder import Decoder, stored_dtype

Verify = Callable[[str, Tensor], None]
"""Called with (HF name, tensor as stored) before it is used; raises ValueError to refuse it."""

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_CHECKSUMS = "crc32"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "char_tokenizer.json",
)


def load_config(model_dir: str | Path) -> DecoderConfig:
    """Read `config.json`, and the end-of-sequence ids `generation_config.json` adds. Raises ValueError naming file and field."""
    path = Path(model_dir)
    config = DecoderConfig.from_hf(read_json(path / "config.json"), where=str(path / "config.json"))
    extra = path / "generation_config.json"
    if not extra.is_file():
        return config
    ids = read_json(extra).get("eos_token_id")
    more = () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)
    data = {name: getattr(config, name) for name in config.__dataclass_fields__}
    try:
        return DecoderConfig(**data | {"eos_token_ids": tuple(dict.fromkeys(config.eos_token_ids + more))})
    except ValueError as error:
        raise ValueError(f"{extra}: {error}") from None


def load_decoder(
    model_dir: str | Path,
    contract: Contract | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    device: str | torch.device = "cpu",
    verify: Verify | None = None,
    beside: Callable[[str], bool] = lambda name: False,
) -> Decoder:
    """Build the decoder a model directory describes. Weights are cast to `dtype`; names that `beside` is true of are another's.

    So are the tensors of the multi-token prediction layers that config.json counts (`mtp_tensors`): they are a draft's weights,
    which miles-spec loads from the same directory.

    Raises ValueError naming the file, and the tensor where there is one: missing or truncated file, checksum or `verify`
    failure, missing, unexpected or misshaped tensors (all of them at once).
    """
    config = load_config(model_dir)
    decoder = Decoder(config, contract, dtype=dtype, device=device)
    try:
        drafts = mtp_tensors(model_dir)
        pairs = iter_tensors(model_dir, verify=verify)
        decoder.load_hf_state(pair for pair in pairs if not (beside(pair[0]) or drafts(pair[0])))
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(str(model_dir)) else f"{model_dir}: {message}") from None
    return decoder


def mtp_tensors(model_dir: str | Path) -> Callable[[str], bool]:
    """Whether a tensor's name is of a layer after the policy's last, of which config.json counts `num_nextn_predict_layers`.

    Such layers predict further tokens (DeepSeek-V3, GLM-4.5): they are a draft's, no part of the policy's forward pass.
    """
    data = read_json(Path(model_dir) / "config.json")
    first, count = data.get("num_hidden_layers"), data.get("num_nextn_predict_layers")
    starts = tuple(f"model.layers.{int(first) + k}." for k in range(int(count))) if first and count else ()
    return lambda name: name.startswith(starts)


def random_decoder(
    config: DecoderConfig,
    seed: int = 0,
    *,
    contract: Contract | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> Decoder:
    """A decoder with weights drawn from `seed`: normal(0, initializer_range) matrices, unit norms, zero biases.

    Drawn in fp32 in the order of `hf_state`, so every dtype rounds the same numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    decoder = Decoder(config, contract, dtype=dtype, device=device)
    with torch.no_grad():
        for name, view in decoder.hf_state():
            if name.endswith("bias"):
                view.zero_()
            elif view.ndim == 1:
                view.fill_(1.0)
            else:
                view.copy_(torch.empty(view.shape).normal_(0.0, config.initializer_range, generator=generator))
    return decoder


def save_decoder(
    decoder: Decoder,
    model_dir: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5_000_000_000,
    tokenizer_from: str | Path | None = None,
) -> list[Path]:
    """Write config.json and weights that transformers (and `load_decoder`) read back; returns the files written.

    One `model.safetensors`, or shards with an index when the weights exceed `max_shard_bytes`. Every file is written under
    another name first and renamed when whole. `tokenizer_from` is a model directory whose tokenizer files are copied along.
    """
    path = Path(model_dir)
    path.mkdir(parents=True, exist_ok=True)
    dtype = dtype or next(decoder.parameters()).dtype
    shards = _plan_shards(decoder, dtype, max_shard_bytes)
    count = len(shards)
    names = [SINGLE] if count == 1 else [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    state = dict(decoder.hf_state())
    written = []
    for name, keys in zip(names, shards, strict=True):
        tensors = {key: state[key].detach().to("cpu", stored_dtype(key, dtype), copy=True).contiguous() for key in keys}
        checksums = {key: _crc32(tensor) for key, tensor in tensors.items()}
        _write_safetensors(path / name, tensors, {"format": "pt", _CHECKSUMS: json.dumps(checksums)})
        written.append(path / name)
    if len(shards) > 1:
        total = sum(state[key].numel() * stored_dtype(key, dtype).itemsize for keys in shards for key in keys)
        weight_map = {key: name for name, keys in zip(names, shards, strict=True) for key in keys}
        written.append(_write_json(path / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}))
    written.append(_write_json(path / "config.json", decoder.config.to_hf(dtype=str(dtype).removeprefix("torch."))))
    _remove_stale(path, written)
    return written + (copy_tokenizer(tokenizer_from, path) if tokenizer_from is not None else [])


def write_model(path: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> list[Path]:
    """Write tensors by name to one model.safetensors with checksums, and `config` to config.json; returns the files."""
    path.mkdir(parents=True, exist_ok=True)
    kept = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    checksums = {name: _crc32(tensor) for name, tensor in kept.items()}
    _write_safetensors(path / SINGLE, kept, {"format": "pt", _CHECKSUMS: json.dumps(checksums)})
    written = [path / SINGLE, _write_json(path / "config.json", config)]
    _remove_stale(path, written)
    return written


def copy_tokenizer(source: str | Path, target: str | Path) -> list[Path]:
    """Copy the tokenizer files of one model directory to another; raises ValueError when there are none."""
    source, target = Path(source), Path(target)
    found = [name for name in _TOKENIZER_FILES if (source / name).is_file()]
    if not found:
        raise ValueError(f"{source}: no tokenizer files (looked for {', '.join(_TOKENIZER_FILES)})")
    if source.resolve() != target.resolve():
        for name in found:
            shutil.copyfile(source / name, target / name)
    return [target / name for name in found]


def iter_tensors(model_dir: str | Path, *, verify: Verify | None = None) -> Iterator[tuple[str, Tensor]]:
    """Every stored (HF name, tensor) of a model directory, one at a time, checked against checksums where the file has them.

    Raises ValueError naming the file, and the tensor where there is one.
    """
    path = Path(model_dir)
    if (path / INDEX).is_file():
        weight_map = read_json(path / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{path / INDEX}: no weight_map")
        shards: dict[str, list[str]] = {}
        for name, file in weight_map.items():
            shards.setdefault(file, []).append(name)
        absent = sorted(file for file in shards if not (path / file).is_file())
        if absent:
            raise ValueError(f"{path}: {INDEX} names shards that are not there: {', '.join(absent)}")
        for file, names in sorted(shards.items()):
            yield from _read_safetensors(path / file, names, verify)
    elif (path / SINGLE).is_file():
        yield from _read_safetensors(path / SINGLE, None, verify)
    else:
        raise ValueError(f"{path}: neither {SINGLE} nor {INDEX} is there; export the model as safetensors first")


def _read_safetensors(file: Path, names: list[str] | None, verify: Verify | None) -> Iterator[tuple[str, Tensor]]:
    safetensors = _safetensors()
    try:
        handle = safetensors.safe_open(file, framework="pt", device="cpu")
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error}); copy or export it again") from None
    with handle:
        stored = list(handle.keys())
        absent = sorted(set(names or ()) - set(stored))
        if absent:
            raise ValueError(f"{file}: tensors the index places here are missing: {', '.join(absent)}")
        checksums = json.loads((handle.metadata() or {}).get(_CHECKSUMS, "{}"))
        for name in names if names is not None else stored:
            try:
                tensor = handle.get_tensor(name)
            except (safetensors.SafetensorError, OSError) as error:
                raise ValueError(f"{file}: tensor {name}: {error}") from None
            if name in checksums and checksums[name] != _crc32(tensor):
                raise ValueError(
                    f"{file}: tensor {name}: hash mismatch, the file was damaged after it was written; export or copy it again"
                )
            if verify is not None:
                try:
                    verify(name, tensor)
                except ValueError as error:
                    raise ValueError(f"{file}: tensor {name}: {error}") from None
            yield name, tensor


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError('reading and writing model directories needs safetensors: pip install "miles-kernels[hf]"') from error
    return safetensors


def _plan_shards(decoder: Decoder, dtype: torch.dtype, max_shard_bytes: int) -> list[list[str]]:
    """Tensor names per shard: consecutive tensors, each shard within the limit unless a single tensor exceeds it."""
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes={max_shard_bytes} must be at least 1")
    shards: list[list[str]] = [[]]
    used = 0
    for name, view in decoder.hf_state():
        size = view.numel() * stored_dtype(name, dtype).itemsize
        if shards[-1] and used + size > max_shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return shards


def _write_safetensors(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    partial = file.with_name(file.name + ".partial")
    try:
        _safetensors().torch.save_file(tensors, partial, metadata=metadata)
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def _write_json(file: Path, data: dict[str, Any]) -> Path:
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    partial.replace(file)
    return file


def _remove_stale(path: Path, written: list[Path]) -> None:
    """Weights of an earlier export with another shard count would be loaded instead of the new ones."""
    for old in [*path.glob("model-*-of-*.safetensors"), path / SINGLE, path / INDEX]:
        if old not in written:
            old.unlink(missing_ok=True)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of a model directory. Raises ValueError naming the file when it is missing or something else."""
    if not file.is_file():
        raise ValueError(f"{file}: no such file; a model directory holds config.json and safetensors weights")
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not JSON ({error})") from None
    if not isinstance(data, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(data).__name__}")
    return data


def _crc32(tensor: Tensor) -> str:
    """CRC-32 of a CPU tensor's bytes in hex, without copying them."""
    tensor = tensor.contiguous()
    size = tensor.numel() * tensor.element_size()
    buffer = (ctypes.c_char * size).from_address(tensor.data_ptr()) if size else b""
    return f"{zlib.crc32(buffer):08x}"
