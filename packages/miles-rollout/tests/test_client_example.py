"""The client in a loop that is none of ours: the example, run."""

import asyncio
import importlib.util
from pathlib import Path

import pytest

from miles_kernels.nn.checkpoint import random_decoder, save_decoder
from miles_kernels.nn.config import DecoderConfig
from miles_rollout.engines.embedded.config import EmbeddedConfig
from miles_rollout.launch import load_embedded
from miles_rollout.server import ServerConfig
from miles_rollout.testing import serving
from miles_rollout.text import CharTokenizer

EXAMPLE = Path(__file__).parent.parent / "examples" / "reinforce.py"


def test_somebody_elses_trainer_learns(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("reinforce", EXAMPLE)
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    tokenizer = CharTokenizer("0123456789")
    shape = DecoderConfig(
        family="qwen3", vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, max_position_embeddings=64, initializer_range=0.1,
    )  # fmt: skip
    model = tmp_path / "model"
    save_decoder(random_decoder(shape, 1), model)
    tokenizer.save(model)

    async def main() -> list[float]:
        config = EmbeddedConfig(kv_memory_bytes=4 << 20)
        engine, _, load = load_embedded(str(model), config, dtype="float32", threads=1)
        server = ServerConfig(admin_token="secret", weight_roots=(str(tmp_path),))
        async with serving(engine, tokenizer, server, load_weights=load) as url:
            options = {"steps": 4, "group": 32, "wanted": 9, "lr": 2e-2, "token": "secret"}
            return await example.train(str(model), url, tmp_path, **options)

    rewards = asyncio.run(asyncio.wait_for(main(), 120))
    assert len(rewards) == 4 and rewards[-1] > rewards[0] + 0.1, rewards
