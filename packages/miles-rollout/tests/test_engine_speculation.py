"""Speculation in the embedded engine: the output is that of plain decoding, bit for bit, whatever is drafted."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from engine_cases import SMALL, ask, build, run, staged
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_kernels.nn.checkpoint import random_decoder
from miles_rollout.engines.embedded import EmbeddedConfig
from miles_rollout.engines.embedded.core import EngineCore
from miles_rollout.engines.embedded.drafts import Accepted, Drafts, gather, gather_trees, match
from miles_rollout.engines.embedded.speculate import Speculator
from miles_rollout.engines.embedded.speculate_check import (
    SHAPE,
    TOKENIZER,
    digest,
    random_arms,
    random_requests,
    run_arm,
    sequences_of,
    serve,
    verify_lossless,
)
from miles_rollout.engines.embedded.state import Job
from miles_rollout.wire import GenerateChunk, GenerateRequest, GenerateResult, SamplingParams
from miles_spec.testing import RandomDraft, ReplayDraft

PLAIN = EmbeddedConfig(num_pages=200, max_running=32, max_batched_tokens=512)
FIXED = msgspec.structs.replace(PLAIN, draft_tokens=5, draft_adaptive=False)


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 2**32))
def test_any_draft_length_control_and_engine_size_gives_the_plain_output(seed: int):
    rng = random.Random(seed)
    requests = random_requests(rng, 6)
    reference, _ = serve(requests, PLAIN)
    arms = random_arms(rng)
    for _ in range(3):
        arm = next(arms)
        results, metrics = run_arm(arm, requests, reference, seed)
        assert digest(results) == digest(reference), (seed, arm)
        assert metrics["num_running"] == metrics["kv_used_ratio"] == 0
        assert metrics["num_generated_tokens"] == sum(len(c.token_ids) for r in reference.values() for c in r.completions)


def test_without_the_c_kernels_too(monkeypatch: pytest.MonkeyPatch):
    import miles_rollout.engines.embedded.runner as runner

    requests = random_requests(random.Random(5), 12)
    reference, _ = serve(requests, PLAIN)
    monkeypatch.setattr(runner.FusedForward, "refusal", staticmethod(lambda decoder: "a test"))
    results, metrics = serve(requests, FIXED, ReplayDraft(sequences_of(requests, reference), SHAPE.vocab_size, 0.3))
    assert digest(results) == digest(reference)
    assert metrics["spec_num_accepted"] > 10


def too_many(drafts: Drafts, drawn: np.ndarray, num_rows: int, extra: int) -> Accepted:
    """A wrong rule for chains: `extra` tokens more than agree."""
    counts = np.zeros(num_rows, np.int64)
    counts[: len(drafts.counts)] = drafts.counts
    found = match(drafts, drawn, num_rows)
    return found._replace(counts=np.minimum(found.counts + extra, counts), nodes=None)


@pytest.mark.parametrize("extra", [1, 99])
def test_a_lossy_acceptance_rule_is_noticed(monkeypatch: pytest.MonkeyPatch, extra: int):
    """Negative control: keep all of the block, or one token too many."""
    monkeypatch.setattr(Speculator, "accept", lambda self, drafts, drawn, rows: too_many(drafts, drawn, rows, extra))
    requests = random_requests(random.Random(1), 6)
    reference, _ = serve(requests, PLAIN)
    results, _ = serve(requests, FIXED, RandomDraft(SHAPE.vocab_size))
    assert digest(results) != digest(reference)


def test_verify_lossless_reports_and_notices(monkeypatch: pytest.MonkeyPatch):
    good = verify_lossless(1500, seed=3, arms_per_round=3)
    assert good.num_tokens >= 1500 and good.num_different == 0 and good.num_drafted > 0
    monkeypatch.setattr(Speculator, "accept", lambda self, drafts, drawn, rows: too_many(drafts, drawn, rows, 99))
    bad = verify_lossless(1500, seed=3, arms_per_round=3)
    assert bad.num_different > 0 and len(bad.differing) == bad.num_different


def test_a_perfect_draft_commits_whole_blocks_and_is_counted():
    request = GenerateRequest(
        request_id="a", input_ids=(5, 6, 7), sampling=SamplingParams(max_new_tokens=31, ignore_eos=True), sample_ids=(3,)
    )
    reference, plain = serve([request], PLAIN)
    results, metrics = serve([request], FIXED, ReplayDraft(sequences_of([request], reference)))
    assert digest(results) == digest(reference)
    # 1 token after the prompt, then blocks of 5 + 1
    assert plain["num_steps"] == 31 and metrics["num_steps"] == 6
    assert (metrics["spec_num_verified"], metrics["spec_num_drafted"], metrics["spec_num_accepted"]) == (5, 25, 25)
    assert metrics["spec_accept_length"] == 6.0 and metrics["spec_accept_rate_at_4"] == 1.0


def test_stop_rules_hold_inside_an_accepted_block():
    free = GenerateRequest(request_id="a", input_ids=(5, 6, 7), sampling=SamplingParams(max_new_tokens=40, ignore_eos=True))
    whole, _ = serve([free], PLAIN)
    known = ReplayDraft(sequences_of([free], whole))
    tokens, text = whole["a"].completions[0].token_ids, whole["a"].completions[0].text
    cases: list[dict[str, Any]] = [{"max_new_tokens": most} for most in range(1, 15)]
    cases += [{"stop_token_ids": (token,)} for token in set(tokens)]
    cases += [{"stop": (text[i : i + 2],)} for i in range(0, 20, 3)]
    cases += [{"stop_token_ids": tuple(range(4, 15)), "min_new_tokens": 9}]
    requests = [
        msgspec.structs.replace(
            free, request_id=f"c{i}", sampling=msgspec.structs.replace(free.sampling, **case), sample_ids=(0,)
        )
        for i, case in enumerate(cases)
    ]
    reference, _ = serve(requests, PLAIN)
    results, metrics = serve(requests, msgspec.structs.replace(FIXED, draft_tokens=8), known)
    assert metrics["spec_num_accepted"] > 100
    for name, result in reference.items():
        assert results[name] == result, name


def drive(config: EmbeddedConfig, request: GenerateRequest, draft: Any, steps: int, *, stream: bool = False) -> Any:
    """An engine core some steps into one request."""
    core = EngineCore(random_decoder(SHAPE, 0), TOKENIZER, config, num_pages=64, draft=draft)
    core.add(Job(request, 0, frozenset((2,)), stream))
    items = [delivery.item for _ in range(steps) for delivery in core.step()]
    return core, items


@torch.inference_mode()
def test_weights_swapped_in_the_middle_of_a_request():
    """What is sampled afterwards is what plain decoding under the new weights makes of everything before."""
    new = staged(random_decoder(SHAPE, 9).hf_state())
    request = GenerateRequest(
        request_id="a", input_ids=(5, 6, 7), sampling=SamplingParams(max_new_tokens=60, ignore_eos=True), sample_ids=(4,)
    )
    before, _ = serve([request], PLAIN)
    draft = ReplayDraft(sequences_of([request], before), SHAPE.vocab_size, 0.2)
    core, _ = drive(FIXED, request, draft, 7)
    core.swap_weights(new, 1)
    done: list[Any] = []
    while core.has_work:
        done += [delivery.item for delivery in core.step()]
    completion = done[0].completions[0]
    old_span, new_span = completion.weight_spans
    assert old_span.version == 0 and 8 < old_span.stop < 50 and new_span.version == 1 and new_span.stop == 60
    assert completion.token_ids[: old_span.stop] == before["a"].completions[0].token_ids[: old_span.stop]
    assert completion.logprobs[: old_span.stop] == before["a"].completions[0].logprobs[: old_span.stop]
    rest = msgspec.structs.replace(
        request,
        input_ids=request.input_ids + completion.token_ids[: old_span.stop],
        sampling=msgspec.structs.replace(request.sampling, max_new_tokens=60 - old_span.stop),
    )
    after, _ = serve([rest], PLAIN, model_seed=9)
    assert completion.token_ids[old_span.stop :] == after["a"].completions[0].token_ids
    assert completion.logprobs[old_span.stop :] == after["a"].completions[0].logprobs


@torch.inference_mode()
def test_an_aborted_request_holds_a_prefix_and_leaves_nothing_behind():
    request = GenerateRequest(
        request_id="a", input_ids=(5, 6, 7), sampling=SamplingParams(max_new_tokens=60, ignore_eos=True, n=2), sample_ids=(4, 5)
    )
    reference, _ = serve([request], PLAIN)
    core, _ = drive(FIXED, request, RandomDraft(SHAPE.vocab_size), 6)
    (delivery,) = core.abort("a")
    assert isinstance(delivery.item, GenerateResult)
    for mine, whole in zip(delivery.item.completions, reference["a"].completions, strict=True):
        assert mine.finish_reason == "abort" and len(mine.token_ids) >= 6
        assert mine.token_ids == whole.token_ids[: len(mine.token_ids)]
        assert mine.logprobs == whole.logprobs[: len(mine.token_ids)]
    assert not core.has_work and core.metrics()["kv_used_ratio"] == 0
    assert not core._tables.slots.any() and not core._tables.capacity.any()


@torch.inference_mode()
def test_streams_bring_every_token_once():
    request = GenerateRequest(
        request_id="a",
        input_ids=(5, 6, 7),
        sampling=SamplingParams(max_new_tokens=30, stop=("ab", "j"), n=3),
        sample_ids=(1, 2, 3),
    )
    reference, _ = serve([request], PLAIN)
    core, items = drive(FIXED, request, ReplayDraft(sequences_of([request], reference)), 40, stream=True)
    assert not core.has_work
    for completion in reference["a"].completions:
        chunks = [item for item in items if isinstance(item, GenerateChunk) and item.index == completion.index]
        assert tuple(t for c in chunks for t in c.token_ids) == completion.token_ids
        assert tuple(x for c in chunks for x in c.logprobs) == completion.logprobs
        assert "".join(c.text for c in chunks) == completion.text


def test_a_draft_outside_the_vocabulary_is_refused_with_its_name():
    class Broken(RandomDraft):
        def propose(self, max_tokens: int) -> tuple[int, ...]:
            return (SHAPE.vocab_size,) * max_tokens

    request = GenerateRequest(request_id="a", input_ids=(5,), sampling=SamplingParams(max_new_tokens=9, ignore_eos=True))
    with pytest.raises(ValueError, match="Broken proposed .* at most 5 tokens of 0..23"):
        serve([request], FIXED, Broken(24))


def test_settings_name_a_draft_and_its_metrics_come_out():
    engine = build(msgspec.structs.replace(SMALL, draft="ngram", draft_adaptive=False))
    plain = build()
    request = ask("a", (5, 6, 7) * 8, max_new_tokens=60, temperature=0.5)
    assert run(engine.generate(request)).completions == run(plain.generate(request)).completions
    assert engine.metrics()["spec_num_drafted"] > 0 and "spec_num_drafted" not in plain.metrics()
    run(engine.close())
    run(plain.close())
    for wrong, message in (({"draft": "mpt"}, "draft='mpt' must be one of"), ({"draft_tokens": 16}, "must lie in 1..15")):
        with pytest.raises(ValueError, match=message):
            msgspec.structs.replace(SMALL, **wrong).validate()


ROWS = st.lists(st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 5)), max_size=6), min_size=1, max_size=6)


@given(ROWS, st.randoms(use_true_random=False), st.booleans())
def test_spread_and_match_equal_a_loop(rows: list[list[tuple[int, int]]], rng: random.Random, chains: bool):
    tokens = [tuple(token for token, _ in row) for row in rows]
    parents = [tuple(node - 1 if chains else min(parent, node - 1) for node, (_, parent) in enumerate(row)) for row in rows]
    drafts = gather(tokens) if chains else gather_trees(zip(tokens, parents, strict=True))
    if drafts is None:
        assert not any(tokens)
        return
    count = len(rows) + 1  # and one row without drafts
    spread = drafts.spread(np.arange(100, 100 + count))
    drawn = np.array([rng.randrange(4) for _ in spread.rows])
    accepted = match(drafts, drawn, count)
    start = 0
    for row, (mine, above) in enumerate(zip([*tokens, ()], [*parents, ()], strict=True)):
        depths = [0]
        for parent in above:
            depths.append(depths[parent + 1] + 1)
        stop = start + len(mine) + 1
        assert spread.rows[start:stop].tolist() == [100 + row] * (len(mine) + 1)
        assert spread.place[start:stop].tolist() == list(range(len(mine) + 1))
        assert spread.depth[start:stop].tolist() == depths
        path, at = [], -1
        while True:
            following = [n for n, parent in enumerate(above) if parent == at and mine[n] == drawn[start + at + 1]]
            if not following:
                break
            at = following[0]
            path.append(at)
        assert accepted.counts[row] == len(path)
        assert accepted.index[: len(path) + 1, row].tolist() == [start, *(start + node + 1 for node in path)]
        assert chains == (accepted.nodes is None)
        if accepted.nodes is not None:
            assert [n for n in accepted.nodes[row].tolist() if n >= 0] == path
        start = stop
