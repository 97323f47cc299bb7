"""Logits and gradients against transformers on tiny random models; checkpoints cross both ways."""

import os
from types import SimpleNamespace

import pytest
import torch

from miles_kernels.nn.checkpoint import load_config, load_decoder, random_decoder, save_decoder
from miles_kernels.nn.config import DecoderConfig, RopeConfig
from miles_kernels.nn.decoder import Decoder, PackedKV
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
}


@pytest.fixture(params=sorted(MODELS))
def pair(request, tmp_path):
    """Our decoder, and transformers' model loaded from what we exported."""
    config = DecoderConfig(**SHAPE | MODELS[request.param])
    decoder = random_decoder(config, seed=int.from_bytes(os.urandom(4), "little"))
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
