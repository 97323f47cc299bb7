"""Logits and gradients against transformers on tiny random models; checkpoints cross both ways."""

import json
import os
from types import SimpleNamespace

import pytest
import torch

from miles_kernels.nn.checkpoint import load_config, load_decoder, random_decoder, save_decoder
from miles_kernels.nn.config import DecoderConfig, RopeConfig
from miles_kernels.nn.decoder import CORRECTION, Decoder, PackedKV
from miles_kernels.ops.attention import packed_plan

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="agreement with transformers needs transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SHAPE = {
    "vocab_size": 131,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.08,
}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
LLAMA3 = RopeConfig(
    rope_theta=5e5, rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32
)
GLM = {
    "family": "glm4_moe",
    "attention_bias": True,
    "rms_norm_eps": 1e-5,
    "rope": RopeConfig(rope_theta=1e6, partial_rotary_factor=0.5),
    "first_k_dense_replace": 1,
    "shared_intermediate_size": 40,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.7,
    **MOE,
}
MODELS = {
    "llama": {"family": "llama"},
    "llama-tied": {"family": "llama", "tie_word_embeddings": True, "rms_norm_eps": 1e-5},
    "llama-bias": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-mha-rope3": {"family": "llama", "num_key_value_heads": 4, "rope": LLAMA3},
    "llama-linear-rope": {"family": "llama", "rope": RopeConfig(rope_type="linear", factor=2.0)},
    "qwen2": {"family": "qwen2", "attention_bias": True},
    "qwen2-tied": {"family": "qwen2", "attention_bias": True, "tie_word_embeddings": True, "rope": RopeConfig(rope_theta=1e6)},
    "qwen3": {"family": "qwen3"},
    "qwen3-tied-wide-head": {"family": "qwen3", "tie_word_embeddings": True, "head_dim": 32},
    "qwen3-sliding": {"family": "qwen3", "sliding_window": 7, "layer_types": ("full_attention",) + ("sliding_attention",) * 2},
    "qwen3_moe": {"family": "qwen3_moe", "norm_topk_prob": True, **MOE},
    "qwen3_moe-tied-sparse": {"family": "qwen3_moe", "tie_word_embeddings": True, "decoder_sparse_step": 2, **MOE},
    "qwen3_moe-mlp-only": {"family": "qwen3_moe", "norm_topk_prob": True, "mlp_only_layers": (0,), **MOE},
    "qwen3_moe-sliding": {
        "family": "qwen3_moe",
        "sliding_window": 9,
        "layer_types": ("sliding_attention",) * 3,
        "norm_topk_prob": True,
        **MOE,
    },
    "glm4_moe": GLM,
    "glm4_moe-qk-norm-groups": GLM | {"use_qk_norm": True, "n_group": 3, "topk_group": 2, "first_k_dense_replace": 2},
    "glm4_moe-tied-two-shared": GLM
    | {"tie_word_embeddings": True, "shared_intermediate_size": 80, "attention_bias": False, "first_k_dense_replace": 0},
    "glm4_moe-raw-scores": GLM | {"norm_topk_prob": False, "use_qk_norm": True, "routed_scaling_factor": 1.0},
    "glm4_moe-quarter-rotation": GLM | {"rope": RopeConfig(partial_rotary_factor=0.25), "n_group": 2, "topk_group": 1},
}


@pytest.fixture(params=sorted(MODELS))
def pair(request, tmp_path):
    """Our decoder, and transformers' model loaded from what we exported."""
    config = DecoderConfig(**SHAPE | MODELS[request.param])
    seed = int.from_bytes(os.urandom(4), "little")
    if config.num_experts:  # of two experts scored alike but for rounding either may be chosen: one draw without such, for good
        seed = sum(request.param.encode())
        torch.manual_seed(seed)
    decoder = random_decoder(config, seed)
    with torch.no_grad():  # norms and biases that matter
        for name, view in decoder.hf_state():
            if view.ndim == 1:
                view.add_(torch.randn(view.shape) * 0.3)
            assert not name.endswith(".bias") or view.abs().sum() > 0
    save_decoder(decoder, tmp_path / "export", max_shard_bytes=60_000)
    folder = tmp_path / "export"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    return SimpleNamespace(config=config, decoder=decoder, model=model.eval(), dir=tmp_path)


def run(decoder, sequences):
    """Packed forward: hidden states [T, hidden] of all sequences."""
    plan, positions = packed_plan([len(s) for s in sequences])
    return decoder(torch.cat(sequences), positions, PackedKV(plan))


def test_logits_agree(pair):
    sequences = [torch.randint(0, 131, (length,)) for length in (1, 5, 40)]
    ours = pair.decoder.logits(run(pair.decoder, sequences)).detach()
    theirs = torch.cat([pair.model(s[None]).logits[0] for s in sequences]).detach()
    assert (ours - theirs).abs().max() <= 1e-5
    other = torch.cat([pair.model(s[None].flip(1)).logits[0] for s in sequences]).detach()
    assert (ours - other).abs().max() > 1e-2  # the bound can tell models apart


