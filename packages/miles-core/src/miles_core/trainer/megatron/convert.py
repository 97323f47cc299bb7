"""Model directories and Megatron checkpoints, one into the other, every tensor accounted for by name, shape and hash.

A converted checkpoint is what megatron-core's `dist_checkpointing` reads into any layout. Beside it lie `hf/config.json` with the
tokenizer's files, which Megatron has no place for, and `ledger.json`: the hash of every Hugging Face tensor that went in and of
every Megatron tensor that came out. The way back checks both before it is done.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles_core.convert.megatron import padded_vocab
from miles_core.trainer.hashing import dtype_name, tensor_hash
from miles_core.trainer.megatron.checkpoint import load_model, save_model
from miles_core.trainer.megatron.config import Cut
from miles_core.trainer.megatron.layout import make_groups
from miles_core.trainer.megatron.model import MegatronModel
from miles_kernels.contract import Contract
from miles_kernels.nn.checkpoint import copy_tokenizer, iter_tensors, load_config, mtp_tensors, save_decoder
from miles_kernels.nn.config import DecoderConfig
from miles_kernels.nn.decoder import Decoder, stored_dtype

LEDGER = "ledger.json"
WEIGHTS = "megatron"
_CPU = torch.device("cpu")


def hf_to_megatron(model_dir: Path, out: Path, *, dtype: torch.dtype = torch.float32, vocab_multiple: int = 1) -> dict[str, Any]:
    """Convert a model directory on the CPU; returns the ledger. `vocab_multiple` is Megatron's make-vocab-size-divisible-by.

    Layers for multi-token prediction have no place in the converted model: the ledger names their tensors under "left_out".
    Raises ValueError when `out` holds something, a tensor is missing, unexpected or misshaped, or is not of `dtype` (a conversion
    changes no value).
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: not empty; name a new directory")
    config = load_config(model_dir)
    ledger: dict[str, Any] = {"dtype": dtype_name(dtype), "vocab_rows": padded_vocab(config, vocab_multiple)}
    model = _model(config, dtype, vocab_multiple)
    ledger["hf"] = {}
    drafts, ledger["left_out"] = mtp_tensors(model_dir), []
    model.load_hf(_noted(_without(drafts, iter_tensors(model_dir), ledger["left_out"]), ledger["hf"], dtype))
    ledger["megatron"] = {part.name: _entry(tensor) for part, tensor in model.whole()}
    out.mkdir(parents=True, exist_ok=True)
    save_model(model, out / WEIGHTS)
    (out / "hf").mkdir()
    (out / "hf" / "config.json").write_text(json.dumps(config.to_hf(dtype=ledger["dtype"]), indent=2) + "\n")
    if (model_dir / "tokenizer.json").is_file() or (model_dir / "char_tokenizer.json").is_file():
        copy_tokenizer(model_dir, out / "hf")
    (out / LEDGER).write_text(json.dumps(ledger, indent=1) + "\n")
    return ledger


def megatron_to_hf(checkpoint: Path, out: Path) -> dict[str, Any]:
    """Convert what `hf_to_megatron` wrote back to a model directory; returns the ledger, which then has been checked.

    Raises ValueError naming every tensor whose shape, dtype or hash is not that of the ledger: the checkpoint was damaged or
    trained on. (Weights of a training run are exported by `miles export`, which needs no ledger.)
    """
    try:
        ledger: dict[str, Any] = json.loads((checkpoint / LEDGER).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{checkpoint / LEDGER}: cannot be read ({error}); convert the model again") from None
    config = load_config(checkpoint / "hf")
    dtype = getattr(torch, ledger["dtype"])
    model = _model(config, dtype, ledger["vocab_rows"])
    load_model(model, checkpoint / WEIGHTS)
    _compare("megatron", {part.name: _entry(tensor) for part, tensor in model.whole()}, ledger["megatron"], checkpoint)
    decoder = Decoder(config, Contract.reference(ledger["dtype"]), dtype=dtype)
    found: dict[str, Any] = {}
    decoder.load_hf_state(_noted(model.export_hf(), found, dtype))
    stored = {
        name: entry for name, entry in ledger["hf"].items() if not (name == "lm_head.weight" and config.tie_word_embeddings)
    }
    _compare("hf", found, stored, checkpoint)
    save_decoder(decoder, out)
    if len(list((checkpoint / "hf").iterdir())) > 1:
        copy_tokenizer(checkpoint / "hf", out)
    return ledger


def _model(config: DecoderConfig, dtype: torch.dtype, vocab_multiple: int) -> MegatronModel:
    cut = Cut(layers="plain", vocab_multiple=vocab_multiple)
    make_groups(cut, _CPU)
    return MegatronModel(config, cut, Contract.reference(dtype_name(dtype)), _CPU)


def _entry(tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": dtype_name(tensor.dtype), "xxh3": tensor_hash(tensor)}


def _without(
    another: Callable[[str], bool], tensors: Iterable[tuple[str, Tensor]], names: list[str]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that are not `another`'s; the names of those that are go to `names`."""
    for name, tensor in tensors:
        if another(name):
            names.append(name)
        else:
            yield name, tensor


def _noted(tensors: Iterable[tuple[str, Tensor]], entries: dict[str, Any], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Write down each tensor as it passes."""
    for name, tensor in tensors:
        wanted = stored_dtype(name, dtype)
        if tensor.dtype is not wanted and not name.endswith("rotary_emb.inv_freq"):
            raise ValueError(
                f"{name} is {dtype_name(tensor.dtype)}, not {dtype_name(wanted)}: a conversion changes no value; say so"
            )
        entries[name] = _entry(tensor)
        yield name, tensor


def _compare(side: str, found: dict[str, Any], stated: dict[str, Any], checkpoint: Path) -> None:
    wrong = [
        f"{name} is {found.get(name)}, the ledger says {entry}" for name, entry in stated.items() if found.get(name) != entry
    ]
    wrong += [f"{name} is not in the ledger" for name in found if name not in stated and not name.endswith("inv_freq")]
    if wrong:
        raise ValueError(f"{checkpoint}: {side} tensors do not match {LEDGER}: {'; '.join(wrong[:4])}")
