"""Typed calls into the compiled kernels. Shapes are the caller's duty here; the ops check them."""

from __future__ import annotations

from ctypes import POINTER, Structure, byref, c_float, c_int, c_int64, c_long, c_void_p

import torch
from torch import Tensor

from miles_kernels.native.build import load

Pointer, Long, Int, Float = c_void_p, c_long, c_int, c_float
_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "mk_linear": (Int, (Pointer,) * 3 + (Long,) * 4 + (Int,)),
    "mk_norm": (None, (Pointer,) * 3 + (Long,) * 3 + (Float, Int)),
    "mk_norm_backward": (Int, (Pointer,) * 5 + (Long,) * 3 + (Float, Int)),
    "mk_swiglu": (None, (Pointer,) * 2 + (Long,) * 2 + (Int,)),
    "mk_swiglu_backward": (None, (Pointer,) * 3 + (Long,) * 2 + (Int,)),
    "mk_attention": (Int, (Pointer,) * 3 + (Long,) * 2 + (Pointer,) * 4 + (Long,) * 6 + (Float, Long, Int)),
    "mk_lse": (None, (Pointer, Long) + (Pointer,) * 3 + (Long,) * 3 + (Int, Int)),
    "mk_lse_finish": (None, (Pointer,) * 3 + (Long,)),
    "mk_gumbel": (None, (Pointer, Pointer, Int, Pointer, Long, Long)),
    "mk_sample": (None, (Pointer,) * 7 + (Long,) * 3 + (Int,)),
    "mk_map": (None, (Int, Pointer, Pointer, Long)),
    "mk_forward": (None, (Pointer, Int)),
}


class Layer(Structure):
    """Weights and cache of one layer, as `decode.h` lays them out."""

    _fields_ = [
        *((name, c_void_p) for name in ("input_norm", "qkv", "qkv_bias", "qk_norm", "o", "o_bias", "post_norm")),
        *((name, c_void_p) for name in ("gate_up", "gate_up_bias", "down", "down_bias", "k_pool", "v_pool")),
        ("window", c_int64),
    ]


class Model(Structure):
    """Shape and weights of a dense decoder."""

    _fields_ = [
        *((name, c_int64) for name in ("hidden", "heads", "kv_heads", "dim", "inner", "vocab", "num_layers", "depth")),
        *((name, c_int64) for name in ("head_stride", "slot_stride")),
        ("eps", c_float),
        ("scale", c_float),
        *((name, c_void_p) for name in ("embedding", "norm", "head", "cos", "sin")),
        ("layers", POINTER(Layer)),
    ]


class Pass(Structure):
    """One forward pass."""

    _fields_ = [
        ("model", POINTER(Model)),
        *((name, c_int64) for name in ("rows", "num_out", "table_width")),
        *((name, c_void_p) for name in ("token_ids", "positions", "slots", "table", "table_row", "out_rows")),
        *((name, c_void_p) for name in ("hidden", "logits", "x", "wide", "panels", "room")),
    ]


