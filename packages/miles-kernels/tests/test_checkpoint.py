"""Model directories: round trips, shards, and every way a file can be wrong."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from miles_kernels.nn.checkpoint import (
    INDEX,
    SINGLE,
    copy_tokenizer,
    iter_tensors,
    load_config,
    load_decoder,
    random_decoder,
    save_decoder,
)
from miles_kernels.nn.config import DecoderConfig

CONFIG = DecoderConfig(
    family="qwen3_moe",
    vocab_size=40,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    num_experts=3,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    mlp_only_layers=(0,),
    eos_token_ids=(3,),
)


@pytest.fixture
def decoder():
    return random_decoder(CONFIG, seed=5)


def same_weights(a, b):
    pairs = list(zip(a.hf_state(), b.hf_state(), strict=True))
    return all(n == m and torch.equal(x, y) for (n, x), (m, y) in pairs) and len(pairs) > 20


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 8_000, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(tmp_path, shard_bytes, tied):
    import dataclasses

    decoder = random_decoder(dataclasses.replace(CONFIG, tie_word_embeddings=tied), seed=1)
    written = save_decoder(decoder, tmp_path, max_shard_bytes=shard_bytes)
    assert all(path.is_file() for path in written)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in written)
    assert (len(written) == 2) == (shard_bytes > 1e6)
    assert same_weights(load_decoder(tmp_path), decoder)
    assert load_config(tmp_path) == decoder.config


def test_bfloat16_halves_the_file_and_loads_in_either_dtype(tmp_path, decoder):
    save_decoder(decoder, tmp_path / "wide")
    save_decoder(decoder, tmp_path / "narrow", dtype=torch.bfloat16)
    assert (tmp_path / "narrow" / SINGLE).stat().st_size < 0.7 * (tmp_path / "wide" / SINGLE).stat().st_size
    narrow = load_decoder(tmp_path / "narrow", dtype=torch.bfloat16)
    rounded = load_decoder(tmp_path / "wide", dtype=torch.bfloat16)
    assert same_weights(narrow, rounded)
    assert narrow.contract.dtype == "bfloat16"


def test_random_weights_depend_on_the_seed_only():
    assert same_weights(random_decoder(CONFIG, 9), random_decoder(CONFIG, 9))
    assert not same_weights(random_decoder(CONFIG, 9), random_decoder(CONFIG, 10))
    wide, narrow = random_decoder(CONFIG, 9), random_decoder(CONFIG, 9, dtype=torch.bfloat16)
    assert torch.equal(wide.embed_tokens.bfloat16(), narrow.embed_tokens)
    assert wide.embed_tokens.std().item() == pytest.approx(CONFIG.initializer_range, rel=0.1)
    assert torch.equal(wide.norm, torch.ones(32))


def test_saving_again_leaves_no_stale_shards(tmp_path, decoder):
    save_decoder(decoder, tmp_path, max_shard_bytes=8_000)
    other = random_decoder(CONFIG, seed=6)
    save_decoder(other, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", SINGLE]
    assert same_weights(load_decoder(tmp_path), other)


def test_generation_config_adds_end_ids(tmp_path, decoder):
    save_decoder(decoder, tmp_path)
    for ids, want in ((7, (3, 7)), ([3, 9], (3, 9)), (None, (3,))):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        assert load_config(tmp_path).eos_token_ids == want
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 99}')
    with pytest.raises(ValueError, match=r"generation_config\.json.*99"):
        load_config(tmp_path)


def test_tokenizer_files_travel_along(tmp_path, decoder):
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(ValueError, match="no tokenizer files"):
        copy_tokenizer(source, tmp_path)
    (source / "tokenizer.json").write_text("{}")
    (source / "unrelated.txt").write_text("x")
    written = save_decoder(decoder, tmp_path / "out", tokenizer_from=source)
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert tmp_path / "out" / "tokenizer.json" in written
    assert not (tmp_path / "out" / "unrelated.txt").exists()
    assert copy_tokenizer(source, source) == [source / "tokenizer.json"]


def test_a_flipped_bit_is_a_hash_mismatch(tmp_path, decoder):
    save_decoder(decoder, tmp_path)
    file = tmp_path / SINGLE
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors: tensor \S+: hash mismatch"):
        load_decoder(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 40, -10])
def test_a_truncated_file_is_named(tmp_path, decoder, keep):
    save_decoder(decoder, tmp_path)
    file = tmp_path / SINGLE
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a whole safetensors file"):
        load_decoder(tmp_path)


def test_missing_files_are_named(tmp_path, decoder):
    with pytest.raises(ValueError, match=r"config\.json: no such file"):
        load_decoder(tmp_path)
    save_decoder(decoder, tmp_path, max_shard_bytes=8_000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    shards[1].unlink()
    with pytest.raises(ValueError, match=f"shards that are not there: {shards[1].name}"):
        load_decoder(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(ValueError, match=f"neither {SINGLE} nor {INDEX}"):
        load_decoder(tmp_path)


def test_broken_json_is_named(tmp_path, decoder):
    save_decoder(decoder, tmp_path, max_shard_bytes=8_000)
    good = (tmp_path / INDEX).read_text()
    for text, words in (("{", "not JSON"), ("[]", "expected a JSON object"), ("{}", "no weight_map")):
        (tmp_path / INDEX).write_text(text)
        with pytest.raises(ValueError, match=f"{INDEX}: {words}"):
            load_decoder(tmp_path)
    index = json.loads(good)
    index["weight_map"]["model.extra.weight"] = sorted(index["weight_map"].values())[0]
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match="missing: model.extra.weight"):
        load_decoder(tmp_path)


def test_verify_hook_sees_every_tensor_and_can_refuse(tmp_path, decoder):
    save_decoder(decoder, tmp_path)
    seen = {}
    load_decoder(tmp_path, verify=lambda name, tensor: seen.update({name: tensor.shape}))
    assert seen == {name: tensor.shape for name, tensor in decoder.hf_state()}

    def refuse(name, tensor):
        if name == "model.norm.weight":
            raise ValueError("xxh3 differs from the manifest")

    with pytest.raises(ValueError, match=r"model\.safetensors: tensor model\.norm\.weight: xxh3 differs"):
        load_decoder(tmp_path, verify=refuse)


def test_weights_that_do_not_fit_are_all_named(tmp_path, decoder):
    from safetensors.torch import save_file

    save_decoder(decoder, tmp_path)
    tensors = dict(iter_tensors(tmp_path))
    tensors.pop("model.norm.weight")
    tensors.pop("model.layers.1.mlp.experts.2.up_proj.weight")
    tensors["model.layers.0.self_attn.q_proj.weight"] = torch.zeros(3, 4)
    tensors["model.layers.7.weight"] = torch.zeros(1)
    save_file(tensors, tmp_path / SINGLE)
    with pytest.raises(ValueError) as caught:
        load_decoder(tmp_path)
    for words in (
        str(tmp_path),
        "missing model.norm.weight",
        "missing model.layers.1.mlp.experts.2.up_proj.weight",
        "misshaped model.layers.0.self_attn.q_proj.weight: [3, 4] instead of [32, 32]",
        "unexpected model.layers.7.weight",
    ):
        assert words in str(caught.value)


def test_a_save_that_fails_leaves_nothing_half_written(tmp_path, decoder, monkeypatch):
    import safetensors.torch

    save_decoder(decoder, tmp_path)
    before = (tmp_path / SINGLE).read_bytes()

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_decoder(random_decoder(CONFIG, 8), tmp_path)
    assert (tmp_path / SINGLE).read_bytes() == before
    assert not list(tmp_path.glob("*.partial"))


def test_bad_shard_size(tmp_path, decoder):
    with pytest.raises(ValueError, match="max_shard_bytes=0"):
        save_decoder(decoder, tmp_path, max_shard_bytes=0)


def test_without_safetensors_the_error_names_the_extra(tmp_path, decoder, monkeypatch):
    save_decoder(decoder, tmp_path)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match=r"miles-kernels\[hf\]"):
        load_decoder(tmp_path)
