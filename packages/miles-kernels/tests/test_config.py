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


GLM = {  # zai-org/GLM-4.5-Air, without its special tokens
    "architectures": ["Glm4MoeForCausalLM"],
    "model_type": "glm4_moe",
    "vocab_size": 151552,
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "rms_norm_eps": 1e-5,
    "moe_intermediate_size": 1408,
    "n_routed_experts": 128,
    "num_experts_per_tok": 8,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "use_qk_norm": False,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
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
        DecoderConfig.from_hf(GLM),
        DecoderConfig.from_hf(GLM | {"n_group": 8, "topk_group": 4, "n_shared_experts": 2, "partial_rotary_factor": 0.25}),
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
        (hf(vocab_size="x", num_key_value_heads=[2]), ["vocab_size='x', num_key_value_heads=[2] must be a number"]),
        (hf(num_attention_heads=0), ["num_attention_heads=0"]),
        (hf(num_key_value_heads=4), ["num_attention_heads=9", "num_key_value_heads=4"]),
        (hf(eos_token_id=49152), ["eos_token_id [49152]"]),
        (hf("qwen3", layer_types=["full_attention", "linear_attention"] * 15), ["linear_attention"]),
        (hf("qwen3", layer_types=["sliding_attention"]), ["layer_types has 1 entries"]),
        (hf("qwen3", layer_types=["sliding_attention"] * 30), ["sliding_window=None"]),
        (hf("qwen3_moe", num_experts=2, num_experts_per_tok=3), ["num_experts_per_tok=3 exceeds"]),
        (GLM | {"n_group": 5}, ["num_experts=128 is no multiple of n_group=5"]),
        (GLM | {"partial_rotary_factor": 0.03}, ["partial_rotary_factor=0.03 of head_dim=128"]),
        (GLM | {"rope_parameters": {"partial_rotary_factor": 0.25}}, ["is 0.5, but rope_parameters.partial_rotary_factor 0.25"]),
        (GLM | {"n_routed_experts": 4}, ["num_experts_per_tok=8 exceeds num_experts=4"]),
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


def test_a_glm_config_is_read_as_transformers_reads_it():
    config = DecoderConfig.from_hf(GLM)
    assert (config.rotary_dim, config.head_dim, config.rope.rope_theta) == (64, 128, 1e6)
    assert config.attention_bias and not config.output_bias and not config.qk_norm
    assert [config.is_moe_layer(i) for i in (0, 1, 45)] == [False, True, True]
    assert (config.num_experts, config.shared_intermediate_size) == (128, 1408)
    new = {key: value for key, value in GLM.items() if key not in ("partial_rotary_factor", "rope_theta", "rope_scaling")}
    assert DecoderConfig.from_hf(new | {"rope_parameters": {"rope_theta": 1e6, "partial_rotary_factor": 0.5}}) == config
    assert DecoderConfig.from_hf(new | {"rope_theta": 1e6}) == config, "half of a head where config.json does not say"
    assert config.rules.keys() == {"rope", "router", "shared_expert"}
    assert not DecoderConfig.from_hf(LLAMA).rules


def test_what_only_a_glm_has_is_refused_elsewhere():
    config = DecoderConfig.from_hf(hf("qwen3_moe", num_experts=4, num_experts_per_tok=2))
    with pytest.raises(ValueError, match=r"shared_intermediate_size=64 exists only for glm4_moe.*n_group=2 exists only"):
        dataclasses.replace(config, shared_intermediate_size=64, n_group=2)
    with pytest.raises(ValueError, match="no multiple of moe_intermediate_size=1408: config.json cannot state it"):
        dataclasses.replace(DecoderConfig.from_hf(GLM), shared_intermediate_size=1000).to_hf()
