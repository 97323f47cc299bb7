"""Whole models of Qwen3 shapes: aligned against the same decoder on stock ops; prefill, decode under a CUDA graph, training step.

Legend: B = sequences, T = tokens of a step, N = pool slots.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from miles_kernels.bench.report import Row
from miles_kernels.bench.stock import BACKENDS, Compiled, Stock
from miles_kernels.bench.timing import compare
from miles_kernels.contract import Contract
from miles_kernels.cuda.attention import KVBatch
from miles_kernels.nn.config import DecoderConfig, RopeConfig
from miles_kernels.nn.decoder import Decoder, DecoderLayer, PackedKV
from miles_kernels.ops import fp8

PAGE = 64
CONTEXT = 1024
DECODES = (32, 256, 1)
PREFILLS = ((4, 4096), (1, 4096))
SLOW = 0.05
"""Seconds: a call as long as this is timed in fewer rounds; its launches are hidden already, so a CUDA graph changes nothing."""
PROFILE = "MILES_BENCH_PROFILE"
"""Environment variable: a folder for torch.profiler tables of every case."""


def _qwen3(hidden: int, inner: int, layers: int, heads: int, tied: bool) -> DecoderConfig:
    return DecoderConfig(
        family="qwen3",
        vocab_size=151936,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=tied,
        rope=RopeConfig(rope_theta=1e6),
    )


SHAPES = {"0.6B": _qwen3(1024, 3072, 28, 16, True), "8B": _qwen3(4096, 12288, 36, 32, False)}
TRAIN = {"0.6B": (4, 4096), "8B": (2, 4096)}
SMALL_TRAIN = {"0.6B": (4, 4096), "8B": (1, 4096)}
"""For less than 100 GB of memory."""


def rows() -> Iterator[Row]:
    """Both shapes."""
    for name in SHAPES:
        yield from rows_of(name)


def rows_small() -> Iterator[Row]:
    """Qwen3-0.6B."""
    return rows_of("0.6B")


def rows_large() -> Iterator[Row]:
    """Qwen3-8B."""
    return rows_of("8B")


def random_model(config: DecoderConfig) -> Decoder:
    """A decoder made on the device: normal(0, 0.02) matrices, norms near 1."""
    contract = Contract.for_device("cuda", "bfloat16")
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            decoder = Decoder(config, contract, dtype=torch.bfloat16, device="cuda")
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.normal_(1.0, 0.02) if parameter.ndim == 1 else parameter.normal_(0.0, 0.02)
    return decoder


def in_fp8(decoder: Decoder, call: Callable[[], object]) -> Callable[[], object]:
    """`call` with the blocks' products in float8: an engine's frozen copies without gradient, quantised afresh with one."""
    layers = [layer for layer in decoder.layers if isinstance(layer, DecoderLayer)]
    stores = [fp8.Store() for _ in layers]
    for store, layer in zip(stores, layers, strict=True):
        if not torch.is_grad_enabled():
            store.freeze(layer.quantized_weights())

    def run() -> object:
        for store, layer in zip(stores, layers, strict=True):
            layer.quantized = store
        try:
            return call()
        finally:
            for layer in layers:
                layer.quantized = None

    return run


class BenchKV:
    """Pools [Hkv, N, D] of all layers, and where the current step reads and writes."""

    def __init__(self, config: DecoderConfig, slots: int, plan: KVBatch, at: Tensor) -> None:
        shape = (config.num_hidden_layers, 2, config.num_key_value_heads, slots, config.head_dim)
        self.pool = torch.randn(shape, device="cuda", dtype=torch.bfloat16)
        self.plan, self.slots = plan, at

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Not reached on CUDA."""
        raise AssertionError("the kernels write to `target`")

    def target(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pools and slots."""
        return self.pool[layer, 0], self.pool[layer, 1], self.slots


@dataclass(frozen=True)
class Case:
    """One step: its competitors, and the work no implementation avoids."""

    name: str
    calls: dict[str, Callable[[], object]]
    flops: float
    num_bytes: float
    graph: bool


def rows_of(name: str) -> Iterator[Row]:
    """Every case of one shape, each with competitors in turn: decode steps, the training step, prefill."""
    torch.cuda.empty_cache()
    decoder = random_model(SHAPES[name])
    shared: Compiled = {}
    stocks = {label: Stock(decoder, label, shared) for label in BACKENDS}
    with torch.no_grad():
        for batch in DECODES:
            yield from _measure(name, _decode(decoder, stocks, batch), (True,))
    roomy = torch.cuda.get_device_properties(0).total_memory > 100e9
    yield from _measure(name, _train(decoder, stocks, *(TRAIN if roomy else SMALL_TRAIN)[name]), (False,))
    with torch.no_grad():
        for batch, length in PREFILLS:
            yield from _measure(name, _prefill(decoder, stocks, batch, length), (False, True))


def _measure(shape: str, case: Case, graphs: tuple[bool, ...]) -> Iterator[Row]:
    """One row for eager execution and one under a CUDA graph, as asked; none under a graph where all calls are slow."""
    torch.cuda.empty_cache()
    began = time.perf_counter()
    for call in case.calls.values():
        call()
    torch.cuda.synchronize()
    ready = time.perf_counter() - began
    host, whole = {}, {}
    for label, call in case.calls.items():
        began = time.perf_counter()
        call()
        host[label] = time.perf_counter() - began
        torch.cuda.synchronize()
        whole[label] = time.perf_counter() - began
    slow = min(whole.values()) > SLOW
    for graph in graphs:
        if graph and slow and len(graphs) > 1:
            continue
        row = _row(shape, case, graph, 3 if slow else 5)
        if not graph:
            row.notes.update({f"{label}: host us": seconds * 1e6 for label, seconds in host.items()})
        row.notes["first calls, s"] = ready
        yield row


def _row(shape: str, case: Case, graph: bool, rounds: int) -> Row:
    """Time the competitors, which have run before."""
    name = f"{shape} {case.name}{', CUDA graph' if graph else ', eager'}"
    _profile(name, case)
    calls = {label: [call] for label, call in case.calls.items()}
    found = {label: timing.seconds for label, timing in compare(calls, graph=graph, rounds=rounds).items()}
    notes: dict[str, float | str] = {"fp8 / bf16": found["aligned fp8"] / found["aligned"]}
    return Row("whole model", name, found, case.flops, case.num_bytes, notes=notes)


def _profile(name: str, case: Case) -> None:
    folder = os.environ.get(PROFILE)
    if not folder:
        return
    from torch.profiler import ProfilerActivity, profile

    for label in ("aligned", "default"):
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
            case.calls[label]()
            torch.cuda.synchronize()
        table = seen.key_averages().table(sort_by="self_cuda_time_total", row_limit=28, max_name_column_width=70)
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / f"{name} {label}.txt".replace(" ", "_").replace(",", "")).write_text(table)


def _work(config: DecoderConfig, tokens: int, logits: int, pairs: float) -> float:
    """FLOPs of a forward: products of `tokens`, output scores of `logits` rows, attention over `pairs` (query, key)."""
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    layer = config.hidden_size * (2 * queries + 2 * keys + 3 * config.intermediate_size)
    products = 2.0 * tokens * layer * config.num_hidden_layers + 2.0 * logits * config.hidden_size * config.vocab_size
    return products + 4.0 * pairs * queries * config.num_hidden_layers


def _weights(decoder: Decoder) -> float:
    unread = 0 if decoder.lm_head is None else decoder.embed_tokens.numel()
    return 2.0 * (sum(p.numel() for p in decoder.parameters()) - unread)


def _cache(decoder: Decoder, batch: int, length: int, store: BenchKV) -> list[tuple[Tensor, Tensor]]:
    """Contiguous keys and values [B, S, Hkv, D] per layer, in the memory of `store`: only one of them is used at a time."""
    config = decoder.config
    pool = store.pool.view(config.num_hidden_layers, 2, batch, length, config.num_key_value_heads, config.head_dim)
    return [(layer[0], layer[1]) for layer in pool]


def _calls(
    decoder: Decoder, stocks: dict[str, Stock], tokens: Tensor, positions: Tensor, plan: KVBatch, slots: Tensor, context: int
) -> dict[str, Callable[[], object]]:
    """One engine step of tokens[B, L] at positions[L] with a context of `context` keys each, up to the scores."""
    batch, length = tokens.shape
    store = BenchKV(decoder.config, batch * context, plan, slots)
    flat, places = tokens.reshape(-1), positions.repeat(batch)
    last = torch.arange(1, batch + 1, device="cuda") * length - 1

    def aligned() -> Tensor:
        hidden = decoder(flat, places, store)
        return decoder.logits(hidden if length == 1 else hidden.index_select(0, last))

    cache = _cache(decoder, batch, context, store)
    calls: dict[str, Callable[[], object]] = {"aligned": aligned, "aligned fp8": in_fp8(decoder, aligned)}
    for label, stock in stocks.items():
        calls[label] = partial(stock.logits, tokens, positions, cache)
    return calls


def _prefill(decoder: Decoder, stocks: dict[str, Stock], batch: int, length: int) -> Case:
    tokens = torch.randint(decoder.config.vocab_size, (batch, length), device="cuda")
    pages = length // PAGE
    table = torch.randperm(batch * pages, device="cuda", dtype=torch.int32).view(batch, pages)
    slots = (table.long()[:, :, None] * PAGE + torch.arange(PAGE, device="cuda")).view(-1)
    plan = KVBatch.paged([length] * batch, [length] * batch, table, PAGE)
    calls = _calls(decoder, stocks, tokens, torch.arange(length, device="cuda"), plan, slots, length)
    work = _work(decoder.config, batch * length, batch, batch * length * length / 2)
    return Case(f"prefill {batch} x {length}", calls, work, _weights(decoder), False)


def _decode(decoder: Decoder, stocks: dict[str, Stock], batch: int) -> Case:
    config = decoder.config
    tokens = torch.randint(config.vocab_size, (batch, 1), device="cuda")
    pages = CONTEXT // PAGE
    table = torch.randperm(batch * pages, device="cuda", dtype=torch.int32).view(batch, pages)
    slots = table[:, -1].long() * PAGE + PAGE - 1
    plan = KVBatch.paged([1] * batch, [CONTEXT] * batch, table, PAGE)
    calls = _calls(decoder, stocks, tokens, torch.tensor([CONTEXT - 1], device="cuda"), plan, slots, CONTEXT)
    kv = 4.0 * batch * CONTEXT * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    return Case(f"decode {batch} x {CONTEXT}", calls, _work(config, batch, batch, batch * CONTEXT), _weights(decoder) + kv, True)


def _train(decoder: Decoder, stocks: dict[str, Stock], batch: int, length: int) -> Case:
    """Forward, log-probabilities of all tokens, backward of their mean into fresh gradients."""
    tokens = torch.randint(decoder.config.vocab_size, (batch, length), device="cuda")
    positions = torch.arange(length, device="cuda")
    targets = tokens.view(-1).roll(-1)
    plan = KVBatch.packed([length] * batch)
    flat, places = tokens.view(-1), positions.repeat(batch)

    def step(forward: Callable[..., Tensor], *args: Tensor) -> None:
        for parameter in decoder.parameters():
            parameter.grad = None
        (-forward(*args).mean()).backward()  # type: ignore[no-untyped-call]

    def aligned() -> Tensor:
        return decoder.logprob(decoder(flat, places, PackedKV(plan)), targets, entropy=False).logprob  # type: ignore[arg-type]

    calls: dict[str, Callable[[], object]] = {
        "aligned": partial(step, aligned),
        "aligned fp8": in_fp8(decoder, partial(step, aligned)),
    }
    for label, stock in stocks.items():
        calls[label] = partial(step, stock.logprob, tokens, positions, targets)
    work = 3 * _work(decoder.config, batch * length, batch * length, batch * length * length / 2)
    return Case(f"training step {batch} x {length}", calls, work, 0.0, False)
