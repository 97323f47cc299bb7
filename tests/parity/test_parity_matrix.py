"""The parity matrix: every schedule of an engine and a trainer gives the same bits; with torch's own ops it does not."""

from __future__ import annotations

import dataclasses
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
from miles_kernels.ops.logprob import LogprobOutput, logprob_from_logits
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


CONTROL = ("packed, shared prompts", "decode, batch 64", "decode from first token", "random mixture")


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
            q_norm, k_norm = layer.qk_norm.view(2, -1)
            q = F.rms_norm(q, (c.head_dim,), q_norm, c.rms_norm_eps)
            k = F.rms_norm(k, (c.head_dim,), k_norm, c.rms_norm_eps)
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
        return logprob_from_logits(self.logits(hidden).detach(), targets, temperature)  # only the model is plain


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
    """Same weights, tokens and schedules; only the ops differ. Wider than the matrix: bf16 rounds small differences away."""
    wide = {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 64, "num_hidden_layers": 4}
    config = dataclasses.replace(tiny_config(family), **wide)
    decoder = random_decoder(config, 7, dtype=getattr(torch, dtype))
    work = Workload.random(config.vocab_size, 7, groups=2, group_size=6)
    models = {"ours": decoder, "plain": PlainDecoder(decoder)}
    with threads(1):
        alone = {name: run_packed(m, work, range(12), per_forward=1, share_prompts=False) for name, m in models.items()}
        rows = {
            name: [compare(schedules(m, work, 1)[schedule](), alone[name], schedule, 1) for schedule in CONTROL]
            for name, m in models.items()
        }
    apart = (alone["ours"].logprob - alone["plain"].logprob).abs().median()
    assert apart < (1e-4 if dtype == "float32" else 0.2)  # both are the same model
    assert all(row.equal for row in rows["ours"])
    assert sum(row.unequal_hidden for row in rows["plain"]) > 0
    assert sum(row.unequal_logprob for row in rows["plain"]) > 10
    assert max(row.max_abs for row in rows["plain"]) > (1e-6 if dtype == "float32" else 1e-3)
