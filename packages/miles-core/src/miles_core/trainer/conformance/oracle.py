"""What one update must do, in float64: a sequence at a time, plain autograd, sharing only weights and samples with the product.

Legend: L = tokens of a sequence, H = hidden, V = vocabulary.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from miles_core.trainer.conformance.cases import Case
from miles_kernels.nn.config import DecoderConfig
from miles_rollout.wire import Sample

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Expected:
    """One update: loss and gradient norm before clipping, log p [N] before it, HF-named weights before and after. float64."""

    loss: float
    grad_norm: float
    logprob: Tensor
    gradients: Weights
    before: Weights
    after: Weights


def expected(case: Case) -> Expected:
    """The oracle's answer to a case. Raises ValueError for what it does not know (rope scaling, KL, sliding windows)."""
    config, algorithm = case.shape(), case.algorithm_config()
    if config.rope.rope_type != "default" or config.layer_types or algorithm.kl_coef or algorithm.loss != "policy":
        raise ValueError(f"case {case.name}: the oracle knows plain rope, full attention and the policy loss without KL")
    before = {name: tensor.detach().cpu().double() for name, tensor in case.decoder().hf_state()}
    weights = {name: tensor.clone().requires_grad_() for name, tensor in before.items()}
    samples = [sample for sample in case.samples() if True in sample.loss_mask]
    advantage = _advantages(case, samples)
    num_tokens = sum(sum(sample.loss_mask) for sample in samples)
    loss, logprobs = 0.0, []
    for sample, adv in zip(samples, advantage, strict=True):
        lp, entropy = token_logprobs(config, weights, sample, 1.0 if case.kind == "sft" else sample.temperature)
        logprobs.append(lp.detach())
        token_loss = -lp if case.kind == "sft" else _policy(case, sample, lp, entropy, adv)
        reduction = "token" if case.kind == "sft" else algorithm.reduction
        share = {
            "token": num_tokens,
            "sequence": len(samples) * len(lp),
            "constant": len(samples) * (algorithm.constant_tokens or 1),
        }[reduction]
        part = token_loss.sum() / share
        part.backward()
        loss += float(part.detach())
    gradients = {name: torch.zeros_like(w) if w.grad is None else w.grad for name, w in weights.items()}
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
    scale = case.grad_clip / norm if 0 < case.grad_clip < norm else 1.0
    after = {name: _adamw(case, before[name], gradients[name] * scale) for name in before}
    return Expected(loss, norm, torch.cat(logprobs), gradients, before, after)


def token_logprobs(config: DecoderConfig, weights: Weights, sample: Sample, temperature: float) -> tuple[Tensor, Tensor]:
    """log p and entropy of the trained tokens of one sequence, alone."""
    ids = torch.tensor(sample.token_ids)
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    logp = (forward(config, weights, ids) @ head.T / temperature).log_softmax(-1)
    where = [i for i, trained in enumerate(sample.loss_mask) if trained]
    rows = logp[[i - 1 for i in where]]
    return rows[range(len(where)), ids[where]], -(rows.exp() * rows).sum(-1)


