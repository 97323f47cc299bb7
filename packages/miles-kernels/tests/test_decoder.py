"""The decoder as a module: weights in and out, options, gradients."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from miles_kernels.contract import Contract
from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.config import DecoderConfig
from miles_kernels.nn.decoder import Decoder, PackedKV
from miles_kernels.ops.attention import packed_plan
from miles_kernels.ops.logprob import logprob_from_logits
from miles_kernels.testing import assert_bitwise_equal

DENSE = DecoderConfig(
    family="llama",
    vocab_size=70,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    attention_bias=True,
    mlp_bias=True,
    initializer_range=0.2,
)
MOE = dataclasses.replace(
    DENSE,
    family="qwen3_moe",
    mlp_bias=False,
    num_experts=5,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    num_hidden_layers=3,
    mlp_only_layers=(1,),
)


def forward(decoder, lengths=(5, 9, 3), parents=None, tokens=None, **kw):
    plan, positions = packed_plan(list(lengths), parents)
    tokens = torch.randint(0, decoder.config.vocab_size, (sum(lengths),)) if tokens is None else tokens
    return tokens, decoder(tokens, positions, PackedKV(plan), **kw)


@pytest.mark.parametrize("config", [DENSE, MOE, dataclasses.replace(DENSE, tie_word_embeddings=True)])
def test_hf_state_names_every_weight_once_and_writes_through(config):
    decoder = random_decoder(config, 0)
    state = list(decoder.hf_state())
    assert len({name for name, _ in state}) == len(state)
    assert sum(t.numel() for _, t in state) == sum(p.numel() for p in decoder.parameters())
    assert ("lm_head.weight" in dict(state)) != config.tie_word_embeddings
    for index, (_, view) in enumerate(state):
        assert not view.requires_grad
        view.fill_(float(index))
    seen = torch.cat([p.detach().flatten() for p in decoder.parameters()]).unique().tolist()
    assert seen == [float(i) for i in range(len(state))]


def test_loading_casts_ignores_constants_and_reports_everything_at_once():
    source, target = random_decoder(DENSE, 1), Decoder(DENSE)
    state = [(name, tensor.double()) for name, tensor in source.hf_state()]
    target.load_hf_state([*state, ("model.layers.0.self_attn.rotary_emb.inv_freq", torch.zeros(4))])
    for (_, a), (_, b) in zip(source.hf_state(), target.hf_state(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(
        ValueError, match=r"missing model\.layers\.1\.mlp\.down_proj\.bias.*repeated model\.norm\.weight.*unexpected x"
    ):
        target.load_hf_state(
            [*(p for p in state if p[0] != "model.layers.1.mlp.down_proj.bias"), state[-2], ("x", torch.zeros(1))]
        )
    target.load_hf_state(state[:3], strict=False)
    with pytest.raises(ValueError, match="misshaped"):
        target.load_hf_state([(state[0][0], torch.zeros(2, 2))], strict=False)


def test_a_tied_head_may_be_stored_twice_only_if_equal():
    decoder = random_decoder(dataclasses.replace(DENSE, tie_word_embeddings=True), 2)
    state = [(name, tensor.clone()) for name, tensor in decoder.hf_state()]
    head = ("lm_head.weight", state[0][1].clone())
    decoder.load_hf_state([head, *state])
    head[1][0, 0] += 1
    with pytest.raises(ValueError, match=r"lm_head\.weight: it differs from the embedding"):
        decoder.load_hf_state([head, *state])


def test_contract_must_fit_the_dtype():
    assert Decoder(DENSE, dtype=torch.bfloat16).contract == Contract.reference("bfloat16")
    with pytest.raises(ValueError, match="decoder dtype bfloat16, but its contract says float32"):
        Decoder(DENSE, Contract.reference("float32"), dtype=torch.bfloat16)


@pytest.mark.parametrize("config", [DENSE, MOE])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference_training_and_recomputation_give_the_same_bits(config, dtype):
    decoder = random_decoder(config, 3, dtype=dtype)
    tokens, hidden = forward(decoder)
    with torch.inference_mode():
        _, again = forward(decoder, tokens=tokens)
    assert_bitwise_equal(hidden.detach(), again)
    decoder.gradient_checkpointing = True
    _, recomputed = forward(decoder, tokens=tokens)
    assert_bitwise_equal(hidden.detach(), recomputed.detach())

    targets = torch.randint(0, config.vocab_size, tokens.shape)
    gradients = []
    for states in (hidden, recomputed):
        decoder.zero_grad()
        decoder.logprob(states, targets).logprob.sum().backward()
        gradients.append([p.grad.clone() for p in decoder.parameters()])
    for a, b in zip(*gradients, strict=True):
        assert_bitwise_equal(a, b)
    assert all(g.abs().sum() > 0 for g in gradients[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_engine_and_trainer_logprobs_are_bitwise_equal(dtype, temperature):
    decoder = random_decoder(DENSE, 4, dtype=dtype)
    tokens, hidden = forward(decoder)
    targets = torch.randint(0, 70, tokens.shape)
    out = decoder.logprob(hidden, targets, temperature)
    engine = logprob_from_logits(decoder.logits(hidden).detach(), targets, temperature)
    assert_bitwise_equal(out.logprob.detach(), engine.logprob)
    assert_bitwise_equal(out.entropy.detach(), engine.entropy)
    assert decoder.logits(hidden).dtype is torch.float32
    assert decoder.logprob(hidden, targets, temperature, entropy=False).entropy is None


def test_a_shared_prompt_has_the_same_gradient_as_copies_of_it():
    decoder = random_decoder(DENSE, 5)
    prompt, tails = torch.randint(0, 70, (6,)), [torch.randint(0, 70, (n,)) for n in (2, 4, 3)]
    targets = torch.randint(0, 70, (9,))

    def gradient(tokens, lengths, parents, rows):
        decoder.zero_grad()
        _, hidden = forward(decoder, lengths, parents, tokens)
        decoder.logprob(hidden[rows], targets).logprob.sum().backward()
        return torch.cat([p.grad.flatten() for p in decoder.parameters()])

    shared = gradient(torch.cat([prompt, *tails]), (6, 2, 4, 3), (-1, 0, 0, 0), torch.arange(6, 15))
    rows = torch.cat([torch.arange(6, 8), torch.arange(14, 18), torch.arange(24, 27)])
    copied = gradient(torch.cat([t for tail in tails for t in (prompt, tail)]), (8, 10, 9), None, rows)
    assert (shared - copied).norm() <= 1e-5 * copied.norm()


def test_routed_experts_are_recorded_per_moe_layer():
    decoder = random_decoder(MOE, 6)
    for decoder.gradient_checkpointing in (False, True):
        routed = {}
        tokens, hidden = forward(decoder, routed=routed)
        hidden.sum().backward()
        assert sorted(routed) == [0, 2]
        for ids in routed.values():
            assert ids.shape == (len(tokens), 2)
            assert bool((ids[:, 0] != ids[:, 1]).all()) and 0 <= int(ids.min()) and int(ids.max()) < 5


def test_a_copy_is_independent():
    decoder = random_decoder(DENSE, 7)
    twin = copy.deepcopy(decoder).requires_grad_(False)
    tokens, before = forward(twin)
    with torch.no_grad():
        decoder.embed_tokens.add_(1.0)
    _, after = forward(twin, tokens=tokens)
    assert_bitwise_equal(before, after)
    assert twin.contract == decoder.contract and not after.requires_grad


def test_order_of_sequences_does_not_matter_but_order_of_tokens_does():
    decoder = random_decoder(DENSE, 8)
    a, b = torch.randint(0, 70, (7,)), torch.randint(0, 70, (4,))
    _, ab = forward(decoder, (7, 4), tokens=torch.cat([a, b]))
    _, ba = forward(decoder, (4, 7), tokens=torch.cat([b, a]))
    assert_bitwise_equal(ab[:7].detach(), ba[4:].detach())
    _, swapped = forward(decoder, (7, 4), tokens=torch.cat([a.flip(0), b]))
    assert not torch.equal(ab[6], swapped[6])
