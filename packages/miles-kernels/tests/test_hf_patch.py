"""patch(): transformers models become batch-invariant, stay themselves within rounding, and come back untouched."""

import os

import pytest
import torch

from miles_kernels.nn.hf import patch
from miles_kernels.testing import count_unequal

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers", reason="patch() is for transformers models")
transformers.logging.set_verbosity_error()

SHAPE = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "initializer_range": 0.15,
    "max_position_embeddings": 512,
}
MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40, "norm_topk_prob": True}
CASES = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {}),
    "qwen3-sliding": (
        "Qwen3Config",
        {"use_sliding_window": True, "sliding_window": 7, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", MOE),
    "glm4_moe": (
        "Glm4MoeConfig",
        {"n_routed_experts": 6, "n_group": 3, "topk_group": 2, "use_qk_norm": True, "attention_bias": True} | MOE,
    ),
}


@pytest.fixture(params=sorted(CASES))
def model(request):
    name, extra = CASES[request.param]
    if "moe" in request.param:  # of two experts scored alike but for rounding either may be chosen: one draw without such
        torch.manual_seed(1)
    config = getattr(transformers, name)(**SHAPE | extra)
    made = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, buffer in made.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(0, 0.2)
    return made


def logits(model, ids, mask=None):
    with torch.no_grad():
        return model(ids, attention_mask=mask, use_cache=False).logits


def test_bits_do_not_depend_on_batch_or_padding_and_stay_close_to_transformers(model):
    ids = torch.randint(211, (5, 33))
    stock = logits(model, ids)
    with patch(model) as patched:
        whole = logits(patched, ids)
        assert float((whole - stock).abs().max()) < 2e-4
        for row in range(5):
            assert count_unequal(logits(patched, ids[row : row + 1]), whole[row : row + 1]) == 0
        short = ids[:2, :19]
        alone = logits(patched, short)
        assert count_unequal(alone, whole[:2, :19]) == 0
        for side in ("left", "right"):
            pad = torch.zeros(2, 14, dtype=torch.long)
            both = [(pad, short), (torch.zeros_like(pad), torch.ones_like(short))]
            padded, mask = (torch.cat(x if side == "left" else x[::-1], 1) for x in both)
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            with torch.no_grad():
                out = patched(padded, attention_mask=mask, position_ids=positions, use_cache=False).logits
            real = out[:, 14:] if side == "left" else out[:, :19]
            assert count_unequal(real, alone) == 0, side


def test_decoding_with_a_cache_gives_the_bits_of_the_full_forward(model):
    ids = torch.randint(211, (3, 24))
    with patch(model) as patched, torch.no_grad():
        whole = patched(ids, use_cache=False).logits
        out = patched(ids[:, :9], use_cache=True)
        pieces = [out.logits]
        for stop in (10, 11, 17, 18, 24):
            start = sum(p.shape[1] for p in pieces)
            out = patched(ids[:, start:stop], past_key_values=out.past_key_values, use_cache=True)
            pieces.append(out.logits)
        assert count_unequal(torch.cat(pieces, 1), whole) == 0


def test_the_stock_model_differs():
    torch.manual_seed(3)  # whether stock kernels differ depends on the values; these do
    model = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SHAPE)).eval()
    ids = torch.randint(211, (7, 61))
    whole = logits(model, ids)
    unequal = sum(count_unequal(logits(model, ids[:1, :n]), whole[:1, :n]) for n in (1, 2, 3, 17, 40, 61))
    assert unequal > 0


def test_gradients_are_deterministic_and_close_to_transformers(model):
    ids = torch.randint(211, (2, 21))

    def gradients():
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    stock = gradients()
    with patch(model):
        first, second = gradients(), gradients()
    assert first.keys() == stock.keys()
    for name, grad in first.items():
        assert count_unequal(grad, second[name]) == 0, name
        assert float((grad - stock[name]).norm()) <= 2e-3 * float(stock[name].norm()) + 1e-6, name


def test_undo_restores_the_model_bit_for_bit_also_after_an_error(model):
    ids = torch.randint(211, (2, 13))
    before = logits(model, ids)
    forwards = {name: module.forward.__func__ for name, module in model.named_modules()}
    handle = patch(model)
    assert handle.counts["linear"] >= 2 and handle.counts["norm"] >= 5
    with pytest.raises(ValueError, match="patched already"):
        patch(model)
    handle.undo()
    handle.undo()
    with pytest.raises(KeyError), patch(model):
        raise KeyError("inside")
    assert {name: module.forward.__func__ for name, module in model.named_modules()} == forwards
    assert count_unequal(logits(model, ids), before) == 0


def test_what_cannot_be_patched_is_refused():
    gpt = transformers.AutoModelForCausalLM.from_config(
        transformers.GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=50, n_positions=16)
    )
    with pytest.raises(ValueError, match="gpt2"):
        patch(gpt)
    wet = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SHAPE, attention_dropout=0.1))
    with pytest.raises(ValueError, match="attention_dropout"):
        patch(wet)
    relu = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**SHAPE, hidden_act="relu"))
    with pytest.raises(ValueError, match="silu"):
        patch(relu)
