"""Draft models in the embedded engine: what they compute while serving, how their weights come, rejection verification."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from engine_cases import run

from miles_kernels.nn.checkpoint import random_decoder, save_decoder, write_model
from miles_kernels.nn.config import RopeConfig
from miles_kernels.nn.decoder import CORRECTION, Decoder, PackedKV
from miles_kernels.ops.attention import packed_plan, table_plan
from miles_rollout.engines.embedded import EmbeddedConfig
from miles_rollout.engines.embedded.core import EngineCore
from miles_rollout.engines.embedded.engine import EmbeddedEngine
from miles_rollout.engines.embedded.factory import load_engine
from miles_rollout.engines.embedded.features import FeatureStore
from miles_rollout.engines.embedded.kv import PagedKV
from miles_rollout.engines.embedded.speculate_check import SHAPE, TOKENIZER, digest, serve
from miles_rollout.engines.embedded.state import Job
from miles_rollout.engines.embedded.weights import make_manifest
from miles_rollout.wire import GenerateRequest, GenerateResult, SamplingParams
from miles_spec.models import DraftModel, Eagle3Config, Eagle3Draft, MtpConfig, MtpDraft, UnrollPlan
from miles_spec.models.base import DraftModel as Base
from miles_spec.models.store import save_draft
from miles_spec.testing import RandomDraft

CONFIG = EmbeddedConfig(num_pages=64, max_running=8, max_batched_tokens=512, draft_tokens=3, draft_adaptive=False)
REQUEST = GenerateRequest(
    request_id="a", input_ids=(5, 6, 7, 9), sampling=SamplingParams(max_new_tokens=40, ignore_eos=True), sample_ids=(4,)
)


def policy_of(name: str) -> Decoder:
    """Of the shape that goes with a draft; a GLM-4.5's router has a correction that matters."""
    if name != "glm":
        return random_decoder(SHAPE, 0)
    experts = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
    own = {"shared_intermediate_size": 24, "first_k_dense_replace": 1, "n_group": 3, "topk_group": 2, "attention_bias": True}
    rope = RopeConfig(partial_rotary_factor=0.5)
    policy = random_decoder(replace(SHAPE, family="glm4_moe", rope=rope, initializer_range=0.15, **experts, **own), 0)
    for tensor_name, view in policy.hf_state():
        if tensor_name.endswith(CORRECTION):
            view.copy_(torch.linspace(-0.2, 0.2, len(view)))
    return policy


def draft_of(name: str, policy: Decoder) -> DraftModel:
    if name == "eagle3":
        return Eagle3Draft.from_trunk(policy, Eagle3Config.of(SHAPE, draft_vocab_size=12), draft_ids=range(4, 16))
    if name == "distinct":
        return MtpDraft.random(MtpConfig.of(SHAPE, num_layers=3), 5)
    return MtpDraft.from_trunk(policy)


@pytest.mark.parametrize("name", ["mtp", "eagle3", "glm"])
def test_an_entry_is_its_keys_and_values(name: str):
    """What catching up by keys alone writes, bit for bit what a whole pass does; one position further on it differs."""
    policy = policy_of(name)
    draft = draft_of(name, policy)
    block, count = draft.config.block, 11
    features = torch.randn(count, draft.config.num_features, generator=torch.Generator().manual_seed(3))
    tokens, slots = torch.arange(4, 4 + count), torch.randperm(32, generator=torch.Generator().manual_seed(4))[:count] + 16
    made = []
    for shift in (None, 0, 1):
        kv = PagedKV(
            layers=1, kv_heads=block.num_key_value_heads, head_dim=block.head_dim, num_pages=2, page_size=16, dtype=torch.float32
        )  # fmt: skip
        kv.clear()
        with torch.inference_mode():
            state = draft.project(features)
            if shift is None:
                kv.begin(table_plan(slots[None], [count], [0]), slots)
                draft.step(state, tokens, torch.arange(count), kv, embed=policy.embed_tokens)
            else:
                kv.begin(None, slots)
                draft.enter(state, tokens, torch.arange(count) + shift, kv, embed=policy.embed_tokens)
        made.append(torch.stack(kv.pools[0]))
    assert made[0].count_nonzero() and torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


