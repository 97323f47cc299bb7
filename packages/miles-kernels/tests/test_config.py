"""config.json in and out."""

from __future__ import annotations

import dataclasses
import json

import pytest

from miles_kernels.nn.config import DecoderConfig, RopeConfig

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "rope_theta": 100000,
    "rope_scaling": None,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
}


def hf(family="llama", **changes):
    return {**LLAMA, "model_type": family, "architectures": None, **changes}


def test_reads_what_a_llama_checkpoint_states():
    config = DecoderConfig.from_hf(LLAMA)
    assert (config.family, config.head_dim, config.rope.rope_theta, config.eos_token_ids) == ("llama", 64, 100000.0, (2,))
    assert config.tie_word_embeddings and not config.attention_bias and not config.qk_norm


@pytest.mark.parametrize(
    "config",
    [
        DecoderConfig.from_hf(LLAMA),
        DecoderConfig.from_hf(hf(eos_token_id=[2, 7], attention_bias=True, mlp_bias=True)),
        DecoderConfig.from_hf(hf("qwen2", use_sliding_window=True, sliding_window=64, max_window_layers=10)),
        DecoderConfig.from_hf(hf("qwen3", head_dim=128)),
        DecoderConfig.from_hf(
            hf("qwen3_moe", num_experts=4, num_experts_per_tok=2, use_sliding_window=True, sliding_window=32, mlp_only_layers=[1])
        ),
        DecoderConfig.from_hf(hf(rope_scaling={"type": "linear", "factor": 2.0})),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_round_trip(config, dtype):
    text = json.dumps(config.to_hf(dtype=dtype))
    assert DecoderConfig.from_hf(json.loads(text)) == config
    assert json.loads(text)["dtype"] == dtype


def test_both_spellings_of_rope_mean_the_same():
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
    old = DecoderConfig.from_hf(hf(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **scaling}))
    new = DecoderConfig.from_hf(hf(rope_theta=None, rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **scaling}))
    assert old == new
    assert old.rope == RopeConfig(rope_type="llama3", rope_theta=5e5, **scaling)


def test_defaults_of_each_family():
    assert DecoderConfig.from_hf(hf("qwen2")).attention_bias and not DecoderConfig.from_hf(hf("qwen2")).output_bias
    assert DecoderConfig.from_hf(hf("qwen3")).head_dim == 128
    assert DecoderConfig.from_hf(hf("qwen3_moe")).num_experts == 128
    assert DecoderConfig.from_hf(hf(num_key_value_heads=None, eos_token_id=None)).num_key_value_heads == 9
    assert DecoderConfig.from_hf(hf("qwen3", num_local_experts=None)).num_experts == 0


def test_windows_and_expert_layers():
    config = DecoderConfig.from_hf(hf("qwen3", use_sliding_window=True, sliding_window=64, max_window_layers=29))
    assert [config.window(i) for i in (0, 28, 29)] == [None, None, 64]
    assert DecoderConfig.from_hf(hf("qwen3", use_sliding_window=False, sliding_window=64)).window(0) is None
    moe = DecoderConfig.from_hf(hf("qwen3_moe", num_experts=4, num_experts_per_tok=2, decoder_sparse_step=2, mlp_only_layers=[3]))
    assert [moe.is_moe_layer(i) for i in range(6)] == [False, True, False, False, False, True]


@pytest.mark.parametrize(
    "data, words",
    [
        (hf("gpt2"), ["model_type 'gpt2'", "llama, qwen2, qwen3, qwen3_moe"]),
        (hf("mistral"), ["model_type 'mistral'"]),
        (hf(architectures=["LlamaForSequenceClassification"]), ["architectures", "LlamaForCausalLM"]),
        (hf(hidden_act="gelu", attention_dropout=0.1), ["hidden_act 'gelu' (supported: silu)", "attention_dropout 0.1"]),
        (hf(quantization_config={"bits": 4}), ["quantization_config"]),
        (hf(partial_rotary_factor=0.5), ["partial_rotary_factor 0.5"]),
        (hf(pretraining_tp=2), ["pretraining_tp 2"]),
        (hf(sliding_window=128), ["sliding_window 128 in a llama"]),
        (hf("qwen3", mlp_bias=True), ["mlp_bias"]),
        (hf(rope_scaling={"rope_type": "dynamic", "factor": 2.0}), ["rope_type 'dynamic'", "default, linear, llama3"]),
        (hf(rope_scaling={"rope_type": "linear"}), ["'linear'", "missing factor"]),
        (hf(rope_scaling={"rope_type": "linear", "factor": 2.0, "beta": 1}), ["unsupported beta"]),
        (hf(rope_parameters={"full_attention": {"rope_theta": 1.0}}), ["per layer type", "full_attention"]),
        (hf(rope_parameters={"partial_rotary_factor": 0.25}), ["partial_rotary_factor"]),
        ({"model_type": "llama"}, ["missing vocab_size, hidden_size"]),
        (hf(num_key_value_heads=4), ["num_attention_heads=9", "num_key_value_heads=4"]),
        (hf(eos_token_id=49152), ["eos_token_id [49152]"]),
        (hf("qwen3", layer_types=["full_attention", "linear_attention"] * 15), ["linear_attention"]),
        (hf("qwen3", layer_types=["sliding_attention"]), ["layer_types has 1 entries"]),
        (hf("qwen3", layer_types=["sliding_attention"] * 30), ["sliding_window=None"]),
        (hf("qwen3_moe", num_experts=2, num_experts_per_tok=3), ["num_experts_per_tok=3 exceeds"]),
        ([], ["JSON object"]),
    ],
)
def test_refusals_name_file_field_and_remedy(data, words):
    with pytest.raises(ValueError) as caught:
        DecoderConfig.from_hf(data, where="model/config.json")
    for word in ["model/config.json", *words]:
        assert word in str(caught.value)


def test_several_wrong_fields_are_all_named():
    config = DecoderConfig.from_hf(LLAMA)
    with pytest.raises(ValueError, match=r"hidden_size=0.*head_dim=3.*num_experts=4"):
        dataclasses.replace(config, hidden_size=0, head_dim=3, num_experts=4)
    with pytest.raises(ValueError, match="mlp_bias=True exists only for llama"):
        dataclasses.replace(config, family="qwen3", mlp_bias=True)
    with pytest.raises(ValueError, match="not a qwen2 model"):
        dataclasses.replace(config, family="qwen2")
    with pytest.raises(ValueError, match="family='gpt'"):
        dataclasses.replace(config, family="gpt")
