"""Where an engine is, and how many pages of keys and values it has room for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from miles_kernels.nn.checkpoint import load_config
from miles_kernels.nn.decoder import Decoder
from miles_kernels.nn.parallel import local_config
from miles_rollout.engines.embedded.config import EmbeddedConfig
from miles_rollout.engines.embedded.kv import PagedKV
from miles_rollout.engines.embedded.staging import BUCKET_BYTES
from miles_spec.draft import Draft
from miles_spec.models.base import DraftModel


def device_of(decoder: Decoder, config: EmbeddedConfig, device: Any, weights: Any) -> torch.device:
    """Where the engine's first rank is. Raises ValueError for a decoder without weights that nothing divides, or the reverse."""
    is_shell = decoder.embed_tokens.is_meta
    if is_shell != (device is not None) or (is_shell and config.tensor_parallel == 1) or (weights is not None and not is_shell):
        raise ValueError("device and weights belong to a decoder on the meta device, and that to tensor_parallel above 1")
    where = decoder.embed_tokens.device if device is None else torch.device(device)
    return torch.device("cuda", torch.cuda.current_device()) if where.type == "cuda" and where.index is None else where


def part_bytes(model: str | Path, dtype: str, ranks: int) -> tuple[int, int]:
    """(bytes of the weights that one of `ranks` holds of a model directory, bytes of a bucket of an update)."""
    shape = load_config(model)
    part = Decoder(local_config(shape, ranks), None, dtype=getattr(torch, dtype), device="meta")
    table = shape.vocab_size * shape.hidden_size * getattr(torch, dtype).itemsize
    return sum(weight.nbytes for weight in part.parameters()), max(BUCKET_BYTES, table)


def _draft_bytes(decoder: Decoder, draft: Draft | DraftModel | None, page_size: int) -> int:
    """What a draft model keeps beside a page: its own keys and values, and what it reads of the policy."""
    if not isinstance(draft, DraftModel):
        return 0
    block, dtype = draft.config.block, decoder.embed_tokens.dtype
    own = PagedKV.page_bytes(
        layers=block.num_hidden_layers,
        kv_heads=block.num_key_value_heads,
        head_dim=block.head_dim,
        page_size=page_size,
        dtype=dtype,
    )
    return own + page_size * draft.config.num_features * dtype.itemsize


def num_pages_of(decoder: Decoder, config: EmbeddedConfig, page_size: int, draft: Draft | DraftModel | None) -> int:
    """Pages the configuration asks for, and no more than could ever be used."""
    shape = decoder.config
    page_bytes = _draft_bytes(decoder, draft, page_size) + PagedKV.page_bytes(
        layers=shape.num_hidden_layers,
        kv_heads=max(1, shape.num_key_value_heads // config.tensor_parallel),
        head_dim=shape.head_dim,
        page_size=page_size,
        dtype=next(decoder.parameters()).dtype,
    )
    num_pages = config.kv_memory_bytes // page_bytes if config.num_pages is None else config.num_pages
    if num_pages < 1:
        raise ValueError(
            f"kv_memory_bytes={config.kv_memory_bytes} holds no page; one page of {page_size} tokens takes {page_bytes} bytes"
        )
    return num_pages
