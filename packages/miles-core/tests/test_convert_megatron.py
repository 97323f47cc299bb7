"""Hugging Face and Megatron layouts: round trips to the bit, shards, padding, and what must be refused. No megatron-core."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from miles_core.convert.megatron import join_all, padded_vocab, parts, split_all
from miles_core.trainer.hashing import combined_hash
from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.config import DecoderConfig

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES = {
    "llama": DecoderConfig(family="llama", **SIZES),
    "llama-biases": DecoderConfig(family="llama", attention_bias=True, mlp_bias=True, **SIZES),
    "qwen2": DecoderConfig(family="qwen2", attention_bias=True, **SIZES),
    "qwen3": DecoderConfig(family="qwen3", **SIZES),
    "qwen3_moe": DecoderConfig(family="qwen3_moe", mlp_only_layers=(0,), **MOE, **SIZES),
}


def weights(config: DecoderConfig) -> dict[str, Tensor]:
    """Every tensor distinct everywhere, biases and norms too."""
    decoder = random_decoder(config, 3)
    return {name: tensor + torch.rand(tensor.shape) for name, tensor in decoder.hf_state()}


@pytest.mark.parametrize("vocab_rows", [50, 64])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_bitwise(family: str, tied: bool, vocab_rows: int) -> None:
    config = replace(FAMILIES[family], tie_word_embeddings=tied)
    there = weights(config)
    megatron = {part.name: tensor for part, tensor in join_all(config, vocab_rows, there.items())}
    assert {part.name: part.shape for part in parts(config, vocab_rows)} == {n: tuple(t.shape) for n, t in megatron.items()}
    back = dict(split_all(config, vocab_rows, megatron))
    assert combined_hash(back.items()) == combined_hash(there.items())
    embedding = megatron["embedding.word_embeddings.weight"]
    assert not embedding[50:].any() and len(embedding) == vocab_rows


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_are_models_of_their_own(family: str) -> None:
    """A tensor-parallel share of qkv is the qkv of its own heads; of gate and up, its own rows of both. Joining undoes it."""
    config = FAMILIES[family]
    there = weights(config)
    for part, whole in join_all(config, 50, there.items()):
        for dim in range(min(whole.ndim, 2)):
            if whole.shape[dim] % 2 == 0:
                shards = [part.shard(whole, dim, rank, 2) for rank in range(2)]
                assert torch.equal(part.unshard(shards, dim), whole)
        if part.kind == "qkv" and whole.ndim == 2:
            q, k, v = (there[name] for name, _ in part.hf)
            want = torch.cat([q[16:], k[8:], v[8:]])  # the second of two key/value heads with its two query heads
            assert torch.equal(part.shard(whole, 0, 1, 2), want)
        if part.kind == "glu" and whole.ndim == 2:
            gate, up = (there[name] for name, _ in part.hf)
            assert torch.equal(part.shard(whole, 0, 1, 2), torch.cat([gate.chunk(2)[1], up.chunk(2)[1]]))


def test_a_wrong_interleaving_is_noticed() -> None:
    """The control: q, k, v one after the other instead of by group is another tensor, and another hash comes back."""
    config = FAMILIES["qwen3"]
    there = weights(config)
    megatron = {part.name: tensor for part, tensor in join_all(config, 50, there.items())}
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    megatron[name] = torch.cat([there[f"model.layers.0.self_attn.{proj}_proj.weight"] for proj in "qkv"])
    assert combined_hash(split_all(config, 50, megatron)) != combined_hash(there.items())


def test_what_does_not_fit_is_named() -> None:
    config = FAMILIES["qwen3"]
    there = weights(config)
    wrong = {name: tensor for name, tensor in there.items() if "layers.1.mlp.up_proj" not in name}
    wrong["model.layers.0.mlp.down_proj.weight"] = torch.zeros(3, 3)
    wrong["model.surprise.weight"] = torch.zeros(1)
    with pytest.raises(ValueError) as caught:
        list(join_all(config, 50, wrong.items()))
    for words in ("missing model.layers.1.mlp.up_proj", "misshaped model.layers.0.mlp.down_proj", "unexpected model.surprise"):
        assert words in str(caught.value)
    megatron = {part.name: tensor for part, tensor in join_all(config, 50, there.items())}
    megatron["extra"] = megatron.pop("decoder.final_layernorm.weight")
    with pytest.raises(ValueError, match="missing decoder.final_layernorm.weight; unexpected extra"):
        list(split_all(config, 50, megatron))


def test_a_tied_head_stored_twice() -> None:
    config = replace(FAMILIES["qwen3"], tie_word_embeddings=True)
    there = weights(config)
    there["lm_head.weight"] = there["model.embed_tokens.weight"].clone()
    assert len(list(join_all(config, 50, there.items()))) > 0
    there["lm_head.weight"] += 1
    with pytest.raises(ValueError, match="differs from the embedding"):
        list(join_all(config, 50, there.items()))


def test_biases_megatron_cannot_hold() -> None:
    with pytest.raises(ValueError, match='trainer.backend = "fsdp"'):
        list(parts(DecoderConfig(family="qwen3", attention_bias=True, **SIZES), 50))


def test_padded_vocab() -> None:
    assert [padded_vocab(FAMILIES["llama"], multiple) for multiple in (1, 16, 50, 64)] == [50, 64, 50, 64]
