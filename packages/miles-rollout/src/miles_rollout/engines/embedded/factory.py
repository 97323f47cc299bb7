"""From a model directory to a running engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from miles_kernels.contract import Contract
from miles_kernels.nn.checkpoint import iter_tensors, load_config, load_decoder, mtp_tensors
from miles_kernels.nn.decoder import Decoder
from miles_rollout.engines.embedded.config import EmbeddedConfig
from miles_rollout.engines.embedded.engine import EmbeddedEngine
from miles_rollout.text import Tokenizer, load_tokenizer
from miles_spec.models.base import DraftModel
from miles_spec.models.store import draft_tensors, load_draft, policy_drafts

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_engine(
    model_dir: str | Path,
    config: EmbeddedConfig | None = None,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    contract: Contract | None = None,
    tokenizer: Tokenizer | None = None,
    weight_version: int = 0,
) -> EmbeddedEngine:
    """The embedded engine for a local Hugging Face model directory (config.json, safetensors, tokenizer files).

    The contract is that of the device ("cpu", or "cuda" in bfloat16) on this machine unless one is given. Raises ValueError
    naming the directory, file or tensor that is wrong, or an unknown dtype.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    path = Path(model_dir)
    if not path.is_dir():
        raise ValueError(f"{path}: not a directory; the embedded engine loads a local model directory")
    contract = contract or Contract.for_device(device, dtype)
    if config is not None and config.tensor_parallel > 1:
        shell = shell_of(path, contract, dtype)
        tokenizer, weights = tokenizer or load_tokenizer(path), stored_weights(path, shell, _drafts_in(path))
        return EmbeddedEngine(
            shell, tokenizer, config, model=str(path), weight_version=weight_version, device=device, weights=weights
        )
    decoder = load_policy(path, contract, dtype, device)
    draft = _draft_model(path, config, decoder)
    tokenizer = tokenizer or load_tokenizer(path)
    return EmbeddedEngine(decoder, tokenizer, config, model=str(path), weight_version=weight_version, draft=draft)


def load_policy(path: Path, contract: Contract, dtype: str, device: str) -> Decoder:
    """The decoder of a model directory, without the draft layers that it may carry."""
    return load_decoder(path, contract, DTYPES[dtype], device=device, beside=_drafts_in(path))


def load_draft_for(decoder: Decoder, folder: str | Path) -> DraftModel:
    """The draft model of a directory, or the MTP layers that a policy's carries, beside a decoder whose tensors it shares.

    Raises ValueError naming what in the directory is wrong, or that it holds no draft.
    """
    weight = decoder.embed_tokens
    shared = {"embed_tokens": weight.detach(), "lm_head": decoder.head.detach()}
    draft = load_draft(folder, decoder.config, decoder.contract, dtype=weight.dtype, device=weight.device, shared=shared)
    return draft.requires_grad_(False)


def shell_of(path: Path, contract: Contract | None, dtype: str) -> Decoder:
    """The decoder that a model directory describes, on the meta device: shapes and names, no weights."""
    return Decoder(load_config(path), contract, dtype=DTYPES[dtype], device="meta")


def stored_weights(
    path: Path, decoder: Decoder, beside: Callable[[str], bool] = lambda name: False
) -> Iterator[tuple[str, Tensor]]:
    """What `load_decoder` reads, a tensor at a time and in the decoder's dtypes, for a decoder that holds none of it itself.

    Raises ValueError as `load_decoder` does.
    """
    named, drafts = dict(decoder.hf_state()), mtp_tensors(path)
    wrong: list[str] = []
    tied: dict[str, Tensor] = {}
    missing = dict.fromkeys(named)
    for name, tensor in iter_tensors(path):
        if beside(name) or drafts(name) or name.endswith("rotary_emb.inv_freq"):
            continue
        if decoder.lm_head is None and name in ("lm_head.weight", "model.embed_tokens.weight"):
            tied[name] = tensor
        if name not in named:
            wrong += [] if name in tied else [f"unexpected {name}"]
        elif tensor.shape != named[name].shape:
            wrong.append(f"misshaped {name}: {list(tensor.shape)} instead of {list(named[name].shape)}")
        else:
            missing.pop(name, None)
            yield name, tensor.to(named[name].dtype)
    if len(tied) == 2 and not torch.equal(*tied.values()):
        wrong.append("unexpected lm_head.weight: it differs from the embedding although tie_word_embeddings is set")
    if missing or wrong:
        absent = [f"missing {name}" for name in missing]
        raise ValueError(f"{path}: weights do not fit the {decoder.config.family} decoder: " + "; ".join(absent + wrong))


def _drafts_in(path: Path) -> Callable[[str], bool]:
    """Whether a tensor of a policy's directory is of draft layers that it carries."""
    carried = policy_drafts(path, load_config(path))
    return draft_tensors(carried) if carried is not None else lambda name: False


def _draft_model(path: Path, config: EmbeddedConfig | None, decoder: Decoder) -> DraftModel | None:
    """The draft with weights that the settings name. Layers that the policy's directory carries are left out when they do not."""
    if config is None or config.draft not in ("mtp", "eagle3"):
        return None
    if config.draft_path is None and policy_drafts(path, decoder.config) is None:
        raise ValueError(f"{path}: it carries no MTP layers (no num_nextn_predict_layers); name a directory with draft_path")
    draft = load_draft_for(decoder, config.draft_path or path)
    if draft.config.kind != config.draft:
        raise ValueError(f"{config.draft_path or path}: a draft of kind {draft.config.kind!r}, but draft={config.draft!r}")
    return draft
