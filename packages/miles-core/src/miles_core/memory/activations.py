"""Bytes that one token costs in the forward pass: kept for the backward pass, and at work inside one layer.

The terms are the tensors that the ops on CUDA save, each storage once. A test counts what autograd keeps and compares.
"""

from __future__ import annotations

from miles_kernels.nn.config import DecoderConfig


def kept_per_token(shape: DecoderConfig, size: int, *, recompute: bool) -> int:
    """Bytes kept per token from forward to backward, all layers and the end, for numbers of `size` bytes.

    With `recompute` a layer keeps what it was given, the residual stream and what the layer before adds to it.
    """
    layers = range(shape.num_hidden_layers)
    ends = 2 * shape.hidden_size * size + 16  # the last sum and the final norm's result; ids, positions, statistics
    return sum(2 * shape.hidden_size * size if recompute else layer_kept_per_token(shape, i, size) for i in layers) + ends


def layer_kept_per_token(shape: DecoderConfig, index: int, size: int) -> int:
    """Bytes one layer keeps per token."""
    hidden, dim, heads, kv_heads = shape.hidden_size, shape.head_dim, shape.num_attention_heads, shape.num_key_value_heads
    stream = 2 * hidden  # the two sums that the norms keep
    normed = 2 * hidden  # what the norms give to the projections
    qkv = (heads + 2 * kv_heads) * dim
    turned = (heads + kv_heads) * dim
    attended = heads * dim
    total = (stream + normed + qkv + turned + attended) * size + 4 * heads
    if not shape.is_moe_layer(index):
        return total + 3 * shape.intermediate_size * size
    chosen = shape.num_experts_per_tok
    rows = chosen * (2 * hidden + 3 * shape.moe_intermediate_size) * size  # permuted input, both halves, product, output
    shared = 3 * shape.shared_intermediate_size * size
    return total + rows + shared + 4 * shape.num_experts + 28 * chosen  # scores, and the places of the copies


def layer_peak_per_token(shape: DecoderConfig, size: int, *, recompute: bool) -> int:
    """Bytes per token of the layer at work beyond what is kept: its gradients, and with `recompute` its own activations."""
    hidden, dim = shape.hidden_size, shape.head_dim
    qkv = (shape.num_attention_heads + 2 * shape.num_key_value_heads) * dim
    last = shape.num_hidden_layers - 1
    visited = shape.num_experts_per_tok * shape.moe_intermediate_size + shape.shared_intermediate_size
    inner = visited if shape.is_moe_layer(last) else shape.intermediate_size
    gradients = max(3 * inner, qkv + 2 * shape.num_attention_heads * dim) + 3 * hidden
    again = max(layer_kept_per_token(shape, i, size) for i in {0, last}) if recompute else 0
    return gradients * size + again
