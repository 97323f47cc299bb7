"""GGUF to a Hugging Face folder: dequantised fp32 safetensors, config.json, tokenizer and chat template.

Only this module reads the format, through the `gguf` library. Llama files hold query and key rows in the order of
interleaved rotary pairs; Hugging Face's halves order is restored here.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles_core.convert.gguf_tokenizer import write_tokenizer

if TYPE_CHECKING:
    import numpy as np

RECORD = "conversion.json"
"""Written last: what was converted from what, with SHA-256 of every file. A folder without it is not whole."""

_GLOBAL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_BLOCK = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_BLOCK_NAME = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_IGNORED = frozenset({"rope_freqs.weight"})


@dataclass(frozen=True)
class Family:
    """How one GGUF architecture is called and laid out in Hugging Face's world."""

    model_type: str
    architecture: str
    permuted: bool
    """Query and key rows are stored in interleaved rotary order."""


FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", permuted=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", permuted=False),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", permuted=False),
}


def convert_gguf(source: Path, out: Path, say: Callable[[str], None] = lambda line: None) -> Path:
    """Write the Hugging Face folder `out` for a GGUF file, all or nothing, and return it.

    Raises ValueError naming the file and what in it is not supported, FileExistsError when `out` holds something already.
    """
    gguf = _library()
    if not source.is_file():
        raise ValueError(f"{source}: no such file")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty; choose another folder")
    try:
        reader = gguf.GGUFReader(source)
    except ValueError as error:
        raise ValueError(f"{source}: not a GGUF file: {error}") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        config, kinds = hf_config(fields, {tensor.name for tensor in reader.tensors}, source), _kinds(reader)
        say(f"{source.name}: {config['model_type']}, {len(reader.tensors)} tensors ({kinds})")
        _write_json(partial / "config.json", config)
        write_tokenizer(fields, partial, source)
        _write_weights(dict(hf_tensors(reader, config, source)), partial / "model.safetensors")
        _write_json(partial / RECORD, _record(source, partial, kinds))
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return out


def hf_config(fields: dict[str, Any], tensor_names: set[str], source: Path) -> dict[str, Any]:
    """The config.json of a GGUF header. Raises ValueError naming a missing field or an unknown architecture."""
    name = fields.get("general.architecture")
    if name not in FAMILIES:
        raise ValueError(f"{source}: architecture {name!r} is not supported; known are {', '.join(FAMILIES)}")
    family = FAMILIES[name]

    def need(key: str) -> Any:
        if f"{name}.{key}" not in fields:
            raise ValueError(f"{source}: the header has no {name}.{key}")
        return fields[f"{name}.{key}"]

    scaling = [key for key in fields if key.startswith(f"{name}.rope.scaling.") and fields[key] not in ("none", 1.0)]
    if scaling or "rope_freqs.weight" in tensor_names:
        raise ValueError(f"{source}: scaled rotary positions ({', '.join(scaling) or 'rope_freqs'}) are not supported")
    heads, hidden = need("attention.head_count"), need("embedding_length")
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "vocab_size": len(fields.get("tokenizer.ggml.tokens", ())) or need("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get(f"{name}.attention.head_count_kv", heads),
        "head_dim": fields.get(f"{name}.attention.key_length", hidden // heads),
        "hidden_act": "silu",
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": _decimal(need("attention.layer_norm_rms_epsilon")),
        "rope_theta": _decimal(fields.get(f"{name}.rope.freq_base", 10000.0)),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in tensor_names,
        "torch_dtype": "float32",
    }
    for ours, theirs in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding")):
        config[ours] = fields.get(f"tokenizer.ggml.{theirs}_token_id")
    return config


def hf_tensors(reader: Any, config: dict[str, Any], source: Path) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """(Hugging Face name, fp32 array) of every tensor, dequantised, rotary order restored."""
    import numpy as np

    gguf = _library()
    permuted = next(f.permuted for f in FAMILIES.values() if f.model_type == config["model_type"])
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    for tensor in reader.tensors:
        if tensor.name in _IGNORED:
            continue
        block = _BLOCK_NAME.fullmatch(tensor.name)
        if tensor.name not in _GLOBAL and (block is None or block[2] not in _BLOCK):
            raise ValueError(f"{source}: tensor {tensor.name!r} has no counterpart in a {config['model_type']} model")
        try:
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
        except NotImplementedError as error:
            raise ValueError(
                f"{source}: tensor {tensor.name!r} is stored as {tensor.tensor_type.name}, which cannot be dequantised"
            ) from error
        values = values.reshape([int(size) for size in reversed(tensor.shape)])
        if block is None:
            yield _GLOBAL[tensor.name], values
            continue
        if permuted and block[2] in heads:
            values = unpermute(values, heads[block[2]])
        yield f"model.layers.{block[1]}.{_BLOCK[block[2]]}.{block[3]}", values


def unpermute(rows: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Rows [heads * head_dim, ...] from interleaved rotary pairs (0,1),(2,3).. to Hugging Face's two halves."""
    pairs = rows.reshape(num_heads, rows.shape[0] // num_heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _write_weights(tensors: dict[str, np.ndarray[Any, Any]], path: Path) -> None:
    import numpy as np

    save_file = importlib.import_module("safetensors.numpy").save_file
    save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, path, metadata={"format": "pt"})


def _record(source: Path, folder: Path, kinds: str) -> dict[str, Any]:
    files = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    return {"source": source.name, "source_sha256": sha256(source), "stored_as": kinds, "dtype": "float32", "files_sha256": files}


def _kinds(reader: Any) -> str:
    counts: dict[str, int] = {}
    for tensor in reader.tensors:
        counts[tensor.tensor_type.name] = counts.get(tensor.tensor_type.name, 0) + 1
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _decimal(value: float) -> float:
    """The shortest decimal a 32-bit float stands for: 9.999999747378752e-06 was written as 1e-05."""
    import numpy as np

    return float(str(np.float32(value)))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _library() -> Any:
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise ImportError('reading GGUF files needs the gguf library: pip install "miles-core[gguf]"') from error