class Library:
    """The kernels as methods on float32 CPU tensors. Uses torch's number of threads. Raises Unavailable when made."""

    def __init__(self) -> None:
        self._dll = load()
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._dll, name)
            function.restype, function.argtypes = result, arguments

    def linear(self, x: Tensor, weight: Tensor, depth: int) -> Tensor:
        """`x[M, K] @ weight[N, K]^T`, summed over K in blocks of `depth`."""
        (m, k), n = x.shape, weight.shape[0]
        if weight.shape[1] != k:
            raise ValueError(f"linear: rows of {k} and weights of {weight.shape[1]} do not fit")
        x, weight, out = x.contiguous(), weight.contiguous(), x.new_empty(m, n)
        args = (x.data_ptr(), weight.data_ptr(), out.data_ptr(), m, n, k, depth, torch.get_num_threads())
        _check(self._dll.mk_linear(*args), "linear")
        return out

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """RMSNorm of x[..., n] by weight[n], or of x[..., heads, n] by weight[heads, n]."""
        x, weight = x.contiguous(), weight.contiguous()
        out, size, repeat = torch.empty_like(x), x.shape[-1], weight.numel() // x.shape[-1]
        rows = x.numel() // size
        self._dll.mk_norm(x.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, size, repeat, eps, _threads(x.numel()))
        return out

    def norm_backward(self, x: Tensor, weight: Tensor, grad: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """Gradients of x and weight."""
        x, weight, grad = x.contiguous(), weight.contiguous(), grad.contiguous()
        dx, dw, size = torch.empty_like(x), torch.empty_like(weight), x.shape[-1]
        pointers = (x.data_ptr(), weight.data_ptr(), grad.data_ptr(), dx.data_ptr(), dw.data_ptr())
        sizes = (x.numel() // size, size, weight.numel() // size)
        _check(self._dll.mk_norm_backward(*pointers, *sizes, eps, _threads(x.numel())), "norm_backward")
        return dx, dw

    def swiglu(self, gate_up: Tensor) -> Tensor:
        """silu(gate) * up of gate_up[..., 2n]."""
        gate_up, size = gate_up.contiguous(), gate_up.shape[-1] // 2
        out = gate_up.new_empty(*gate_up.shape[:-1], size)
        rows = out.numel() // size if size else 0
        self._dll.mk_swiglu(gate_up.data_ptr(), out.data_ptr(), rows, size, _threads(out.numel()))
        return out

    def swiglu_backward(self, gate_up: Tensor, grad: Tensor) -> Tensor:
        """Gradient of gate_up."""
        gate_up, grad, out = gate_up.contiguous(), grad.contiguous(), torch.empty_like(gate_up)
        size = grad.shape[-1]
        rows = grad.numel() // size if size else 0
        pointers = (gate_up.data_ptr(), grad.data_ptr(), out.data_ptr())
        self._dll.mk_swiglu_backward(*pointers, rows, size, _threads(out.numel()))
        return out

    def attention(
        self,
        q: Tensor,
        k_pool: Tensor,
        v_pool: Tensor,
        index: tuple[Tensor, Tensor, Tensor],
        out: Tensor,
        *,
        scale: float,
        window: int | None,
    ) -> None:
        """Attention of one bucket of a plan into out[T, H, D]; `index` is its (q_index, q_pos, kv_index), int64.

        The pools [Hkv, N, D] have equal strides and contiguous rows.
        """
        q_index, q_pos, kv_index = (part.contiguous() for part in index)
        kv_heads, _, dim = k_pool.shape
        strides = (k_pool.stride(0), k_pool.stride(1))
        sizes = (*q_index.shape, kv_index.shape[1], kv_heads, q.shape[1] // kv_heads, dim)
        pointers = (q.data_ptr(), k_pool.data_ptr(), v_pool.data_ptr())
        indices = (q_index.data_ptr(), q_pos.data_ptr(), kv_index.data_ptr(), out.data_ptr())
        code = self._dll.mk_attention(*pointers, *strides, *indices, *sizes, scale, window or 0, _threads(4 * q.numel()))
        _check(code, "attention")

    def lse(self, z: Tensor, start: int, divisor: Tensor | None, targets: Tensor, state: Tensor, entropy: bool) -> None:
        """Take the logits z[N, n] of columns from `start` on into the running state[N, 4]."""
        if z.stride(1) != 1:
            z = z.contiguous()
        divisor = None if divisor is None else divisor.contiguous()
        pointers = (None if divisor is None else divisor.data_ptr(), targets.data_ptr(), state.data_ptr())
        self._dll.mk_lse(z.data_ptr(), z.stride(0), *pointers, *z.shape, start, entropy, _threads(z.numel()))

    def lse_finish(self, state: Tensor, entropy: bool) -> tuple[Tensor, Tensor | None]:
        """(logprob[N], entropy[N] or None) of a finished state."""
        logprob = state.new_empty(len(state))
        spread = state.new_empty(len(state)) if entropy else None
        self._dll.mk_lse_finish(state.data_ptr(), logprob.data_ptr(), None if spread is None else spread.data_ptr(), len(state))
        return logprob, spread

    def gumbel(self, keys: Tensor, ids: Tensor) -> Tensor:
        """Noise [B, n] under keys int32 [B, 2] of token ids int32 [1, n] or [B, n]."""
        keys, ids = keys.to(torch.int32).contiguous(), ids.to(torch.int32).contiguous()
        out = torch.empty(len(keys), ids.shape[1])
        self._dll.mk_gumbel(keys.data_ptr(), ids.data_ptr(), len(ids) == 1, out.data_ptr(), *out.shape)
        return out

    def sample(
        self, logits: Tensor, temperature: Tensor | None, keys: tuple[Tensor, Tensor, Tensor], chunk: int
    ) -> tuple[Tensor, Tensor]:
        """Unfiltered draws: (token int64 [B], logprob [B]) of logits[B, V] under (seed, sample_id, position) int64 [B]."""
        logits = logits.contiguous()
        keys = tuple(key.to(torch.int64).contiguous() for key in keys)
        token, logprob = torch.empty(len(logits), dtype=torch.int64), logits.new_empty(len(logits))
        heat = None if temperature is None else temperature.contiguous()
        pointers = (logits.data_ptr(), None if heat is None else heat.data_ptr(), *(key.data_ptr() for key in keys))
        self._dll.mk_sample(*pointers, token.data_ptr(), logprob.data_ptr(), *logits.shape, chunk, _threads(logits.numel()))
        return token, logprob

    def exp(self, x: Tensor) -> Tensor:
        """e^x, elementwise."""
        out = torch.empty_like(x := x.contiguous())
        self._dll.mk_map(0, x.data_ptr(), out.data_ptr(), x.numel())
        return out

    def log(self, x: Tensor) -> Tensor:
        """ln x of normal positive numbers, elementwise."""
        out = torch.empty_like(x := x.contiguous())
        self._dll.mk_map(1, x.data_ptr(), out.data_ptr(), x.numel())
        return out

    def forward(self, work: Pass) -> None:
        """Run a forward pass described by a `Pass` whose memory the caller keeps alive."""
        self._dll.mk_forward(byref(work), torch.get_num_threads())


def _threads(elements: int) -> int:
    """Threads worth waking for this many elements."""
    return torch.get_num_threads() if elements >= 1 << 15 else 1


def _check(code: int, name: str) -> None:
    if code:
        raise MemoryError(f"native {name}: no memory for its scratch space")
