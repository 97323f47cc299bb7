"""What a command line builds before it serves: an engine, its tokenizer, and how new weights are read from disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles_rollout.extras import require

if TYPE_CHECKING:
    from miles_rollout.engine import Engine
    from miles_rollout.engines.embedded.config import EmbeddedConfig
    from miles_rollout.engines.sglang.config import SglangConfig
    from miles_rollout.server.service import WeightLoader
    from miles_rollout.text import Tokenizer


def load_embedded(
    model: str, config: EmbeddedConfig, *, dtype: str, threads: int | None
) -> tuple[Engine, Tokenizer, WeightLoader]:
    """Engine, tokenizer and weight loader of a local model directory.

    Raises ValueError naming what is wrong with model or settings, MissingExtraError naming the extra to install.
    """
    config.validate()
    if threads is not None and threads < 1:
        raise ValueError(f"--threads {threads} must be at least 1")
    if not Path(model).is_dir():
        raise ValueError(f"{model}: not a directory; give a local one with config.json, safetensors and tokenizer files")
    purpose = "the embedded engine"
    torch = require("torch", extra="embedded", purpose=purpose)
    require("xxhash", extra="embedded", purpose=purpose)
    env = require("miles_kernels.env", extra="embedded", purpose=purpose)
    env.prepare_process()
    if threads is not None:
        torch.set_num_threads(threads)
    factory = require("miles_rollout.engines.embedded.factory", extra="embedded", purpose=purpose)
    engine = factory.load_engine(model, config, dtype=dtype)
    return engine, engine.tokenizer, disk_loader(dtype)


def disk_loader(dtype: str) -> WeightLoader:
    """Reads weight updates for an engine that computes in `dtype`."""

    def load(directory: str, version: int, contract_digest: str) -> Any:
        checkpoint = require("miles_kernels.nn.checkpoint", extra="embedded", purpose="a weight update from disk")
        factory = require("miles_rollout.engines.embedded.factory", extra="embedded", purpose="a weight update from disk")
        weights = require("miles_rollout.engines.embedded.weights", extra="embedded", purpose="a weight update from disk")
        decoder = checkpoint.load_decoder(directory, None, factory.DTYPES[dtype])
        manifest = weights.make_manifest(decoder.hf_state(), version=version, contract_digest=contract_digest)
        return manifest, decoder.hf_state()

    return load


async def load_sglang(model: str, config: SglangConfig) -> tuple[Engine, Tokenizer]:
    """An SGLang server, started or attached to, and the tokenizer of its model directory.

    Raises ValueError for settings, model or server, MissingExtraError naming what to install.
    """
    if not Path(model).is_dir():
        raise ValueError(f"{model}: not a directory; give the model's local one, with config.json and tokenizer files")
    from miles_rollout.engines.sglang.engine import SglangEngine
    from miles_rollout.text import load_tokenizer

    tokenizer = load_tokenizer(model)
    return await SglangEngine.start(config), tokenizer
