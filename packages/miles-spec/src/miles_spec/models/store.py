"""Draft directories: config.json and model.safetensors under the family's names, checked by checksum as a policy's are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from miles_kernels.contract import Contract
from miles_kernels.nn.checkpoint import iter_tensors, read_json, write_model
from miles_kernels.nn.config import DecoderConfig
from miles_kernels.nn.decoder import stored_dtype
from miles_spec.models.base import DraftModel
from miles_spec.models.config import DraftConfig, Eagle3Config, MtpConfig, from_json, to_json
from miles_spec.models.eagle3 import Eagle3Draft
from miles_spec.models.mtp import MtpDraft
from miles_spec.models.names import mtp_names


def make_draft(
    config: DraftConfig,
    contract: Contract | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> DraftModel:
    """A draft of that configuration, its weights uninitialised."""
    if isinstance(config, Eagle3Config):
        return Eagle3Draft(config, contract, dtype=dtype, device=device)
    return MtpDraft(config, contract, dtype=dtype, device=device)


def save_draft(draft: DraftModel, directory: str | Path, *, dtype: torch.dtype | None = None) -> list[Path]:
    """Write config.json and model.safetensors, floating-point tensors as `dtype` (default: as they are); returns the files."""

    def stored() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in draft.named_state():
            yield name, tensor.to(stored_dtype(name, dtype)) if dtype is not None and tensor.is_floating_point() else tensor

    return write_model(Path(directory), dict(stored()), to_json(draft.config))


def read_draft_config(directory: str | Path, policy: DecoderConfig | None = None) -> DraftConfig:
    """The configuration in a draft's directory, or in that of a policy that carries MTP layers; checked against `policy`.

    Raises ValueError naming file and field; without `policy` only the draft's own files are looked at.
    """
    file = Path(directory) / "config.json"
    data = read_json(file)
    if policy is None:
        policy = _policy_of(data, str(file))
    return from_json(data, policy, where=str(file))


def load_draft(
    directory: str | Path,
    policy: DecoderConfig | None = None,
    contract: Contract | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    shared: Mapping[str, Tensor] | None = None,
) -> DraftModel:
    """The draft in `directory`, cast to `dtype`. Of a policy's directory the MTP layers are taken, the rest is the policy's.

    `shared` are the policy's "embed_tokens" and "lm_head": a copy that the draft stores must equal them.
    Raises ValueError naming the file, and every missing, unexpected, misshaped or damaged tensor.
    """
    config = read_draft_config(directory, policy)
    draft = make_draft(config, contract, dtype=dtype, device=device)
    tensors = iter_tensors(directory)
    if _is_policy(Path(directory)) and isinstance(draft, MtpDraft):
        own = draft_tensors(config)
        tensors = ((name, tensor) for name, tensor in tensors if own(name))
    try:
        draft.load_named(tensors, shared=dict(shared or {}))
    except ValueError as error:
        message = str(error)
        raise ValueError(message if message.startswith(str(directory)) else f"{directory}: {message}") from None
    return draft


def draft_tensors(config: DraftConfig) -> Callable[[str], bool]:
    """Whether a tensor of a policy's directory belongs to its MTP layers, known or not."""
    assert isinstance(config, MtpConfig)
    names = set(mtp_names(MtpDraft(config, device="meta")))
    starts = {"mimo": ("model.mtp_layers.",), "qwen3_next": ("mtp.",)}.get(
        config.layout, tuple(f"model.layers.{config.trunk_layers + k}." for k in range(config.block.num_hidden_layers))
    )
    return lambda name: name in names or name.startswith(starts)


def policy_drafts(directory: str | Path, policy: DecoderConfig) -> MtpConfig | None:
    """The MTP layers that a policy's directory carries; None when its config.json names none."""
    data = read_json(Path(directory) / "config.json")
    if "miles_draft" in data or not any(data.get(name) for name in _COUNTS):
        return None
    config = from_json(data, policy, where=str(Path(directory) / "config.json"))
    assert isinstance(config, MtpConfig)
    return config


_COUNTS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "mtp_num_layers")


def _is_policy(directory: Path) -> bool:
    data = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return "miles_draft" not in data and "draft_vocab_size" not in data


def _policy_of(data: Mapping[str, Any], where: str) -> DecoderConfig:
    """A policy that the draft would fit, for looking at a draft alone."""
    own = data.get("miles_draft") or {}
    layers = int(own.get("trunk_layers") or max(own.get("feature_layers") or (0,)) or data.get("num_hidden_layers") or 1)
    plain = {key: value for key, value in data.items() if key not in ("architectures", "layer_types")}
    return DecoderConfig.from_hf({**plain, "num_hidden_layers": max(layers, 1)}, where=where)
