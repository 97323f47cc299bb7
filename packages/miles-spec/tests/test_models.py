"""Draft models: unrolled states are those of a loop that recycles token by token; checkpoints by name, wrong ones refused."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from miles_kernels.nn.checkpoint import load_decoder, random_decoder, write_model
from miles_kernels.nn.config import DecoderConfig, RopeConfig
from miles_kernels.nn.decoder import PackedKV
from miles_kernels.ops.attention import decode_plan, packed_plan
from miles_kernels.ops.norm import rms_norm
from miles_spec.models import DraftModel, Eagle3Config, Eagle3Draft, MtpConfig, MtpDraft, UnrollPlan
from miles_spec.models.store import draft_tensors, load_draft, policy_drafts, save_draft

POLICY = DecoderConfig(
    family="qwen3", vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, initializer_range=0.3,
)  # fmt: skip
MOE = dataclasses.replace(POLICY, family="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
GLM = dataclasses.replace(
    POLICY, family="glm4_moe", num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True, n_group=3,
    topk_group=2, routed_scaling_factor=1.5, shared_intermediate_size=16, first_k_dense_replace=1, attention_bias=True,
    use_qk_norm=True, rope=RopeConfig(partial_rotary_factor=0.5),
)  # fmt: skip
WINDOW = dataclasses.replace(POLICY, sliding_window=3, layer_types=("sliding_attention",) * 4)
IDS = (1, 4, 5, 9, 17, 30, 31, 39)
LENGTHS = [5, 1, 9]


class PoolKV:
    """Keys and values of a draft's layers in one pool each; `plan` and `slots` are set before every pass."""

    def __init__(self, config: DecoderConfig, size: int) -> None:
        shape = (config.num_key_value_heads, size, config.head_dim)
        self.pools = [(torch.zeros(shape), torch.zeros(shape)) for _ in range(config.num_hidden_layers)]

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        for pool, new in zip(self.pools[layer], (k, v), strict=True):
            pool[:, self.slots] = new.transpose(0, 1)
        return self.pools[layer]

    def target(self, layer: int) -> None:
        return None

    def at(self, positions: list[int]) -> PoolKV:
        self.slots = torch.tensor(positions)
        rows = torch.arange(64).expand(len(positions), -1)
        self.plan = decode_plan(rows, self.slots + 1)
        return self


def draft(name: str) -> DraftModel:
    match name:
        case "mtp":
            return MtpDraft.random(MtpConfig.of(POLICY), 3)
        case "moe":
            return MtpDraft.random(MtpConfig.of(MOE), 3)
        case "glm" | "glm distinct":
            made = MtpDraft.random(MtpConfig.of(GLM, num_layers=1 if name == "glm" else 3), 3)
            for layer in made.blocks:
                layer.router_bias.normal_(0, 0.3)
            return made
        case "window":
            return MtpDraft.random(MtpConfig.of(WINDOW), 3)
        case "distinct":
            return MtpDraft.random(MtpConfig.of(POLICY, num_layers=3, layout="mimo"), 3)
        case _:
            return Eagle3Draft.random(Eagle3Config.of(POLICY, draft_vocab_size=len(IDS)), 3, draft_ids=IDS)


def recycled(model: DraftModel, features: Tensor, tokens: Tensor, index: int, depth: int, embed: Tensor) -> list[Tensor]:
    """States of all depths at one index of one sequence, as decoding makes them: a cache, one token at a time."""
    kv = PoolKV(model.config.block, 64)
    state = model.project(features[: index + 1])
    places = list(range(index + 1))
    out = []
    for k in range(depth):
        if model.config.recycled and k:
            state, places = state[-1:], [index + k]
        inputs = tokens[torch.tensor([(p + k + 1 if not model.config.recycled else p + 1) for p in places])]
        made = model.step(state, inputs, torch.tensor(places), kv.at(places), embed=embed, depth=k + 1)
        out.append(made.hidden[-1])
        state = made.carried
    return out