def test_gradients_agree(pair):
    sequences = [torch.randint(0, 131, (length,)) for length in (2, 9, 33)]
    hidden = run(pair.decoder, sequences)
    last = torch.tensor([len(s) for s in sequences]).cumsum(0) - 1
    keep = torch.ones(hidden.shape[0], dtype=torch.bool).index_fill_(0, last, False)
    targets = torch.cat([s[1:] for s in sequences])
    weight = torch.randn(targets.shape[0])
    (pair.decoder.logprob(hidden[keep], targets).logprob * weight).sum().backward()

    logits = torch.cat([pair.model(s[None]).logits[0, :-1] for s in sequences])
    (torch.log_softmax(logits, -1).gather(1, targets[:, None])[:, 0] * weight).sum().backward()
    theirs = hf_gradients(pair.model, pair.config)

    for name, grad in our_gradients(pair.decoder):
        if name.endswith(CORRECTION):  # only the choice reads it
            assert name not in theirs and not grad.any()
            continue
        scale = theirs[name].abs().max()
        assert scale > 0 or ".experts." in name, name  # an expert nobody was sent to has a gradient of exactly 0
        assert (grad - theirs[name]).abs().max() <= 2e-5 * scale, name


def our_gradients(decoder):
    """Gradients under HF names: a decoder whose weights are this one's gradients exports them."""
    shadow = Decoder(decoder.config, decoder.contract)
    for target, source in zip(shadow.parameters(), decoder.parameters(), strict=True):
        target.data.copy_(source.grad)
    return shadow.hf_state()


def hf_gradients(model, config):
    """transformers' gradients under checkpoint names (it keeps experts fused in memory)."""
    out = {}
    for name, parameter in model.named_parameters():
        prefix, _, leaf = name.rpartition(".")
        if leaf == "gate_up_proj" and prefix.endswith("experts"):
            for expert in range(config.num_experts):
                gate, up = parameter.grad[expert].chunk(2)
                out[f"{prefix}.{expert}.gate_proj.weight"], out[f"{prefix}.{expert}.up_proj.weight"] = gate, up
        elif leaf == "down_proj" and prefix.endswith("experts"):
            out |= {f"{prefix}.{expert}.down_proj.weight": parameter.grad[expert] for expert in range(config.num_experts)}
        else:
            out[name] = parameter.grad
    return out


def test_what_transformers_saves_loads_here(pair):
    pair.model.save_pretrained(pair.dir / "theirs")
    assert load_config(pair.dir / "theirs") == load_config(pair.dir / "export") == pair.config
    loaded = load_decoder(pair.dir / "theirs")
    for (name, a), (other, b) in zip(loaded.hf_state(), pair.decoder.hf_state(), strict=True):
        assert name == other
        assert torch.equal(a, b), name


def test_bf16_logits_are_as_close_to_fp32_as_transformers_are(tmp_path):
    config = DecoderConfig(**SHAPE | MODELS["qwen3"])
    save_decoder(random_decoder(config, 3), tmp_path, dtype=torch.bfloat16)
    wide, narrow = load_decoder(tmp_path), load_decoder(tmp_path, dtype=torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    tokens = [torch.randint(0, 131, (50,))]
    with torch.no_grad():
        exact = wide.logits(run(wide, tokens))
        ours = (narrow.logits(run(narrow, tokens)) - exact).abs().mean()
        theirs = (model(tokens[0][None]).logits[0].float() - exact).abs().mean()
    assert ours <= 1.2 * theirs


def test_a_bf16_glm_checkpoint_comes_back_bit_for_bit_with_its_draft_left_out(tmp_path):
    """The router's correction stays float32; layers that only predict further tokens are a draft's, not the policy's."""
    safetensors = pytest.importorskip("safetensors.torch")
    fields = DecoderConfig(**SHAPE | MODELS["glm4_moe-qk-norm-groups"]).to_hf(dtype="bfloat16")
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**fields), dtype=torch.bfloat16)
    for name, buffer in model.named_buffers():
        if name.endswith(CORRECTION):
            buffer.normal_(0, 0.2)
    model.save_pretrained(tmp_path / "theirs")
    theirs = safetensors.load_file(tmp_path / "theirs" / "model.safetensors")
    kept = [name for name, tensor in theirs.items() if tensor.dtype is torch.float32]
    assert kept and all(name.endswith(CORRECTION) for name in kept)

    draft = {"model.layers.3.eh_proj.weight": torch.zeros(2), "model.layers.3.mlp.gate.weight": torch.zeros(2)}
    safetensors.save_file(theirs | draft, tmp_path / "theirs" / "model.safetensors", metadata={"format": "pt"})
    stated = json.loads((tmp_path / "theirs" / "config.json").read_text())
    (tmp_path / "theirs" / "config.json").write_text(json.dumps(stated | {"num_nextn_predict_layers": 1}))
    save_decoder(load_decoder(tmp_path / "theirs", dtype=torch.bfloat16), tmp_path / "ours")
    ours = safetensors.load_file(tmp_path / "ours" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype is tensor.dtype and torch.equal(ours[name], tensor), name
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["num_nextn_predict_layers"] == 0

    (tmp_path / "theirs" / "config.json").write_text(json.dumps(stated | {"num_nextn_predict_layers": 0}))
    with pytest.raises(ValueError, match="unexpected model.layers.3.eh_proj.weight"):
        load_decoder(tmp_path / "theirs")


def test_the_contract_names_what_a_glm_computes_otherwise():
    plain, glm = (Decoder(DecoderConfig(**SHAPE | MODELS[name])).contract for name in ("qwen3_moe", "glm4_moe"))
    assert plain.difference(glm) == ["ops.rope", "ops.router", "ops.shared_expert"]
    assert plain.digest == plain.with_rules({}).digest and plain.digest != glm.digest
    assert type(glm).from_json(glm.to_json()) == glm
