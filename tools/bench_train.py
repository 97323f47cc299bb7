"""Training steps of the `fsdp` backend on one GPU against the same model in plain torch.

tools/bench_train.py [--shapes 0.6B,4B] [--tokens 16384] [--steps 5] [--out FILE]

Both sides see the same tokens and use the same AdamW (float32 sums and moments); the rival is written here with F.linear
(cuBLAS), F.rms_norm and SDPA's flash kernel, in bfloat16, and runs in whichever way is fastest for it: all logits at once or
slices that are recomputed in the backward, blocks as written or compiled by Inductor (--rival). Steps of the two alternate
where both fit, else one runs after the other on the same card. Prints a table and, with --out, the same as JSON:
tokens/s of both, ratio, MFU of ours, peak memory, and the largest single block the allocator gave out in our step.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.trainer.batch import SftExample, TrainBatch
from miles_core.trainer.config import OptimizerConfig, TrainerConfig
from miles_core.trainer.fsdp import FsdpTrainer
from miles_core.trainer.optim import AdamW, global_norm
from miles_kernels.contract import Contract
from miles_kernels.nn.config import DecoderConfig
from miles_kernels.nn.decoder import Decoder
from miles_rollout.wire import Sample

PEAK_FLOPS = 989e12  # dense bfloat16 of an H100 or H200 SXM
HOW = ("whole", "compiled", "sliced")
"""Ways of the rival."""
SHAPES: dict[str, dict[str, Any]] = {
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
}


def shape_of(name: str) -> DecoderConfig:
    """A Qwen3 shape."""
    return DecoderConfig(
        family="qwen3",
        vocab_size=151936,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40960,
        tie_word_embeddings=True,
        **SHAPES[name],
    )


def random_weights(config: DecoderConfig) -> Decoder:
    """Weights drawn on the GPU: quick, and the values do not matter here."""
    decoder = Decoder(config, Contract.for_device("cuda", "bfloat16"), dtype=torch.bfloat16, device="cuda")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(0.0, 0.02)
    return decoder


class Rival(nn.Module):
    """Qwen3 in plain torch over equally long sequences [B, L]."""

    def __init__(self, config: DecoderConfig, recompute: bool, device: str = "cuda") -> None:
        super().__init__()
        self.config, self.recompute = config, recompute
        self.compiled = torch.compile(self.run, dynamic=False)
        h, d = config.hidden_size, config.head_dim
        q, kv, inner = config.num_attention_heads * d, config.num_key_value_heads * d, config.intermediate_size

        def weight(*size: int) -> nn.Parameter:
            drawn = torch.empty(size, device=device, dtype=torch.bfloat16)
            return nn.Parameter(drawn.fill_(1.0) if len(size) == 1 else drawn.normal_(0.0, 0.02))

        self.embed, self.norm = weight(config.vocab_size, h), weight(h)
        self.blocks = nn.ModuleList(
            nn.ParameterDict(
                {
                    "norm1": weight(h), "qkv": weight(q + 2 * kv, h), "q_norm": weight(d), "k_norm": weight(d), "o": weight(h, q),
                    "norm2": weight(h), "gate_up": weight(2 * inner, h), "down": weight(h, inner),
                }
            )
            for _ in range(config.num_hidden_layers)
        )  # fmt: skip

    def block(self, w: dict[str, Tensor], x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        c, eps = self.config, self.config.rms_norm_eps
        batch, length, _ = x.shape
        qkv = F.linear(F.rms_norm(x, x.shape[-1:], w["norm1"], eps), w["qkv"]).view(batch, length, -1, c.head_dim)
        q, k, v = qkv.split((c.num_attention_heads, c.num_key_value_heads, c.num_key_value_heads), 2)
        q = rotate(F.rms_norm(q, (c.head_dim,), w["q_norm"], eps), cos, sin).transpose(1, 2)
        k = rotate(F.rms_norm(k, (c.head_dim,), w["k_norm"], eps), cos, sin).transpose(1, 2)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(q, k, v.transpose(1, 2), is_causal=True, enable_gqa=True)
        x = x + F.linear(out.transpose(1, 2).reshape(batch, length, -1), w["o"])
        gate, up = F.linear(F.rms_norm(x, x.shape[-1:], w["norm2"], eps), w["gate_up"]).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, w["down"])

    def run(self, w: dict[str, Tensor], x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return checkpoint(self.block, w, x, cos, sin, use_reentrant=False) if self.recompute else self.block(w, x, cos, sin)

    def forward(self, ids: Tensor, keep: slice, how: str) -> Tensor:
        """log p of the tokens ids[:, keep], flat; `how` is one of HOW."""
        run = self.compiled if how == "compiled" else self.run
        length, half = ids.shape[1], self.config.head_dim // 2
        angle = torch.arange(length, device=ids.device)[:, None] * 1e4 ** (-torch.arange(half, device=ids.device) / half)
        cos, sin = (t.bfloat16()[:, None] for t in (angle.cos(), angle.sin()))
        x = F.embedding(ids, self.embed)
        for weights in self.blocks:
            x = run(dict(weights.items()), x, cos, sin)
        x = F.rms_norm(x, x.shape[-1:], self.norm, self.config.rms_norm_eps)
        rows, targets = x[:, :-1][:, keep].reshape(-1, x.shape[-1]), ids[:, 1:][:, keep].reshape(-1)
        if how != "sliced":
            return -F.cross_entropy(F.linear(rows, self.embed).float(), targets, reduction="none")

        def score(part: Tensor, target: Tensor) -> Tensor:
            return -F.cross_entropy(F.linear(part, self.embed).float(), target, reduction="none")

        pairs = zip(rows.split(2048), targets.split(2048), strict=True)
        return torch.cat([checkpoint(score, part, target, use_reentrant=False) for part, target in pairs])


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def flops(config: DecoderConfig, batch: int, length: int, scored: int) -> float:
    """Forward and backward of a step, recomputation not counted."""
    h, d, heads = config.hidden_size, config.head_dim, config.num_attention_heads
    per_layer = h * d * (2 * heads + 2 * config.num_key_value_heads) + 3 * h * config.intermediate_size
    products = 2.0 * batch * length * per_layer * config.num_hidden_layers
    attention = 4.0 * batch * length * length / 2 * heads * d * config.num_hidden_layers
    return 3 * (products + attention + 2.0 * scored * h * config.vocab_size)


def make_batch(kind: str, tokens: int, vocab: int, device: str = "cuda") -> tuple[TrainBatch, Tensor, slice]:
    """SFT: one sequence, all of it imitated. RL: eight completions of three quarters of a sequence each."""
    generator = torch.Generator().manual_seed(1)
    count = 1 if kind == "sft" else 8
    ids = torch.randint(0, vocab, (count, tokens // count), generator=generator)
    length, prompt = ids.shape[1], 1 if kind == "sft" else ids.shape[1] // 4
    mask = (*(False for _ in range(prompt)), *(True for _ in range(length - prompt)))
    if kind == "sft":
        return TrainBatch.from_sft([SftExample(tuple(ids[0].tolist()), mask)]), ids.to(device), slice(0, None)
    samples = [
        Sample(
            sample_id=i, group_id=0, prompt_id="p", token_ids=tuple(row.tolist()), loss_mask=mask,
            rollout_logprobs=tuple(-12.0 if m else 0.0 for m in mask), temperature=1.0, reward=float(i % 3), reward_status="ok",
        )
        for i, row in enumerate(ids)
    ]  # fmt: skip
    return TrainBatch.from_groups(samples, AlgorithmConfig()), ids.to(device), slice(prompt - 1, None)


def rival_step(model: Rival, optimizer: AdamW, kind: str, ids: Tensor, keep: slice, advantage: Tensor, how: str) -> None:
    logprob = model(ids, keep, how)
    if kind == "sft":
        loss = -logprob.mean()
    else:
        ratio = (logprob - logprob.detach()).exp()
        loss = torch.maximum(-ratio * advantage, -ratio.clamp(0.8, 1.2) * advantage).mean()
    loss.backward()
    optimizer.collect()
    gradients = optimizer.gradients()
    norm = float(global_norm(gradients))
    if norm > 1.0:
        torch._foreach_mul_(gradients, 1.0 / norm)
    optimizer.step(gradients)
    optimizer.clear()


def timed(step: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def allocated_blocks(step: Callable[[], object]) -> list[int]:
    """Bytes of every block the allocator gave out during a step, from its own trace. Memory it kept is given back first."""
    free()
    torch.cuda.memory._record_memory_history(max_entries=200_000, stacks="python", context=None)
    try:
        step()
        torch.cuda.synchronize()
        trace = torch.cuda.memory._snapshot()["device_traces"][torch.cuda.current_device()]
    finally:
        torch.cuda.memory._record_memory_history(enabled=None)
    sizes = [entry["size"] for entry in trace if entry["action"] == "alloc"]
    assert sizes, "the allocator's trace is empty"
    return sizes


def free() -> None:
    gc.collect()  # hooks on parameters and their optimizer know each other
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def measure(name: str, kind: str, tokens: int, steps: int, ways: Sequence[str]) -> dict[str, Any]:
    """One row of the table. Small models are alive at once and their steps alternate, large ones come one after the other."""
    config = shape_of(name)
    big = name == "4B"
    small_card = torch.cuda.get_device_properties(0).total_memory < 100e9
    master: Literal["float32", "stochastic"] = "stochastic" if big and small_card else "float32"
    batch, ids, keep = make_batch(kind, tokens, config.vocab_size)
    row: dict[str, Any] = {"shape": name, "kind": kind, "tokens": tokens, "recompute": big, "master": master}
    row["logits_bytes"] = batch.num_tokens * config.vocab_size * 2
    torch.compiler.reset()  # compiled code keeps the model it was made from
    free()
    settings = TrainerConfig(max_tokens_per_microbatch=tokens, recompute=big, master=master)
    trainer = FsdpTrainer(random_weights(config), AlgorithmConfig(), settings, OptimizerConfig(lr=1e-6))
    ours = partial(trainer.step, batch)
    ours()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    row["largest_block_bytes"] = max(allocated_blocks(ours))
    row["peak_bytes"] = torch.cuda.max_memory_allocated()
    print({"ours": name, "kind": kind, "first_s": timed(ours), "peak_GiB": row["peak_bytes"] / 2**30}, flush=True)
    own = [timed(ours) for _ in range(steps)] if big else []
    if big:
        del trainer, ours
        free()
    advantage = torch.ones((), device="cuda") if batch.advantage is None else batch.advantage.cuda()
    torch.manual_seed(0)
    rival = Rival(config, recompute=big)
    optimizer = AdamW(list(rival.named_parameters()), OptimizerConfig(lr=1e-6), stochastic=master == "stochastic")
    theirs: dict[str, list[float]] = {}
    for how in ways:
        step = partial(rival_step, rival, optimizer, kind, ids, keep, advantage, how)
        try:
            for _ in range(1 if big else 2):
                step()
            found = []
            for _ in range(steps):
                if not big:
                    own.append(timed(ours))
                found.append(timed(step))
            theirs[how] = found
            row[f"rival_{how}_tokens_per_s"] = tokens / median(found)
            print({how: median(found), "ours": median(own)}, flush=True)
        except torch.OutOfMemoryError:
            optimizer.clear()
            row[f"rival_{how}"] = "out of memory"
        except RuntimeError as error:  # a compiler that is not there
            optimizer.clear()
            row[f"rival_{how}"] = str(error)[:200]
        free()
    row["tokens_per_s"] = tokens / median(own)
    row["ratio"] = min(median(found) for found in theirs.values()) / median(own)
    work = flops(config, len(ids), ids.shape[1], batch.num_tokens) / PEAK_FLOPS
    row["mfu"], row["rival_mfu"] = work / median(own), work / min(median(found) for found in theirs.values())
    return row


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default="0.6B,4B")
    parser.add_argument("--kinds", default="sft,rl")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rival", default=",".join(HOW), help="ways of the rival to try, of " + ", ".join(HOW))
    parser.add_argument("--out")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here: this measures one; see tools/compare_trl.py for the CPU")
    print(torch.cuda.get_device_name(0), "torch", torch.__version__, flush=True)
    rows: list[dict[str, Any]] = []
    for name in options.shapes.split(","):
        for kind in options.kinds.split(","):
            try:
                rows.append(measure(name, kind, options.tokens, options.steps, options.rival.split(",")))
                print(
                    {k: round(v, 4) if isinstance(v, float) and math.isfinite(v) else v for k, v in rows[-1].items()}, flush=True
                )
            except Exception:
                traceback.print_exc()
                free()
            if options.out:
                with open(options.out, "w", encoding="utf-8") as file:
                    json.dump({"device": torch.cuda.get_device_name(0), "torch": torch.__version__, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