@pytest.mark.parametrize("name", ["mtp", "moe", "glm", "glm distinct", "window", "distinct", "eagle3"])
def test_unrolled_states_are_the_recycled_ones(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    model, depth = draft(name), 3
    embed = torch.randn(40, 32, generator=generator)
    features = torch.randn(sum(LENGTHS), model.config.num_features, generator=generator)
    # every sequence goes on behind its last slot, so that each slot has a token at each depth
    sequences = [torch.randint(0, 40, (length + depth,), generator=generator) for length in LENGTHS]
    inputs = torch.stack(
        [torch.cat([s[k : k + n] for s, n in zip(sequences, LENGTHS, strict=True)]) for k in range(1, depth + 1)]
    )
    with torch.no_grad():
        states = model.unroll(features, inputs, UnrollPlan.of(LENGTHS), depth, embed=embed)
        start, worst, control = 0, 0.0, 0.0
        for tokens, length in zip(sequences, LENGTHS, strict=True):
            for index in range(length):
                expected = recycled(model, features[start : start + length], tokens, index, depth, embed)
                for k in range(depth):
                    worst = max(worst, float((states[k][start + index] - expected[k]).abs().max()))
                    control = max(control, float((states[k][start] - expected[k]).abs().max()))
            start += length
    assert worst < 1e-5
    assert control > 1e-2, "states of another slot differ, so the comparison can fail"


@pytest.mark.parametrize("name", ["mtp", "distinct", "eagle3"])
def test_gradients_stay_in_the_draft_unless_told(name: str) -> None:
    model = draft(name)
    embed, features = torch.randn(40, 32).requires_grad_(), torch.randn(15, model.config.num_features).requires_grad_()
    inputs, plan = torch.randint(0, 40, (2, 15)), UnrollPlan.of(LENGTHS)
    sum(h.square().sum() for h in model.unroll(features, inputs, plan, 2, embed=embed)).backward()
    assert embed.grad is None and features.grad is None
    used = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("qkv_proj" in n for n in used) and any("final_norm" in n or "join" in n for n in used)
    sum(h.square().sum() for h in model.unroll(features, inputs, plan, 2, embed=embed, train_shared=True)).backward()
    assert embed.grad is not None and features.grad is not None
    only_second = model.unroll(features, inputs, plan, 2, embed=embed, train_shared=True)[1]
    features.grad = None
    only_second.square().sum().backward()
    assert features.grad is not None and float(features.grad.abs().sum()) > 0, "depth 2 reaches depth 1"


@pytest.mark.parametrize("layout", ["deepseek", "glm", "mimo", "qwen3_next"])
def test_checkpoints_by_name(layout: str) -> None:
    source = MtpDraft.random(MtpConfig.of(POLICY, layout=layout), 1)
    state = {name: tensor.clone() for name, tensor in source.named_state()}
    target = MtpDraft.random(MtpConfig.of(POLICY, layout=layout), 2)
    target.load_named(state.items())
    for (name, a), b in zip(source.named_parameters(), target.parameters(), strict=True):
        assert torch.equal(a, b), name
    for name in state:
        with pytest.raises(ValueError, match=f"missing {name}"):
            target.load_named((n, t) for n, t in state.items() if n != name)
        with pytest.raises(ValueError, match=f"misshaped {name}"):
            target.load_named((n, t[..., :1] if n == name else t) for n, t in state.items())
    with pytest.raises(ValueError, match=r"unexpected model\.layers\.9\.eh"):
        target.load_named([*state.items(), ("model.layers.9.eh", torch.zeros(1))])


def test_names_of_the_families() -> None:
    names = {
        layout: {n for n, _ in MtpDraft(MtpConfig.of(POLICY, layout=layout)).named_state()} for layout in ("deepseek", "mimo")
    }
    assert {"model.layers.4.eh_proj.weight", "model.layers.4.shared_head.norm.weight"} <= names["deepseek"]
    assert {"model.mtp_layers.0.input_proj.weight", "model.mtp_layers.0.self_attn.q_proj.weight"} <= names["mimo"]
    third = MtpDraft(MtpConfig.of(POLICY, layout="glm", num_layers=3))
    assert "model.layers.6.hnorm.weight" in dict(third.named_state())


def test_mimo_joins_the_other_way_round() -> None:
    deepseek, mimo = (MtpDraft.random(MtpConfig.of(POLICY, layout=layout), 1) for layout in ("deepseek", "mimo"))
    stored = dict(mimo.named_state())["model.mtp_layers.0.input_proj.weight"]
    straight = dict(deepseek.named_state())["model.layers.4.eh_proj.weight"]
    assert torch.equal(stored[:, :32], straight[:, 32:]) and not torch.equal(stored, straight)


def test_a_copy_of_the_policys_head_must_be_its_head() -> None:
    model = MtpDraft.random(MtpConfig.of(POLICY), 1)
    head = torch.randn(40, 32)
    state = [*model.named_state(), ("model.layers.4.shared_head.head.weight", head)]
    model.load_named(state, shared={"lm_head": head})
    with pytest.raises(ValueError, match="differs from the policy's lm_head"):
        model.load_named(state, shared={"lm_head": head + 1})


def test_eagle3_checkpoint_and_vocabulary() -> None:
    source = draft("eagle3")
    state = {name: tensor.clone() for name, tensor in source.named_state()}
    assert {"fc.weight", "midlayer.hidden_norm.weight", "midlayer.self_attn.q_proj.weight", "d2t", "t2d"} <= set(state)
    assert state["midlayer.self_attn.q_proj.weight"].shape == (32, 64)
    assert (state["d2t"] + torch.arange(8)).tolist() == list(IDS) and state["t2d"].sum() == 8
    target = Eagle3Draft(Eagle3Config.of(POLICY, draft_vocab_size=8))
    target.load_named(state.items())
    assert target.draft_ids.tolist() == list(IDS)
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    state["t2d"] = state["t2d"].roll(1)
    with pytest.raises(ValueError, match="t2d marks other tokens"):
        target.load_named(state.items())


def test_from_trunk_starts_with_the_policys_weights() -> None:
    policy = random_decoder(POLICY, 0)
    mtp = MtpDraft.from_trunk(policy)
    assert torch.equal(mtp.block(0).qkv_proj, policy.layers[3].qkv_proj)
    hidden = torch.randn(6, 32)
    states = mtp.unroll(hidden, torch.randint(0, 40, (1, 6)), UnrollPlan.of([6]), 1, embed=policy.embed_tokens)
    assert states[0].isfinite().all()
    eagle = Eagle3Draft.from_trunk(policy, Eagle3Config.of(POLICY, draft_vocab_size=8), draft_ids=IDS)
    assert torch.equal(eagle.lm_head, policy.head[list(IDS)])
    with pytest.raises(ValueError, match="last layer has"):
        MtpDraft.from_trunk(policy, MtpConfig.of(MOE))


def test_wrong_configs_and_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match="one layer, not 2"):
        MtpConfig.of(POLICY, num_layers=2, layout="qwen3_next")
    with pytest.raises(ValueError, match="draft_vocab_size=41"):
        Eagle3Config.of(POLICY, draft_vocab_size=41)
    model, plan = draft("distinct"), UnrollPlan.of(LENGTHS)
    with pytest.raises(ValueError, match=r"depth 4 must lie in 1\.\.3"):
        model.unroll(torch.zeros(15, 32), torch.zeros(4, 15, dtype=torch.int64), plan, 4, embed=torch.zeros(40, 32))
    with pytest.raises(ValueError, match="this draft reads"):
        model.unroll(torch.zeros(15, 31), torch.zeros(4, 15, dtype=torch.int64), plan, 3, embed=torch.zeros(40, 32))