@pytest.mark.parametrize("name", ["mtp", "distinct", "eagle3", "glm"])
@pytest.mark.parametrize("disturbed", [False, True])
def test_served_logits_are_those_of_the_unrolled_draft(name: str, disturbed: bool, monkeypatch: pytest.MonkeyPatch):
    """Train/serve consistency: at every depth and every index of a served sequence, over refusals, retraction, new weights."""
    policy = policy_of(name)
    draft = draft_of(name, policy)
    core = EngineCore(policy, TOKENIZER, CONFIG, num_pages=64, draft=draft)
    assert core.speculator is not None
    seen: list[list[tuple[int, int, torch.Tensor]]] = []
    pick, propose = type(core.speculator.proposer)._pick, type(core.speculator.proposer).propose

    def recorded_pick(self: Any, hidden: Any, keys: Any, positions: Any, width: int) -> Any:
        out = pick(self, hidden, keys, positions, width)
        seen[-1].append((int(positions[0]), int(out[0][0]), self.model.logits(hidden, policy.head)[0].clone()))
        return out

    def recorded_propose(self: Any, sequences: Any, lengths: Any) -> Any:
        seen.append([])
        return propose(self, sequences, lengths)

    monkeypatch.setattr(type(core.speculator.proposer), "_pick", recorded_pick)
    monkeypatch.setattr(type(core.speculator.proposer), "propose", recorded_propose)
    done: list[Any] = []
    with torch.inference_mode():
        core.add(Job(REQUEST, 0, frozenset()))
        step = 0
        while core.has_work:
            if disturbed and step in (4, 9):
                core.retract_all()
            if disturbed and step == 6:
                core.speculator.forget()
            done += [delivery.item for delivery in core.step()]
            step += 1
    tokens = REQUEST.input_ids + done[0].completions[0].token_ids
    features = features_of(policy, tokens, draft)
    worst, compared, other = 0.0, 0, 0.0
    for proposals in seen:
        for depth, (position, _, logits) in enumerate(proposals, 1):
            index = position - depth - 1  # the policy's last state behind it
            drafted = [token for _, token, _ in proposals]
            stream = torch.tensor([*tokens[: index + 2], *drafted, *([0] * 4)])
            inputs = torch.stack([stream[k : k + index + 1] for k in range(1, depth + 1)])
            with torch.no_grad():
                states = draft.unroll(features[: index + 1], inputs, UnrollPlan.of([index + 1]), depth, embed=policy.embed_tokens)
                expected = draft.logits(states[-1], policy.head)
            worst = max(worst, float((expected[-1] - logits).abs().max()))
            if index:
                other = max(other, float((expected[-2] - logits).abs().max()))
            compared += 1
    assert compared > 30 and worst < 1e-5 and other > 0.1, (compared, worst, other)


def features_of(policy: Decoder, tokens: tuple[int, ...], draft: DraftModel) -> torch.Tensor:
    plan, positions = packed_plan([len(tokens)])
    taps: dict[int, torch.Tensor | None] | None = dict.fromkeys(draft.config.feature_layers) or None
    with torch.no_grad():
        hidden = policy(torch.tensor(tokens), positions, PackedKV(plan), taps=taps)
    if taps is None:
        return hidden
    return torch.cat([part for part in taps.values() if part is not None], 1)


