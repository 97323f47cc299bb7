"""How many weights a decoder has, group by group; exact, and compared with the module on the meta device in the tests."""

from __future__ import annotations

from dataclasses import dataclass, replace

from miles_kernels.nn.config import DecoderConfig
from miles_spec.models.config import dense_twin

_DIVIDED = ("num_attention_heads", "num_key_value_heads", "intermediate_size", "shared_intermediate_size")
_SHARDS = 8  # stretches that sums over ranks are made of, whatever the number of ranks


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of weights. Example: count_parameters(find_shape("qwen3-8b")).total == 8_190_735_360"""

    embedding: int
    """The token embedding."""
    head: int
    """The output projection; 0 when it is the embedding."""
    dense: int
    """Attention, dense feed-forward, shared experts, routers and norms of all layers, and the final norm."""
    experts: int
    """Experts that tokens choose, of all layers."""
    largest_layer: int
    """The layer with the most weights, its experts included: what one gather of a sharded model brings in."""
    largest_layer_experts: int
    """The experts' part of `largest_layer`."""

    @property
    def total(self) -> int:
        """All weights."""
        return self.embedding + self.head + self.dense + self.experts


def count_parameters(shape: DecoderConfig) -> Parameters:
    """Count the weights of `shape`, norms and biases included."""
    layers = [_layer(shape, index) for index in range(shape.num_hidden_layers)]
    matrix = shape.vocab_size * shape.hidden_size
    dense, experts = max(layers, key=sum)
    return Parameters(
        embedding=matrix,
        head=0 if shape.tie_word_embeddings else matrix,
        dense=sum(dense for dense, _ in layers) + shape.hidden_size,
        experts=sum(experts for _, experts in layers),
        largest_layer=dense + experts,
        largest_layer_experts=experts,
    )


def count_rank(shape: DecoderConfig, ranks: int) -> int:
    """Weights that one of `ranks` processes of an engine holds: tables, norms and routers whole, of the rest its part."""
    if ranks == 1:
        return count_parameters(shape).total
    parts = {name: max(1, getattr(shape, name) // ranks) for name in _DIVIDED if getattr(shape, name)}
    found = count_parameters(replace(shape, **parts))
    return found.total - found.experts + found.experts // ranks


def engine_ranks(shape: DecoderConfig) -> list[int]:
    """Over how many GPUs, more than one, our engine can divide this shape; `miles_kernels.nn.parallel` is what divides it."""
    sparse = all(shape.is_moe_layer(layer) for layer in range(shape.num_hidden_layers))
    sizes = {name: getattr(shape, name) for name in _DIVIDED if not (name == "intermediate_size" and sparse)}
    depths = [shape.num_attention_heads * shape.head_dim, sizes.get("intermediate_size", 0), shape.shared_intermediate_size]
    if shape.output_bias or shape.mlp_bias or any(depth % (16 * _SHARDS) for depth in depths):
        return []
    heads = sizes.pop("num_key_value_heads")
    able = [ranks for ranks in (2, 4, 8) if not any(size % ranks for size in (*sizes.values(), shape.num_experts))]
    return [ranks for ranks in able if not (heads % ranks and ranks % heads)]


def count_draft(shape: DecoderConfig, kind: str) -> int:
    """Weights of a draft made for a policy of `shape`: "mtp", "eagle3", or "none". Raises ValueError for another kind."""
    hidden, last = shape.hidden_size, shape.num_hidden_layers - 1
    if kind == "none":
        return 0
    if kind == "mtp":
        return sum(_layer(shape, last)) + 2 * hidden * hidden + 3 * hidden
    if kind != "eagle3":
        raise ValueError(f'draft {kind!r}: the plan knows "none", "mtp" and "eagle3"')
    shape = dense_twin(shape)
    projected = (shape.num_attention_heads + 2 * shape.num_key_value_heads) * shape.head_dim
    return sum(_layer(shape, last)) + hidden * (projected + 3 * hidden + 2 + shape.vocab_size)


def _layer(shape: DecoderConfig, index: int) -> tuple[int, int]:
    """(weights outside the experts, weights of the experts) of one layer."""
    hidden, dim = shape.hidden_size, shape.head_dim
    queries, projected = shape.num_attention_heads * dim, (shape.num_attention_heads + 2 * shape.num_key_value_heads) * dim
    dense = hidden * (projected + queries) + 2 * hidden
    dense += projected * shape.attention_bias + hidden * shape.output_bias + 2 * dim * shape.qk_norm
    if shape.is_moe_layer(index):
        dense += (shape.num_experts + 3 * shape.shared_intermediate_size) * hidden
        return dense, shape.num_experts * 3 * hidden * shape.moe_intermediate_size
    inner = shape.intermediate_size
    return dense + 3 * hidden * inner + (2 * inner + hidden) * shape.mlp_bias, 0
