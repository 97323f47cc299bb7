"""The parity matrix: every schedule of an engine and a trainer gives the same bits; with torch's own ops it does not."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.decoder import Decoder, DecoderLayer, KVStore
from miles_kernels.ops.attention import AttentionPlan
from miles_kernels.ops.logprob import LogprobOutput
from miles_kernels.parity import Workload, compare, run_packed, schedules, tiny_config
from miles_kernels.probe import threads

FAMILIES = ("llama", "qwen3", "qwen3_moe")
DTYPES = ("float32", "bfloat16")
SCHEDULES = {
    "packed",
    "packed, split",
    "packed, shared prompts",
    "packed, shared, split",
    "decode, batch 64",
    "decode, batch 17, page 1",
    "decode, batch 1",
    "decode from first token",
    "chunks of 7",
    "chunks of 16, page 64",
    "chunks of 100",
    "cached prefix, batch 64",
    "cached prefix, batch 13, page 4",
    "random mixture",
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_schedule_gives_the_same_bits(family, dtype):
    """In a process of its own: how idle threads wait is decided when torch loads."""
    seed = os.environ.get("MILES_TEST_SEED", str(secrets.randbits(31)))
    command = ["parity", "--family", family, "--dtype", dtype, "--seed", seed, "--threads", "1,2", "--json"]
    done = subprocess.run([sys.executable, "-m", "miles_kernels.cli", *command], capture_output=True, text=True, timeout=280)
    assert done.returncode in (0, 1), done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {(row["schedule"], row["num_threads"]) for row in rows} == {(name, n) for name in SCHEDULES for n in (1, 2)}
    unequal = [row for row in rows if row["unequal_logprob"] or row["unequal_hidden"] or row["max_abs"]]
    assert not unequal, f"seed {seed}: {unequal}"
    assert done.returncode == 0
    assert sum(row["num_tokens"] for row in rows) > 10_000


class PlainDecoder:
    """The negative control: the same weights and the same schedules through torch.nn.functional."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.config = decoder, decoder.config
        self.parameters = decoder.parameters

    def __call__(self, token_ids: Tensor, positions: Tensor, kv: KVStore) -> Tensor:
        config = self.config
        x = F.embedding(token_ids, self.decoder.embed_tokens)
        angles = positions[:, None].float() / config.rope.rope_theta ** (torch.arange(0, config.head_dim, 2) / config.head_dim)
        cos, sin = (f(torch.cat((angles, angles), 1))[:, None].to(x.dtype) for f in (torch.cos, torch.sin))
        for layer in self.decoder.layers:
            x = x + self._attend(layer, F.rms_norm(x, (x.shape[1],), layer.input_norm, config.rms_norm_eps), cos, sin, kv)
            normed = F.rms_norm(x, (x.shape[1],), layer.post_norm, config.rms_norm_eps)
            x = x + (self._experts(layer, normed) if layer.is_moe else _swiglu(normed, layer.gate_up_proj, layer.down_proj))
        return F.rms_norm(x, (x.shape[1],), self.decoder.norm, config.rms_norm_eps)

    def _attend(self, layer: DecoderLayer, x: Tensor, cos: Tensor, sin: Tensor, kv: KVStore) -> Tensor:
        c = self.config
        sizes = (c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads)
        q, k, v = F.linear(x, layer.qkv_proj).view(len(x), -1, c.head_dim).split(sizes, 1)
        if c.qk_norm:
            q = F.rms_norm(q, (c.head_dim,), layer.q_norm, c.rms_norm_eps)
            k = F.rms_norm(k, (c.head_dim,), layer.k_norm, c.rms_norm_eps)
        q, k = (t * cos + torch.cat((-t.chunk(2, -1)[1], t.chunk(2, -1)[0]), -1) * sin for t in (q, k))
        k_pool, v_pool = kv.update(layer.index, k, v)
        return F.linear(_sdpa(q, k_pool, v_pool, kv.plan).flatten(1), layer.o_proj)

    def _experts(self, layer: DecoderLayer, x: Tensor) -> Tensor:
        weights, ids = F.softmax(F.linear(x, layer.router).float(), -1).topk(self.config.num_experts_per_tok)
        weights = (weights / weights.sum(-1, keepdim=True)).to(x.dtype)
        out = torch.zeros_like(x)
        for expert in range(self.config.num_experts):
            token, slot = torch.where(ids == expert)
            part = _swiglu(x[token], layer.expert_gate_up_proj[expert], layer.expert_down_proj[expert])
            out = out.index_add(0, token, part * weights[token, slot, None])
        return out

    def logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.decoder.head).float()

    def logprob(self, hidden: Tensor, targets: Tensor, temperature: float | Tensor = 1.0) -> LogprobOutput:
        scaled = self.logits(hidden) / torch.as_tensor(temperature).view(-1, 1)
        return LogprobOutput(F.log_softmax(scaled, -1).gather(1, targets[:, None])[:, 0], None)


def _swiglu(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, down)


def _sdpa(q: Tensor, k_pool: Tensor, v_pool: Tensor, plan: AttentionPlan) -> Tensor:
    out = torch.zeros_like(q)
    for bucket in plan.buckets:
        used = bucket.q_index >= 0
        queries = q[bucket.q_index.clamp(min=0)].transpose(1, 2)
        k, v = (pool[:, bucket.kv_index].transpose(0, 1) for pool in (k_pool, v_pool))
        mask = torch.arange(k.shape[2]) <= bucket.q_pos.clamp(min=0)[:, None, :, None]
        part = F.scaled_dot_product_attention(queries, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)
        out = out.index_put((bucket.q_index[used],), part[used])
    return out


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_torchs_own_ops_do_not(family, dtype):
    decoder = random_decoder(tiny_config(family), 7, dtype=getattr(torch, dtype))
    plain = PlainDecoder(decoder)
    work = Workload.random(decoder.config.vocab_size, 7, groups=4)
    alone = range(len(work.tokens))
    with threads(1):
        yardstick = run_packed(plain, work, alone, per_forward=1, share_prompts=False)
        ours = run_packed(decoder, work, alone, per_forward=1, share_prompts=False)
        assert (yardstick.logprob - ours.logprob).abs().median() < (1e-4 if dtype == "float32" else 0.2)  # the same model
        rows = {name: compare(schedules(plain, work, 1)[name](), yardstick, name, 1) for name in CONTROL}
    for name, row in rows.items():
        assert row.unequal_hidden > 0.1 * row.num_tokens, name
        assert row.unequal_logprob > 0.1 * row.num_tokens, name


CONTROL = ("packed", "packed, shared prompts", "decode, batch 64", "chunks of 16, page 64", "cached prefix, batch 64")