def forward(config: DecoderConfig, weights: Weights, ids: Tensor) -> Tensor:
    """Hidden states [L, H] after the last norm, in the dtype of the weights: the textbook decoder."""
    x = weights["model.embed_tokens.weight"][ids]
    for index in range(config.num_hidden_layers):
        own = {name.removeprefix(f"model.layers.{index}."): w for name, w in weights.items() if f"layers.{index}." in name}
        x = x + _attend(config, own, _norm(x, own["input_layernorm.weight"], config.rms_norm_eps))
        x = x + _feed_forward(config, own, index, _norm(x, own["post_attention_layernorm.weight"], config.rms_norm_eps))
    return _norm(x, weights["model.norm.weight"], config.rms_norm_eps)


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def _attend(config: DecoderConfig, own: Weights, x: Tensor) -> Tensor:
    length, dim = x.shape[0], config.head_dim
    q, k, v = (
        F.linear(x, own[f"self_attn.{name}_proj.weight"], own.get(f"self_attn.{name}_proj.bias")).view(length, -1, dim)
        for name in "qkv"
    )
    if config.qk_norm:
        q, k = (_norm(y, own[f"self_attn.{name}_norm.weight"], config.rms_norm_eps) for name, y in (("q", q), ("k", k)))
    q, k = _rotate(config, q), _rotate(config, k)
    k, v = (y.repeat_interleave(config.num_attention_heads // config.num_key_value_heads, 1) for y in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(dim)
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    mixed = torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v).reshape(length, -1)
    return F.linear(mixed, own["self_attn.o_proj.weight"], own.get("self_attn.o_proj.bias"))


def _rotate(config: DecoderConfig, x: Tensor) -> Tensor:
    half = int(config.head_dim * config.rope.partial_rotary_factor) // 2
    frequency = config.rope.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(x.shape[0], dtype=torch.float64)[:, None] * frequency
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    a, b, rest = x.split((half, half, config.head_dim - 2 * half), -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


def _feed_forward(config: DecoderConfig, own: Weights, index: int, x: Tensor) -> Tensor:
    if not config.is_moe_layer(index):
        return _swiglu(own, "mlp", x)
    logits, correction = F.linear(x, own["mlp.gate.weight"]), own.get("mlp.gate.e_score_correction_bias")
    if correction is None:
        weight, chosen = logits.softmax(-1).topk(config.num_experts_per_tok)
    else:
        scores = logits.sigmoid()
        chosen = _grouped_choice(config, scores + correction)
        weight = scores.gather(1, chosen)
    if config.norm_topk_prob:
        weight = weight / weight.sum(-1, keepdim=True)
    weight = weight * config.routed_scaling_factor
    out = _swiglu(own, "mlp.shared_experts", x) if config.shared_intermediate_size else torch.zeros_like(x)
    for token in range(x.shape[0]):
        for share, expert in zip(weight[token], chosen[token].tolist(), strict=True):
            out[token] += share * _swiglu(own, f"mlp.experts.{expert}", x[token])
    return out


def _grouped_choice(config: DecoderConfig, judged: Tensor) -> Tensor:
    """Experts [L, k] of the largest corrected scores in the groups whose two best have the largest sum."""
    size = config.num_experts // config.n_group
    out = []
    for row in judged.tolist():
        groups = [row[first : first + size] for first in range(0, len(row), size)]
        best = sorted(range(len(groups)), key=lambda g: -sum(sorted(groups[g])[-2:]))[: config.topk_group]
        open_ = [expert for expert in range(len(row)) if expert // size in best]
        out.append(sorted(open_, key=lambda expert: -row[expert])[: config.num_experts_per_tok])
    return torch.tensor(out)


def _swiglu(own: Weights, prefix: str, x: Tensor) -> Tensor:
    gate, up = (
        F.linear(x, own[f"{prefix}.{name}_proj.weight"], own.get(f"{prefix}.{name}_proj.bias")) for name in ("gate", "up")
    )
    return F.linear(F.silu(gate) * up, own[f"{prefix}.down_proj.weight"], own.get(f"{prefix}.down_proj.bias"))


def _advantages(case: Case, samples: list[Sample]) -> list[float]:
    cfg = case.algorithm_config()
    rewards = defaultdict(list)
    for sample in samples:
        rewards[sample.group_id].append(sample.reward)
    result = []
    for sample in samples:
        group = torch.tensor(rewards[sample.group_id], dtype=torch.float64)
        value = float(sample.reward or 0.0) - (0.0 if cfg.advantage == "none" else float(group.mean()))
        if cfg.advantage == "mean_std":
            value = value / (float(group.std()) + cfg.advantage_eps) if len(group) > 1 else 0.0
        result.append(value)
    return result


def _policy(case: Case, sample: Sample, lp: Tensor, entropy: Tensor, advantage: float) -> Tensor:
    """Token losses at ratio 1: the old policy is the one being trained, so no clip is active."""
    cfg = case.algorithm_config()
    log_ratio = lp - lp.detach()
    if cfg.ratio_level == "sequence":
        log_ratio = log_ratio.mean().expand_as(lp)
    loss = -log_ratio.exp() * advantage
    if cfg.mismatch_clip is not None:
        pairs = zip(sample.rollout_logprobs, sample.loss_mask, strict=True)
        recorded = torch.tensor([value for value, trained in pairs if trained], dtype=torch.float64)
        loss = loss * (lp.detach() - recorded).exp().clamp(max=cfg.mismatch_clip)
    return loss - cfg.entropy_coef * entropy


def _adamw(case: Case, weight: Tensor, gradient: Tensor) -> Tensor:
    """The first update from zero moments: its bias-corrected means are the gradient and its square."""
    cfg = case.optimizer_config()
    decay = cfg.lr * cfg.weight_decay if weight.ndim >= 2 else 0.0
    return weight * (1 - decay) - cfg.lr * gradient / (gradient.abs() + cfg.eps)