@pytest.mark.parametrize("name", ["mtp", "eagle3"])
def test_one_transfer_brings_policy_and_draft(name: str):
    old, new = random_decoder(SHAPE, 0), random_decoder(SHAPE, 1)
    other = draft_of(name, new)
    engine = EmbeddedEngine(old, TOKENIZER, CONFIG, draft=draft_of(name, random_decoder(SHAPE, 0)))
    drafted = [("draft." + n, t) for n, t in other.named_state()]
    tensors = [*new.hf_state(), *drafted]
    manifest = make_manifest(tensors, version=1, contract_digest=old.contract.digest)
    run(engine.update_weights(manifest, tensors))
    held = dict(engine.weights())
    assert all(torch.equal(held[n], t) for n, t in tensors)
    assert engine.metrics()["spec_draft_version"] == 1
    changed = random_decoder(SHAPE, 2)
    policy_only = list(changed.hf_state())
    run(engine.update_weights(make_manifest(policy_only, version=2, contract_digest=old.contract.digest), policy_only))
    held = dict(engine.weights())
    assert all(torch.equal(held[n], t) for n, t in drafted) and engine.metrics()["spec_draft_version"] == 1
    part = [*changed.hf_state(), *drafted[1:]]
    with pytest.raises(ValueError, match=f"tensors missing: {drafted[0][0]}"):
        run(engine.update_weights(make_manifest(part, version=3, contract_digest=old.contract.digest), part))
    result = run(engine.generate(REQUEST))
    plain, _ = serve([REQUEST], CONFIG, model_seed=2)
    assert result.completions[0].token_ids == plain["a"].completions[0].token_ids
    run(engine.close())
    without = EmbeddedEngine(random_decoder(SHAPE, 0), TOKENIZER, CONFIG)
    with pytest.raises(ValueError, match=r"tensors unexpected: draft\."):
        run(without.update_weights(manifest, tensors))
    run(without.close())


@torch.inference_mode()
def test_new_draft_weights_in_the_middle_of_a_request_change_nothing_but_the_drafts():
    reference, _ = serve([REQUEST], CONFIG)
    policy = random_decoder(SHAPE, 0)
    core = EngineCore(policy, TOKENIZER, CONFIG, num_pages=64, draft=RandomDraft(24))
    assert core.speculator is not None
    core.add(Job(REQUEST, 0, frozenset()))
    done: list[Any] = []
    drafts: list[Base] = [MtpDraft.from_trunk(policy), draft_of("eagle3", policy), MtpDraft.from_trunk(policy)]
    for step in range(60):
        if step % 4 == 2 and drafts:
            core.speculator.use(drafts.pop())
        done += [delivery.item for delivery in core.step()]
    assert digest({"a": done[0]}) == digest(reference)


def save_policy(folder: Path, *, carried: bool) -> Decoder:
    policy = random_decoder(SHAPE, 0)
    save_decoder(policy, folder)
    TOKENIZER.save(folder)
    if carried:
        draft = MtpDraft.from_trunk(policy)
        write_model(folder, dict(policy.hf_state()) | dict(draft.named_state()), SHAPE.to_hf() | {"num_nextn_predict_layers": 1})
    return policy


def test_directories_name_drafts(tmp_path: Path):
    policy = save_policy(tmp_path / "policy", carried=False)
    save_draft(draft_of("eagle3", policy), tmp_path / "eagle")
    plain = load_engine(tmp_path / "policy")
    expected = run(plain.generate(REQUEST))
    run(plain.close())
    eagle = load_engine(
        tmp_path / "policy", msgspec.structs.replace(CONFIG, draft="eagle3", draft_path=str(tmp_path / "eagle"), num_pages=64)
    )
    assert run(eagle.generate(REQUEST)).completions == expected.completions
    assert eagle.metrics()["spec_num_drafted"] > 0
    run(eagle.close())
    with pytest.raises(ValueError, match="carries no MTP layers"):
        load_engine(tmp_path / "policy", msgspec.structs.replace(CONFIG, draft="mtp"))
    with pytest.raises(ValueError, match="a draft of kind 'eagle3', but draft='mtp'"):
        load_engine(tmp_path / "policy", msgspec.structs.replace(CONFIG, draft="mtp", draft_path=str(tmp_path / "eagle")))
    with pytest.raises(ValueError, match="takes the draft model as an argument"):
        EmbeddedEngine(policy, TOKENIZER, msgspec.structs.replace(CONFIG, draft="mtp"))
    save_policy(tmp_path / "whole", carried=True)
    for draft in ("mtp", "none"):
        engine = load_engine(tmp_path / "whole", msgspec.structs.replace(CONFIG, draft=draft))
        assert run(engine.generate(REQUEST)).completions == expected.completions
        assert ("spec_num_drafted" in engine.metrics()) == (draft == "mtp")
        run(engine.close())


