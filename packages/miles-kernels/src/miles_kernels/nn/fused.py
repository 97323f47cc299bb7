"""The decoder's forward over a paged cache in one C call: the bits of `Decoder.forward` without its hundred small calls.

Legend: T = tokens of the pass, N = rows whose logits are wanted, W = width of the slot table, V = vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from ctypes import Structure, pointer
from typing import TypeVar

import torch
from torch import Tensor

from miles_kernels.native import library
from miles_kernels.native.gemm import disagreement, gemm_depth
from miles_kernels.native.library import Layer, Model, Pass
from miles_kernels.nn.decoder import Decoder, DecoderLayer
from miles_kernels.ops.attention import NATIVE_DIM

S = TypeVar("S", bound=Structure)

MAX_TOKENS = 256
"""Larger passes are left to the BLAS, whose products are then the faster ones."""
PANEL = 16


class FusedForward:
    """A decoder bound to the pools of its cache. Weights are read where they lie: updates in place are seen, new storage is not.

    Example:
        if FusedForward.refusal(decoder) is None:
            fused = FusedForward(decoder, pools)
            hidden, logits = fused(token_ids, positions, slots, table, table_rows)
    """

    def __init__(self, decoder: Decoder, pools: Sequence[tuple[Tensor, Tensor]]) -> None:
        """`pools`: keys and values [Hkv, slots, D] of each layer, all with the same strides and contiguous rows."""
        kernels = library()
        reason = self.refusal(decoder)
        if kernels is None or reason is not None:
            raise ValueError(f"no fused forward: {reason}")
        self._kernels, self._decoder = kernels, decoder
        self._kept: list[object] = list(pools)
        config, (keys, _) = decoder.config, pools[0]
        self._queries = config.num_attention_heads * config.head_dim
        self._widest = max(self._queries + 2 * config.num_key_value_heads * config.head_dim, 2 * config.intermediate_size)
        self._deepest = max(config.hidden_size, self._queries, config.intermediate_size)
        layers = (Layer * config.num_hidden_layers)()
        for bound, layer, pair in zip(layers, _layers(decoder), pools, strict=True):
            _bind_layer(bound, layer, pair)
        self._kept.append(layers)
        self._model = Model(
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            dim=config.head_dim,
            inner=config.intermediate_size,
            vocab=config.vocab_size,
            num_layers=config.num_hidden_layers,
            depth=gemm_depth(),
            head_stride=keys.stride(0),
            slot_stride=keys.stride(1),
            eps=config.rms_norm_eps,
            scale=config.head_dim**-0.5,
            embedding=decoder.embed_tokens.data_ptr(),
            norm=decoder.norm.data_ptr(),
            head=decoder.head.data_ptr(),
            layers=layers,
        )
        self._pass = Pass(model=pointer(self._model))
        self._scratch: list[Tensor] = []
        self._room_for = (0, 0, 0)

    @staticmethod
    def refusal(decoder: Decoder) -> str | None:
        """Why this decoder cannot be fused here, in words; None when it can. Tries the product on one weight of each shape."""
        if library() is None:
            return "there are no C kernels in this process"
        config = decoder.config
        if any(layer.row_parallel is not None for layer in _layers(decoder)):
            return "its sums run over several ranks"
        if any(layer.is_moe for layer in _layers(decoder)):
            return "it has mixture-of-experts layers"
        if config.rotary_dim < config.head_dim:
            return "it rotates a part of each head only"
        if decoder.contract.dtype != "float32" or decoder.embed_tokens.device.type != "cpu":
            return f"it computes in {decoder.contract.dtype} on {decoder.embed_tokens.device}, not float32 on the CPU"
        if decoder.contract.precision != "full":
            return "its contract asks for float8 products"
        if decoder.contract.matmul != "native":
            return "its contract asks for exact products"
        if config.head_dim > NATIVE_DIM or config.head_dim % 8:
            return f"its head size is {config.head_dim}, not a multiple of 8 up to {NATIVE_DIM}"
        with torch.no_grad():
            return disagreement(_products(decoder))

    def __call__(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        table: Tensor,
        table_rows: Tensor,
        out_rows: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`(hidden [T, hidden] after the last norm, logits [N, V])` of tokens at `positions`, written to `slots`, int64 [T].

        Token t reads the keys of positions 0 .. positions[t], j in slot `table[table_rows[t], j]` (int64 [B, W]); its own slot
        must stand there already. `out_rows` int64 [N]: tokens whose logits are wanted, all by default.
        """
        config, work = self._decoder.config, self._pass
        cos, sin = self._decoder.rope_tables(int(positions.max()))
        self._model.cos, self._model.sin = cos.data_ptr(), sin.data_ptr()
        rows, width = len(token_ids), table.shape[1]
        num_out = rows if out_rows is None else len(out_rows)
        self._make_room(rows, width)
        hidden, logits = torch.empty(rows, config.hidden_size), torch.empty(num_out, config.vocab_size)
        work.rows, work.num_out, work.table_width = rows, num_out, width
        work.token_ids, work.positions, work.slots = token_ids.data_ptr(), positions.data_ptr(), slots.data_ptr()
        work.table, work.table_row = table.data_ptr(), table_rows.data_ptr()
        work.out_rows = None if out_rows is None else out_rows.data_ptr()
        work.hidden, work.logits = hidden.data_ptr(), logits.data_ptr()
        self._kernels.forward(work)
        return hidden, logits

    def _make_room(self, rows: int, width: int) -> None:
        """Scratch for this many tokens, this wide a table and this many threads; kept and grown."""
        wanted = (rows, width, torch.get_num_threads())
        if all(have >= want for have, want in zip(self._room_for, wanted, strict=True)):
            return
        room_for = tuple(map(max, self._room_for, wanted))
        rows, width, threads = room_for
        padded = -(-rows // PANEL) * PANEL
        sizes = (rows * self._decoder.config.hidden_size, rows * self._widest, padded * self._deepest, threads * (width + PANEL))
        self._scratch = [torch.zeros(size) for size in sizes]
        self._room_for = room_for  # only now: an allocation that failed must be tried again
        work = self._pass
        work.x, work.wide, work.panels, work.room = (part.data_ptr() for part in self._scratch)


def _layers(decoder: Decoder) -> Iterator[DecoderLayer]:
    for layer in decoder.layers:
        assert isinstance(layer, DecoderLayer)
        yield layer


def _products(decoder: Decoder) -> Iterator[Tensor]:
    for layer in _layers(decoder):
        yield from (layer.qkv_proj, layer.o_proj, layer.gate_up_proj, layer.down_proj)
    yield decoder.head


def _bind_layer(bound: Layer, layer: DecoderLayer, pools: tuple[Tensor, Tensor]) -> None:
    named = {
        "input_norm": layer.input_norm,
        "qkv": layer.qkv_proj,
        "qkv_bias": layer.qkv_bias,
        "qk_norm": layer.qk_norm,
        "o": layer.o_proj,
        "o_bias": layer.o_bias,
        "post_norm": layer.post_norm,
        "gate_up": layer.gate_up_proj,
        "gate_up_bias": layer.gate_up_bias,
        "down": layer.down_proj,
        "down_bias": layer.down_bias,
        "k_pool": pools[0],
        "v_pool": pools[1],
    }
    for name, tensor in named.items():
        setattr(bound, name, None if tensor is None else tensor.data_ptr())
    bound.window = layer.window or 0
