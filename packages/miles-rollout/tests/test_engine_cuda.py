"""The embedded engine on a GPU: graphs, overlap, schedules and the trainer's forward give the same bits."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
import torch
from engine_cases import staged

from miles_kernels.contract import Contract
from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.config import DecoderConfig, RopeConfig
from miles_kernels.nn.decoder import CORRECTION, Decoder, PackedKV
from miles_rollout.engines.embedded import EmbeddedConfig
from miles_rollout.engines.embedded.core import EngineCore
from miles_rollout.engines.embedded.state import Job
from miles_rollout.text import CharTokenizer
from miles_rollout.wire import GenerateRequest, GenerateResult, SamplingParams

pytestmark = pytest.mark.gpu

COMMON: dict[str, Any] = {
    "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 2048, "initializer_range": 0.1,
}  # fmt: skip
DENSE = DecoderConfig(family="qwen3", **COMMON)
MOE = DecoderConfig(family="qwen3_moe", num_experts=16, num_experts_per_tok=4, moe_intermediate_size=128, **COMMON)
GLM = DecoderConfig(
    family="glm4_moe", num_experts=16, num_experts_per_tok=4, moe_intermediate_size=128, shared_intermediate_size=128, n_group=4,
    topk_group=2, norm_topk_prob=True, routed_scaling_factor=1.5, first_k_dense_replace=1, attention_bias=True, use_qk_norm=True,
    rope=RopeConfig(partial_rotary_factor=0.5), **COMMON,
)  # fmt: skip
CONFIG = EmbeddedConfig(
    page_size=16, num_pages=600, max_running=48, max_batched_tokens=512, prefill_chunk=96, record_routed_experts=True
)
EAGER = msgspec.structs.replace(CONFIG, cuda_graphs=False, overlap=False)


def make(shape: DecoderConfig, seed: int = 0) -> Decoder:
    contract = Contract.for_device("cuda", "bfloat16")
    made = random_decoder(shape, seed, contract=contract, dtype=torch.bfloat16, device="cuda").requires_grad_(False)
    for name, view in made.hf_state():
        if name.endswith(CORRECTION):  # zeros would leave a part of the router untested
            view.copy_(torch.linspace(-0.2, 0.2, len(view)))
    return made


def requests(count: int, seed: int, *, plain: bool = False) -> list[GenerateRequest]:
    rng = random.Random(seed)
    common = tuple(rng.randrange(2048) for _ in range(64))
    made = []
    for i in range(count):
        ids = common[: rng.choice([0, 16, 48, 64])] + tuple(rng.randrange(2048) for _ in range(rng.randint(1, 200)))
        n = rng.choice([1, 1, 3])
        sampling = SamplingParams(
            temperature=rng.choice([1.0, 0.7, 0.0, 1.3]),
            top_k=-1 if plain else rng.choice([-1, -1, -1, 20]),
            max_new_tokens=rng.choice([1, 2, 30, 60, 120]),
            min_new_tokens=0 if plain else rng.choice([0, 0, 0, 1]),
            stop_token_ids=tuple(rng.randrange(2048) for _ in range(20)) if rng.random() < 0.3 else (),
            seed=rng.randrange(2**40),
            n=n,
        )
        made.append(
            GenerateRequest(
                request_id=f"r{i}",
                input_ids=ids,
                sampling=sampling,
                sample_ids=tuple(rng.randrange(2**50) for _ in range(n)),
                return_routed_experts=rng.random() < 0.3,
            )
        )
    return made


@torch.inference_mode()
def serve(
    decoder: Decoder, config: EmbeddedConfig, asked: list[GenerateRequest], seed: int = 0, rate: float = 0.5
) -> dict[str, GenerateResult]:
    """Serve requests that arrive at random steps, rate / (1 - rate) a step; everything must be given back."""
    rng = random.Random(seed)
    core = EngineCore(decoder, CharTokenizer("abc"), config, num_pages=config.num_pages or 0)
    waiting = [Job(request, i, frozenset((2,))) for i, request in enumerate(asked)]
    rng.shuffle(waiting)
    done: dict[str, GenerateResult] = {}
    while waiting or core.has_work:
        while waiting and (not core.has_work or rng.random() < rate):
            core.add(waiting.pop())
        for delivery in core.step():
            assert isinstance(delivery.item, GenerateResult), delivery.item
            done[delivery.item.request_id] = delivery.item
    assert core.metrics()["kv_used_ratio"] == 0 and core.metrics()["num_running"] == 0
    return done


def outcome(result: GenerateResult) -> Any:
    return result.completions


@pytest.mark.parametrize("shape", [DENSE, MOE, GLM], ids=["dense", "moe", "glm"])
def test_graphs_and_overlap_give_the_bits_of_the_eager_engine(shape: DecoderConfig):
    decoder = make(shape)
    asked = requests(40, 1)
    eager = serve(decoder, EAGER, asked, 1)
    for config in (
        CONFIG,
        msgspec.structs.replace(CONFIG, overlap=False, page_size=64, num_pages=150),
        msgspec.structs.replace(CONFIG, cuda_graphs=False),
        msgspec.structs.replace(CONFIG, max_running=7, num_pages=80, prefix_cache=False),
        msgspec.structs.replace(CONFIG, draft="ngram"),
    ):
        found = serve(decoder, config, asked, 5)
        assert found.keys() == eager.keys()
        for name, result in eager.items():
            assert outcome(found[name]) == outcome(result), (config, name)


@pytest.mark.parametrize("shape", [DENSE, MOE, GLM], ids=["dense", "moe", "glm"])
@pytest.mark.parametrize("rows", [48, 256])
@torch.inference_mode()
def test_every_token_has_the_trainers_bits(shape: DecoderConfig, rows: int):
    """One packed forward over all sequences, as a trainer does it, against tokens of graphs, chunks and cached prefixes."""
    from miles_kernels.cuda.attention import KVBatch

    decoder = make(shape, 3)
    asked = requests(rows * 3 // 2, 9, plain=True)
    config = msgspec.structs.replace(CONFIG, max_running=rows, num_pages=30 * rows, max_batched_tokens=max(512, 2 * rows))
    found = serve(decoder, config, asked, rate=0.95)
    pairs = [(request, completion) for request in asked for completion in found[request.request_id].completions]
    ids = [request.input_ids + completion.token_ids for request, completion in pairs]
    lengths = [len(sequence) for sequence in ids]
    flat = torch.tensor([token for sequence in ids for token in sequence], device="cuda")
    positions = torch.cat([torch.arange(length, device="cuda") for length in lengths])
    routed: dict[int, torch.Tensor] = {}
    hidden = decoder(flat, positions, PackedKV(KVBatch.packed(lengths)), routed=routed)  # type: ignore[arg-type]
    starts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
    source, heat, expected = [], [], []
    for (request, completion), start in zip(pairs, starts.tolist(), strict=True):
        first = start + len(request.input_ids) - 1
        source += range(first, first + len(completion.token_ids))
        heat += [request.sampling.temperature or 1.0] * len(completion.token_ids)
        expected += completion.logprobs
    at = torch.tensor(source, device="cuda")
    out = decoder.logprob(hidden[at], flat[at + 1], torch.tensor(heat, device="cuda"), entropy=False)
    unequal = int((out.logprob != torch.tensor(expected, device="cuda")).sum())
    assert unequal == 0 and len(expected) > 1000, f"{unequal} of {len(expected)}"
    print(f"{shape.family} {rows} rows: {len(expected)} tokens equal")
    by_layer = torch.stack([routed[layer] for layer in sorted(routed)], 1).cpu().to(torch.uint8) if routed else None
    noted = 0
    for (_, completion), start, length in zip(pairs, starts.tolist(), lengths, strict=True):
        if completion.routed_experts is not None and by_layer is not None:
            experts = torch.frombuffer(bytearray(completion.routed_experts.data), dtype=torch.uint8)
            assert torch.equal(by_layer[start : start + length - 1].flatten(), experts)
            noted += 1
    assert (noted > 0) == bool(shape.num_experts)


def test_the_comparison_can_fail():
    decoder, other = make(DENSE), make(DENSE)
    with torch.no_grad():
        other.layers[1].down_proj[0, 0] += 0.5  # type: ignore[index,union-attr]
    asked = requests(10, 3)
    first, second = serve(decoder, CONFIG, asked), serve(other, CONFIG, asked)
    assert any(outcome(first[name]) != outcome(second[name]) for name in first)


@torch.inference_mode()
def test_memory_can_be_given_back_and_graphs_are_made_again():
    decoder = make(DENSE)
    asked = requests(12, 4)
    expected = serve(decoder, EAGER, asked)
    core = EngineCore(decoder, CharTokenizer("abc"), CONFIG, num_pages=600)

    def all_of() -> dict[str, Any]:
        for i, request in enumerate(asked):
            core.add(Job(request, i, frozenset((2,))))
        items = []
        while core.has_work:
            items += [delivery.item for delivery in core.step()]
        return {item.request_id: outcome(item) for item in items}

    whole = {name: outcome(result) for name, result in expected.items()}
    assert all_of() == whole
    saved = {name: view.clone() for name, view in decoder.hf_state()}
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    core.release(("weights", "kv_cache", "cuda_graph"))
    assert torch.cuda.memory_allocated() < before - sum(p.numel() for p in decoder.parameters())
    core.restore(("kv_cache",))
    core.restore(("weights", "cuda_graph"))
    assert not core.has_work
    core.swap_weights(staged(saved.items(), "cuda"), 1)
    spans = all_of()
    assert {name: [c.token_ids for c in found] for name, found in spans.items()} == {
        name: [c.token_ids for c in found] for name, found in whole.items()
    }
