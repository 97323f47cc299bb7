"""Which sequences a draft learns from in a step, and what that costs beside the policy's step: counted, never timed.

A choice that followed a clock would differ from run to run and from process to process. So costs are operations of matrix
products, forward and backward, plus bytes that have to be moved however few sequences there are, at `FLOPS_PER_BYTE`. Attention
is left out on both sides, and so is a policy's recomputation, both of which make the policy dearer than it is taken for.
"""

from __future__ import annotations

from collections.abc import Sequence

from miles_kernels.nn.config import DecoderConfig
from miles_spec.models.base import DraftModel
from miles_spec.train.stream import Rollout

FLOPS_PER_BYTE = {"cpu": 8.0, "cuda": 128.0}
"""Operations in the time of moving a byte, by kind of device: an H200 makes 110 to 150 of products in bfloat16."""
_STATE_BYTES = 64
"""Of a parameter in an update: gradient, master, both moments and their temporaries, read and written in fp32."""


def policy_cost(config: DecoderConfig, num_rows: int, num_trained: int) -> float:
    """Operations of a policy's training step over so many tokens, of which `num_trained` get a log-probability."""
    hidden, dim = config.hidden_size, config.head_dim
    heads = config.num_attention_heads + config.num_key_value_heads
    layers = 0
    for index in range(config.num_hidden_layers):
        layers += 2 * hidden * heads * dim
        if not config.is_moe_layer(index):
            layers += 3 * hidden * config.intermediate_size
            continue
        inner = config.num_experts_per_tok * config.moe_intermediate_size + config.shared_intermediate_size
        layers += hidden * config.num_experts + 3 * hidden * inner
    return 6.0 * (layers * num_rows + hidden * config.vocab_size * num_trained)


class DraftCost:
    """What `depths` depths of a draft's training cost."""

    def __init__(self, draft: DraftModel, depths: int) -> None:
        block, named = draft.config.block, dict(draft.named_parameters())
        per_row = 0.0
        for name, weight in named.items():
            if weight.ndim < 2 or name == "lm_head":
                continue
            used = block.num_experts_per_tok / block.num_experts if weight.ndim == 3 else 1.0
            per_row += used * weight.numel()
        if not draft.config.recycled:  # every depth is a layer of its own
            per_row /= block.num_hidden_layers
        vocab = block.vocab_size if draft.draft_ids is None else len(draft.draft_ids)
        logits = block.hidden_size * vocab
        self.per_row = 6.0 * depths * per_row
        self.per_label = 6.0 * depths * logits
        """The draft's logits, the policy's, and the gradient of the states; a head of its own is trained as well."""
        self.per_label += 0.0 if draft.draft_ids is None else 2.0 * depths * logits
        first = next(iter(named.values()))
        moved = 3 * depths * logits * first.itemsize + _STATE_BYTES * sum(w.numel() for w in named.values())
        self.fixed = FLOPS_PER_BYTE.get(first.device.type, FLOPS_PER_BYTE["cuda"]) * moved
        """Of an update, however small."""

    def of(self, rollout: Rollout) -> float:
        """Operations of one sequence."""
        return self.per_row * rollout.num_rows + self.per_label * int(rollout.loss_mask.sum())


def choose(rollouts: Sequence[Rollout], sizes: Sequence[float], most: float, key: int) -> list[int]:
    """Numbers of the sequences whose `sizes` add up to at most `most`, at least one.

    Which ones follows from `key` and from their sample ids, in whatever order they come.
    """
    if sum(sizes) <= most:
        return list(range(len(rollouts)))
    named = (place if rollout.sample_id is None else rollout.sample_id for place, rollout in enumerate(rollouts))
    mixed = [_mixed(name, key) for name in named]
    order = sorted(range(len(rollouts)), key=lambda place: (mixed[place], place))
    chosen, used = order[:1], sizes[order[0]]
    for number in order[1:]:
        if used + sizes[number] <= most:
            chosen.append(number)
            used += sizes[number]
    return sorted(chosen)


def share_of(sample_id: int | None, place: int, count: int) -> int:
    """Which of `count` updates a sequence belongs to."""
    return ((place if sample_id is None else sample_id) * 0x9E3779B97F4A7C15 % 2**64 >> 32) % count


def _mixed(value: int, key: int) -> int:
    """64 bits that look random: splitmix64 of two numbers."""
    value = (value + key * 0x9E3779B97F4A7C15) % 2**64
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        value = (value ^ value >> shift) * factor % 2**64
    return value ^ value >> 31
