"""From a model directory to a running engine."""

from __future__ import annotations

from pathlib import Path

import torch

from miles_kernels.contract import Contract
from miles_kernels.nn.checkpoint import load_decoder
from miles_rollout.engines.embedded.config import EmbeddedConfig
from miles_rollout.engines.embedded.engine import EmbeddedEngine
from miles_rollout.text import Tokenizer, load_tokenizer

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
    decoder = load_decoder(path, contract or Contract.for_device(device, dtype), DTYPES[dtype], device=device)
    return EmbeddedEngine(decoder, tokenizer or load_tokenizer(path), config, model=str(path), weight_version=weight_version)