def joint(policy: Decoder, prompt: tuple[int, ...], vocab: list[int]) -> np.ndarray:
    """p(x, y) of the next two tokens [V, V] at temperature 1, float64."""
    sequences = [(*prompt, token) for token in vocab]
    plan, positions = packed_plan([len(s) for s in sequences])
    with torch.no_grad():
        hidden = policy(torch.tensor([t for s in sequences for t in s]), positions, PackedKV(plan))
        logits = policy.logits(hidden).double().view(len(vocab), len(prompt) + 1, -1)
    first, second = torch.softmax(logits[0, -2], -1), torch.softmax(logits[:, -1], -1)
    return (first[:, None] * second).numpy()


@pytest.mark.parametrize(("draft", "tree"), [("mtp", ()), ("mtp", (2, 1)), ("random", ())])
@pytest.mark.parametrize("accept_total", [1.0, 0.03])
def test_rejection_gives_the_distribution_and_lossy_thresholds_do_not(draft: str, tree: tuple[int, ...], accept_total: float):
    policy, count = random_decoder(SHAPE, 3), 3000
    model = RandomDraft(24) if draft == "random" else MtpDraft.from_trunk(policy)
    config = EmbeddedConfig(
        num_pages=count + 8, max_running=count, max_batched_tokens=8 * count, draft_tokens=3, draft_adaptive=False,
        verification="rejection", draft_tree=tree, accept_total=accept_total, allow_lossy=accept_total < 1,
    )  # fmt: skip
    sampling = SamplingParams(max_new_tokens=4, ignore_eos=True, n=count, seed=11)
    request = GenerateRequest(request_id="a", input_ids=(5, 6, 7), sampling=sampling, sample_ids=tuple(range(count)))
    core = EngineCore(policy, TOKENIZER, config, num_pages=count + 8, draft=model)
    done: list[Any] = []
    with torch.inference_mode():
        core.add(Job(request, 0, frozenset()))
        while core.has_work:
            done += [delivery.item for delivery in core.step()]
    assert isinstance(done[0], GenerateResult)
    p = joint(policy, request.input_ids, list(range(SHAPE.vocab_size)))
    found = np.zeros_like(p)
    for c in done[0].completions:
        found[c.token_ids[0], c.token_ids[1]] += 1
        assert math.isclose(c.logprobs[0] + c.logprobs[1], math.log(p[c.token_ids[0], c.token_ids[1]]), abs_tol=1e-3)
    common = p * count >= 5
    expected = np.append(p[common], p[~common].sum()) * count
    observed = np.append(found[common], found[~common].sum())
    statistic, freedom = float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1
    limit = freedom + 5.0 * math.sqrt(2.0 * freedom) + 15.0
    assert (statistic < limit) == (accept_total == 1.0), (statistic, freedom)