def test_taps_are_the_residual_stream_and_change_nothing() -> None:
    policy = random_decoder(POLICY, 0)
    plan, positions = packed_plan([7])
    ids = torch.randint(0, 40, (7,))
    with torch.no_grad():
        hidden = policy(ids, positions, PackedKV(plan))
        taps: dict[int, Tensor | None] = {0: None, 2: None, 4: None}
        assert torch.equal(policy(ids, positions, PackedKV(plan), taps=taps), hidden)
        assert taps[0] is not None and taps[2] is not None and taps[4] is not None
        assert torch.equal(taps[0], policy.embed_tokens[ids])
        assert torch.equal(rms_norm(taps[4], policy.norm, POLICY.rms_norm_eps), hidden)
        assert not torch.equal(taps[2], taps[4])


@pytest.mark.parametrize("name", ["mtp", "moe", "glm", "window", "distinct", "eagle3"])
def test_directories_round_trip(name: str, tmp_path: Path) -> None:
    model = draft(name)
    save_draft(model, tmp_path)
    policy = {"moe": MOE, "glm": GLM, "window": WINDOW}.get(name, POLICY)
    loaded = load_draft(tmp_path, policy)
    assert loaded.config == model.config
    state = dict(loaded.named_state())
    assert all(torch.equal(tensor, state[n]) for n, tensor in model.named_state())
    assert load_draft(tmp_path).config == model.config
    with pytest.raises(ValueError, match="does not fit the policy: hidden_size is 32, the policy's 64"):
        load_draft(tmp_path, dataclasses.replace(policy, hidden_size=64))


