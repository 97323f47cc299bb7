"""Find and load the model a configuration names: a folder, a packaged one, a registry package, or random weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles_core.config.schema import RunConfig
from miles_core.config.sections import ModelConfig
from miles_core.recipes.catalog import MODEL_PREFIX, SFT_SUFFIX, packaged_model
from miles_kernels.contract import Contract
from miles_kernels.nn.checkpoint import load_config, load_decoder, random_decoder
from miles_kernels.nn.config import DecoderConfig
from miles_kernels.nn.decoder import Decoder
from miles_kernels.nn.parallel import fold_decoder
from miles_rollout.text import Tokenizer, load_tokenizer
from miles_spec.models.store import draft_tensors, policy_drafts


def use_threads(count: int) -> None:
    """CPU threads of one operation from now on; bits do not depend on it."""
    torch.set_num_threads(count)


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A decoder with its tokenizer."""

    decoder: Decoder
    """On the meta device where nobody holds the whole model."""
    tokenizer: Tokenizer
    name: str
    weights: Iterator[tuple[str, Tensor]] | None = None
    """Of a decoder on the meta device: what lies in the model's folder, to be read once."""


def context_of(decoder: DecoderConfig, config: RunConfig) -> int:
    """Most tokens of one sequence that the model and the engine's settings allow."""
    return min(decoder.max_position_embeddings, config.engine.max_context or decoder.max_position_embeddings)


def prompt_room(decoder: DecoderConfig, config: RunConfig, *, held_out: bool = False) -> int:
    """Most tokens a prompt may have so that its completion fits. Raises ValueError when there is no room at all."""
    context = context_of(decoder, config)
    own = held_out and config.eval.max_new_tokens is not None
    longest = config.eval.max_new_tokens if held_out and config.eval.max_new_tokens else config.sampling.max_new_tokens
    if longest >= context:
        key = "eval.max_new_tokens" if own else "sampling.max_new_tokens"
        raise ValueError(f"{key} = {longest} leaves no room for a prompt: the context holds {context} tokens")
    return context - longest


def model_dir(config: ModelConfig, say: Callable[[str], None]) -> Path | None:
    """The folder the model lies in, fetched first if need be; None for random weights. Raises ValueError when it is not there."""
    if config.path is not None:
        folder = packaged_model(config.path) if config.path.startswith(MODEL_PREFIX) else Path(config.path)
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"model.path = {config.path!r}: no model folder (no config.json in {folder.absolute()}); it needs config.json, "
                f"model.safetensors and tokenizer files, as save_pretrained or miles export write them{_made_by(folder)}"
            )
        return folder
    if config.source is not None:
        from miles_core.convert.fetch import fetch_model

        return fetch_model(config.source, say)
    return None


def _made_by(folder: Path) -> str:
    """The command that makes a checkpoint of a run, where the missing folder is one."""
    names = [folder.parts[i - 1] for i, part in enumerate(folder.parts) if part == "checkpoints" and i > 0]
    if not names:
        return ""
    recipe = names[0].removesuffix(SFT_SUFFIX)
    command = "sft" if recipe != names[0] else "train"
    return f". It is a checkpoint of the run {names[0]}, which comes first: miles {command} {recipe}"


def load_shape(config: ModelConfig, say: Callable[[str], None]) -> tuple[DecoderConfig, Tokenizer]:
    """Shape and tokenizer without the weights."""
    folder = model_dir(config, say)
    if folder is not None:
        return load_config(folder), load_tokenizer(folder)
    from miles_rollout.text.char import CharTokenizer

    assert config.alphabet is not None
    tokenizer = CharTokenizer(config.alphabet)
    return random_shape(config, tokenizer), tokenizer


def random_shape(config: ModelConfig, tokenizer: Tokenizer) -> DecoderConfig:
    """The shape `model.architecture` describes, with the tokenizer's vocabulary and special tokens unless it states its own."""
    special: dict[str, Any] = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": list(tokenizer.eos_token_ids)}
    fields = {"vocab_size": tokenizer.vocab_size, **special, **(config.architecture or {})}
    if fields["vocab_size"] < tokenizer.vocab_size:
        raise ValueError(
            f"model.architecture.vocab_size = {fields['vocab_size']} is smaller than the tokenizer's {tokenizer.vocab_size}"
        )
    return DecoderConfig.from_hf(fields, where="model.architecture")


def _leave_drafts(folder: Path, config: RunConfig, say: Callable[[str], None]) -> Callable[[str], bool]:
    """Which tensors of the folder are those of layers that draft tokens, and so none of the policy's; says where they go."""
    carried = policy_drafts(folder, load_config(folder))
    if carried is None:
        return lambda name: False
    count, section = carried.block.num_hidden_layers, config.draft
    taken = section.model == "mtp" and section.path is None
    where = "the draft starts from them" if taken else 'they are left out (draft.model = "mtp" would draft with them)'
    say(f"{folder}: {count} layer(s) for multi-token prediction behind the policy's {carried.trunk_layers}: {where}")
    return draft_tensors(carried)


def load_model(config: RunConfig, say: Callable[[str], None], *, weights: bool = True, divided: bool = False) -> LoadedModel:
    """Decoder and tokenizer, ready to train; without `weights` they are zero, for an engine that gets them before it serves.

    With `divided` the model is for an engine over several GPUs alone and may be more than one of them holds: unless its weights
    are random, it is only described here. Weights are read a tensor at a time, straight to the device. Raises ValueError naming
    file and tensor when something does not fit.
    """
    folder = model_dir(config.model, say)
    device = config.model.device
    contract = Contract.for_device(device, config.model.dtype, config.model.precision)
    dtype = contract.torch_dtype
    stored: Iterator[tuple[str, Tensor]] | None = None
    if divided and (folder is not None or not weights):
        from miles_rollout.engines.embedded.factory import stored_weights

        beside = _leave_drafts(folder, config, say) if folder is not None else lambda name: False
        shape, tokenizer = load_shape(config.model, say)
        decoder, name = Decoder(shape, contract, dtype=dtype, device="meta"), str(folder or "random")
        stored = stored_weights(folder, decoder, beside) if weights and folder is not None else None
    elif not weights:
        shape, tokenizer = load_shape(config.model, say)
        decoder, name = Decoder(shape, contract, dtype=dtype, device=device), str(folder or "random")
        with torch.no_grad():
            for parameter in decoder.parameters():
                parameter.zero_()
    elif folder is not None:
        beside = _leave_drafts(folder, config, say)
        decoder = load_decoder(folder, contract, dtype, device=device, beside=beside)
        tokenizer, name = load_tokenizer(folder), str(folder)
    else:
        shape, tokenizer = load_shape(config.model, say)
        decoder, name = random_decoder(shape, config.run.seed, contract=contract, dtype=dtype, device=device), "random"
    if config.engine.tensor_parallel > 1:
        fold_decoder(decoder)
    if tokenizer.vocab_size > decoder.config.vocab_size:
        raise ValueError(
            f"{name}: the tokenizer has {tokenizer.vocab_size} tokens, the model {decoder.config.vocab_size}; "
            "they do not belong together"
        )
    return LoadedModel(decoder=decoder, tokenizer=tokenizer, name=name, weights=stored)