def test_settings_of_verification_are_checked():
    for wrong, message in (
        ({"verification": "guess"}, "verification='guess' must be one of gumbel, rejection, greedy"),
        ({"accept_single": 0.5}, "are for verification 'rejection'"),
        ({"accept_single": 0.5, "verification": "rejection"}, "or set allow_lossy"),
        ({"accept_total": 1.5, "verification": "rejection"}, r"must lie in \(0, 1\]"),
        ({"draft": "eagle3"}, "needs draft_path"),
        ({"draft": "ngram", "draft_path": "x"}, "is for draft 'mtp' or 'eagle3'"),
        ({"draft_tree": (2, 0)}, "must be up to 15 numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            msgspec.structs.replace(CONFIG, **wrong).validate()
    policy = random_decoder(SHAPE, 0)
    with pytest.raises(ValueError, match="makes chains, not trees"):
        EngineCore(
            policy, TOKENIZER, msgspec.structs.replace(CONFIG, draft_tree=(2, 1)), num_pages=9, draft=draft_of("distinct", policy)
        )
    with pytest.raises(ValueError, match="RandomDraft makes chains only"):
        EngineCore(policy, TOKENIZER, msgspec.structs.replace(CONFIG, draft_tree=(2, 1)), num_pages=9, draft=RandomDraft(24))


@pytest.mark.parametrize("tree", [(), (3, 1, 1)])
def test_the_likeliest_tokens_beside_drafts_are_those_of_plain_decoding(tree: tuple[int, ...]):
    sampling = msgspec.structs.replace(REQUEST.sampling, n=3)
    told = msgspec.structs.replace(REQUEST, num_top_logprobs=3, sampling=sampling, sample_ids=(1, 2, 3))
    other = msgspec.structs.replace(REQUEST, request_id="b")
    plain, _ = serve([told, other], CONFIG)
    config = msgspec.structs.replace(CONFIG, draft_tree=tree, draft_tokens=5)
    drafted, metrics = serve([told, other], config, MtpDraft.from_trunk(random_decoder(SHAPE, 0)))
    assert drafted == plain and metrics["spec_num_drafted"] > 0
    assert len(plain["a"].completions[0].top_logprobs) == 40


@pytest.mark.parametrize("layers", [(0, 0, 1), (3, 1, 2)], ids=["twice", "out of order"])
def test_features_lie_in_the_order_in_which_the_draft_reads_layers(layers: tuple[int, int, int]) -> None:
    store = FeatureStore(layers, 3 * 4, 100, torch.float32, torch.device("cpu"))
    taps = store.taps()
    assert taps is not None
    for layer in sorted(taps):
        taps[layer] = torch.full((2, 4), float(layer))
    store.store(torch.tensor([70, 71]), torch.tensor([5, 6]), torch.zeros(2, 4), taps)
    assert store.values[70:72, ::4].tolist() == [[float(layer) for layer in layers]] * 2


def test_a_draft_that_finds_no_memory_is_asked_again(monkeypatch: pytest.MonkeyPatch):
    """Drafting allocates as the step's own pass does: the engine takes less at once, and the tokens stay."""
    policy, failed = random_decoder(SHAPE, 0), []
    plain, _ = serve([REQUEST], CONFIG)
    core = EngineCore(policy, TOKENIZER, CONFIG, num_pages=64, draft=MtpDraft.from_trunk(policy))
    assert core.speculator is not None
    propose = core.speculator.proposer.propose

    def starved(*arguments: Any) -> Any:
        if len(failed) < 2:
            failed.append(1)
            raise torch.OutOfMemoryError("no memory")
        return propose(*arguments)

    monkeypatch.setattr(core.speculator.proposer, "propose", starved)
    found = []
    with torch.inference_mode():
        core.add(Job(REQUEST, 0, frozenset(TOKENIZER.eos_token_ids)))
        while core.has_work:
            found += [delivery.item for delivery in core.step()]
    assert digest({"a": found[0]}) == digest(plain)
    assert core.num_oom == len(failed) == 2 and core.metrics()["spec_num_drafted"] > 0


def test_a_draft_cache_that_came_back_holds_numbers():
    """Slots that nobody has written are read beside others: memory taken again must not bring NaN into them."""
    policy = random_decoder(SHAPE, 0)
    core = EngineCore(policy, TOKENIZER, CONFIG, num_pages=64, draft=MtpDraft.from_trunk(policy))
    assert core.speculator is not None
    kv = core.speculator.proposer.kv  # type: ignore[attr-defined]
    core._kv._pool.fill_(math.nan)
    kv._pool.fill_(math.nan)
    for part in (core._kv, kv):
        part.restore()  # the memory is what it was, as it may be after `release`
    assert not kv._pool.any() and core._kv._pool.isnan().any(), "the policy's own is not cleared: its slots are written first"