def test_layers_that_a_policy_carries(tmp_path: Path) -> None:
    policy, model = random_decoder(POLICY, 0), draft("mtp")
    data = POLICY.to_hf() | {"num_nextn_predict_layers": 1}
    head = {"model.layers.4.shared_head.head.weight": policy.head.detach()}
    write_model(tmp_path, dict(policy.hf_state()) | dict(model.named_state()) | head, data)
    config = policy_drafts(tmp_path, POLICY)
    assert config == model.config
    for whole in (load_decoder(tmp_path), load_decoder(tmp_path, beside=draft_tensors(config))):
        assert torch.equal(whole.head, policy.head)
    loaded = load_draft(tmp_path, POLICY, shared={"lm_head": policy.head})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))
    with pytest.raises(ValueError, match="differs from the policy's lm_head"):
        load_draft(tmp_path, POLICY, shared={"lm_head": policy.head + 1})


def test_a_glm_draft_starts_with_the_policys_correction_and_keeps_it_in_float32(tmp_path: Path) -> None:
    policy = random_decoder(GLM, 0)
    policy.layers[3].router_bias.normal_(0, 0.3)
    model = MtpDraft.from_trunk(policy)
    assert model.config.layout == "glm" and torch.equal(model.block(0).router_bias, policy.layers[3].router_bias)
    name = "model.layers.4.mlp.gate.e_score_correction_bias"
    save_draft(model, tmp_path, dtype=torch.bfloat16)
    loaded = load_draft(tmp_path, GLM, dtype=torch.bfloat16)
    stored = dict(loaded.named_state())[name]
    assert stored.dtype is torch.float32 and torch.equal(stored, policy.layers[3].router_bias)
    assert all(p.dtype is torch.bfloat16 for p in loaded.parameters())
    eagle = Eagle3Config.of(GLM)
    assert (eagle.block.family, eagle.block.rotary_dim, eagle.block.attention_bias) == ("qwen3", 8, False)
    save_draft(Eagle3Draft.random(eagle, 0), tmp_path / "eagle3")
    assert load_draft(tmp_path / "eagle3", GLM).config == eagle


def test_a_glm_draft_computes_what_transformers_computes(tmp_path: Path) -> None:
    """Policy and draft in one directory under GLM's names, read by both; the states of depth 1 agree."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = pytest.importorskip("transformers", reason="agreement with transformers needs transformers")
    layers = pytest.importorskip("transformers.modeling_layers", reason="agreement with transformers needs transformers")
    if not hasattr(layers, "MtpModel"):
        pytest.skip("this transformers knows no MTP layers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    policy, model = random_decoder(GLM, 0), draft("glm")
    write_model(tmp_path, dict(policy.hf_state()) | dict(model.named_state()), GLM.to_hf() | {"num_nextn_predict_layers": 1})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    theirs._keys_to_ignore_on_load_unexpected = [r"model\.layers\.4\."]  # their class knows the two published depths only
    mtp = layers.MtpModel.from_pretrained(theirs).eval()
    ids = torch.randint(0, 40, (1, 12), generator=torch.Generator().manual_seed(0))  # no two experts scored alike
    with torch.no_grad():
        hidden = theirs.model(ids[:, :-1]).last_hidden_state
        positions = torch.arange(11)[None]
        expected = mtp.forward_layer(0, hidden, positions, None, input_ids=ids[:, 1:])[0]
        loaded = load_draft(tmp_path, GLM)
        plan = UnrollPlan.of([11])
        (ours,) = loaded.unroll(hidden[0], ids[:, 1:], plan, 1, embed=policy.embed_tokens)
        (other,) = loaded.unroll(hidden[0].roll(1, 0), ids[:, 1:], plan, 1, embed=policy.embed_tokens)
    assert (ours - expected).abs().max() < 1e-5
    assert (other - expected).abs().max() > 1e-2, "states of another token differ, so the comparison can fail"
