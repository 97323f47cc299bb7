"""`nn.Decoder` itself under every schedule, in full precision and float8: what engines and trainers run."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from miles_kernels.contract import Contract
from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.config import MOE_FAMILIES, DecoderConfig, RopeConfig
from miles_kernels.nn.decoder import Decoder, DecoderLayer, PackedKV
from miles_kernels.verify.backends import Backend, Step
from miles_kernels.verify.blocks import Record, Shape
from miles_kernels.verify.model_axes import ModelCase, verify_model
from miles_kernels.verify.result import Row, Tally

CASES = ("llama", "qwen3", "qwen3 window", "qwen3_moe", "glm4_moe", "qwen3 fp8", "qwen3_moe fp8")
ROUNDS = 3
Pools = list[tuple[Tensor, Tensor]]


class _Cache:
    """Pools [Hkv, N, D] per layer with the slots and the plan of one step."""

    def __init__(self, plan: Any, pools: Pools, slots: Tensor) -> None:
        self.plan, self.pools, self.slots = plan, pools, slots

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        for pool, new in zip(self.pools[layer], (k, v), strict=True):
            pool[:, self.slots] = new.transpose(0, 1)
        return self.pools[layer]

    def target(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        return *self.pools[layer], self.slots


class RealDecoder:
    """A random decoder behind the interface of `Blocks`."""

    def __init__(
        self, size: Shape, dtype: torch.dtype, device: str, *, precision: str = "full", window: int | None = None, seed: int = 0
    ) -> None:
        self.size, self.device = size, device
        name = str(dtype).removeprefix("torch.")
        self.decoder = random_decoder(
            _config(size, window), seed, contract=Contract.for_device(device, name, precision), dtype=dtype, device=device
        )
        for layer in self.decoder.layers:
            if isinstance(layer, DecoderLayer) and layer.router_bias is not None:  # zeros would leave its part untested
                layer.router_bias.copy_(torch.linspace(-0.3, 0.3, size.experts))

    @property
    def head(self) -> Tensor:
        """The output projection [V, hidden]."""
        return self.decoder.head

    def pools(self, slots: int) -> Pools:
        """Empty key and value pools [Hkv, N, D] per layer."""
        s = self.size
        zeros = torch.zeros((s.layers, 2, s.kv_heads, slots, s.dim), dtype=self.decoder.embed_tokens.dtype, device=self.device)
        return [(layer[0], layer[1]) for layer in zeros]

    def forward(self, ops: Backend, tokens: Tensor, step: Step, pools: Pools | None, record: Record | None = None) -> Tensor:
        """Hidden states [T, hidden]; `ops` and `record` belong to the interface and are not used."""
        plan = _plan(step, self.device)
        kv = PackedKV(plan) if pools is None else _Cache(plan, pools, step.slots().to(self.device))
        return self.decoder(tokens, step.positions().to(self.device), kv)


_GLM: dict[str, Any] = {
    "rope": RopeConfig(partial_rotary_factor=0.5),
    "attention_bias": True,
    "use_qk_norm": True,
    "first_k_dense_replace": 1,
    "shared_intermediate_size": 128,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
}


def _config(s: Shape, window: int | None) -> DecoderConfig:
    kinds = tuple("sliding_attention" if i % 2 == 0 else "full_attention" for i in range(s.layers))
    experts: dict[str, Any] = {
        "num_experts": s.experts,
        "num_experts_per_tok": s.top_k,
        "moe_intermediate_size": s.inner,
        "norm_topk_prob": True,
    }
    return DecoderConfig(
        family=s.family,  # type: ignore[arg-type]
        vocab_size=s.vocab,
        hidden_size=s.hidden,
        intermediate_size=s.inner,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads,
        head_dim=s.dim,
        initializer_range=0.05,
        sliding_window=window,
        layer_types=kinds if window else (),
        **(experts if s.family in MOE_FAMILIES else {}),
        **(_GLM if s.family == "glm4_moe" else {}),
    )


def _plan(step: Step, device: str) -> Any:
    if device == "cuda":
        from miles_kernels.cuda.attention import KVBatch

        if step.table is None:
            return KVBatch.packed(list(step.q_lens), device)
        table = step.table.to(device, torch.int32)
        return KVBatch.paged(list(step.q_lens), list(step.kv_lens), table, step.page_size)
    from miles_kernels.ops.attention import packed_plan, table_plan

    if step.table is None:
        return packed_plan(list(step.q_lens))[0]
    firsts = [total - count for count, total in zip(step.q_lens, step.kv_lens, strict=True)]
    return table_plan(step.slot_table(), list(step.q_lens), firsts)


def verify_decoder(ops: Backend, size: Shape, dtype: torch.dtype, lengths: list[int], name: str, seed: int) -> Iterator[Row]:
    """Schedules without gradient; then the training forward against them, and its gradients run to run and recomputed."""
    model = RealDecoder(
        size,
        dtype,
        ops.device,
        precision="fp8" if name.endswith("fp8") else "full",
        window=100 if name.endswith("window") else None,
        seed=seed,
    )
    case = ModelCase(ops, size, dtype, lengths, seed, model=model, subject=f"decoder {name}")
    yield from verify_model(case)
    for axis, check in ((14, _training_forward), (15, _gradients)):
        start = time.perf_counter()
        tally = Tally()
        check(case, model.decoder, tally)
        yield tally.row(case.subject, axis, time.perf_counter() - start)


def _train(case: ModelCase, decoder: Decoder) -> tuple[Tensor, Tensor, list[Tensor]]:
    """(hidden, log-probability, gradients of all weights) of one packed training step over all sequences."""
    step = Step(tuple(case.lengths), tuple(case.lengths))
    hidden = decoder(torch.cat(case.tokens), step.positions().to(case.backend.device), PackedKV(_plan(step, case.backend.device)))
    out = decoder.logprob(hidden, torch.cat(case.targets), 0.8)
    assert out.entropy is not None
    loss = out.logprob.mean() + 0.1 * out.entropy.mean()
    grads = torch.autograd.grad(loss, list(decoder.parameters()))
    return hidden.detach(), out.logprob.detach(), list(grads)


def _training_forward(case: ModelCase, decoder: Decoder, tally: Tally) -> None:
    hidden, logprob, _ = _train(case, decoder)
    for kind, got in enumerate((hidden, logprob)):
        want = torch.cat([pair[kind] for pair in case.alone])
        tally.add(f"training forward, {('hidden', 'logprob')[kind]}", got, want)


def _gradients(case: ModelCase, decoder: Decoder, tally: Tally) -> None:
    first = _train(case, decoder)[2]
    for round_ in range(1, ROUNDS):
        tally.add(f"gradients, run {round_ + 1}", _train(case, decoder)[2], first)
    decoder.gradient_checkpointing = True
    try:
        tally.add("gradients with recomputed layers", _train(case, decoder)[2], first)
    finally:
        decoder.gradient_checkpointing = False
