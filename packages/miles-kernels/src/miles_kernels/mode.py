"""`invariant()`: batch-invariant arithmetic for any torch model, without changing the model.

Inside the context every matrix product, softmax, mean and attention that reaches torch's dispatcher runs on kernels whose bits do
not depend on the rest of the batch. An auditor watches every op; one that reduces and is not on the proven list raises
`UnprovenReduction` instead of passing silently.

Example:
    with miles_kernels.invariant():
        logits = model(input_ids).logits          # same bits alone, in any batch, in any order

It works by a `TorchDispatchMode`, which is thread-local: other threads are not touched, and leaving the context, by an exception
too, restores everything, because nothing global was changed. Contexts nest. Backward passes belong inside the context; autograd
runs them on threads of its own for CUDA, which is why products of a backward pass are replaced only on the CPU and in
`miles_kernels.nn.hf`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from miles_kernels.testing import count_unequal

aten = torch.ops.aten


class UnprovenReduction(RuntimeError):
    """A reducing op was reached whose batch invariance nobody proved."""


@dataclass
class Audit:
    """What one context saw. Names are those of torch's dispatcher, e.g. "aten.mm.default"."""

    replaced: dict[str, int] = field(default_factory=dict)
    """ops that ran on kernels of ours, with counts"""
    proven: dict[str, int] = field(default_factory=dict)
    """reducing ops that are invariant as they are, with counts"""
    unproven: dict[str, int] = field(default_factory=dict)
    """reducing ops that were let through because strict was off"""


@contextmanager
def invariant(*, strict: bool = True) -> Iterator[Audit]:
    """Batch-invariant arithmetic in this thread until the block ends; yields the audit.

    With `strict`, an unproven reduction raises UnprovenReduction, naming the op and its shapes. Raises RuntimeError inside
    torch.compile, which would trace past the replacements. Products of float64 and of integers are left alone.
    """
    if torch.compiler.is_compiling():
        raise RuntimeError("miles_kernels.invariant() cannot be entered inside torch.compile; compile inside the context instead")
    audit = Audit()
    with _Mode(strict, audit):
        yield audit


class CompiledDiffers(RuntimeError):
    """A compiled function gave other bits than the function itself."""


def compile_aligned(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`torch.compile(fn)` whose bits are those of eager execution, or an error.

    Pointwise code is compiled with intermediate roundings kept (`emulate_precision_casts`); ops of this package stay opaque. The
    first call with each combination of shapes and dtypes also runs `fn` itself; CompiledDiffers names how many elements differ.
    `options` go to torch.compile, its own `options` table on top of ours.
    """
    table = {"emulate_precision_casts": True, **options.pop("options", {})}
    compiled = torch.compile(fn, options=table, **options)
    seen: set[tuple[Any, ...]] = set()

    def call(*args: Any, **kwargs: Any) -> Any:
        flat, _ = tree_flatten((args, kwargs))
        key = (torch.is_grad_enabled(), *((tuple(x.shape), x.dtype, x.device) if isinstance(x, Tensor) else x for x in flat))
        out = compiled(*args, **kwargs)
        if key not in seen:
            pairs = zip(tree_flatten(out)[0], tree_flatten(fn(*args, **kwargs))[0], strict=True)
            unequal = sum(count_unequal(a.detach(), b.detach()) for a, b in pairs if isinstance(a, Tensor))
            if unequal:
                name = getattr(fn, "__name__", "the function")
                raise CompiledDiffers(f"{name}: {unequal} elements of the compiled result differ from eager; run it eagerly")
            seen.add(key)
        return out

    return call


class _Mode(TorchDispatchMode):
    """Replaces products, softmax, means and attention; audits the rest."""

    def __init__(self, strict: bool, audit: Audit) -> None:
        super().__init__()
        self.strict, self.audit = strict, audit

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = str(func)
        replacement = _REPLACED.get(name)
        if replacement is not None:
            out = replacement(*args, **kwargs)  # the mode is off in here: nothing recurses
            if out is not NotImplemented:
                self.audit.replaced[name] = self.audit.replaced.get(name, 0) + 1
                return out
        if _composite(func):  # under inference_mode composites arrive whole; their parts are what counts
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        if _reduces(func, name):
            self._judge(func, name, args, kwargs)
        return func(*args, **kwargs)

    def _judge(self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rule = _PROVEN.get(name)
        if rule is not None and rule(*args, **kwargs):
            self.audit.proven[name] = self.audit.proven.get(name, 0) + 1
            return
        if self.strict:
            shapes = [f"{x.dtype} {tuple(x.shape)} on {x.device}" for x in args if isinstance(x, Tensor)]
            raise UnprovenReduction(
                f"{name}({', '.join(shapes)}) reduces, and is not proven batch-invariant; "
                "use an op of miles_kernels.ops for it, or invariant(strict=False) to let it through and find it in the audit"
            )
        self.audit.unproven[name] = self.audit.unproven.get(name, 0) + 1


# ---------------------------------------------------------------- replacements


def _product(a: Tensor, b: Tensor) -> Tensor | None:
    """a[M, K] @ b[K, N] in a's dtype; None when this package has no kernel for the dtype."""
    if a.dtype not in (torch.float32, torch.bfloat16, torch.float16) or a.dtype is not b.dtype:
        return None
    if a.is_cuda:
        if a.dtype is not torch.bfloat16 or a.shape[1] % 8 or b.shape[1] % 8:
            return None
        from miles_kernels.cuda.linear import linear

        return linear(a.contiguous(), b.t().contiguous() if b.stride(0) != 1 else b.t())
    from miles_kernels.ops.matmul import mm

    return mm(a, b.t()).to(a.dtype)


def _mm(a: Tensor, b: Tensor) -> Any:
    out = _product(a, b)
    return NotImplemented if out is None else out


def _addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    if beta != 1 or alpha != 1:
        return NotImplemented
    wide = a.dtype if a.is_cuda else torch.float32
    out = _product(a.to(wide), b.to(wide)) if not a.is_cuda else _product(a, b)
    return NotImplemented if out is None else (out + bias).to(a.dtype)


def _bmm(a: Tensor, b: Tensor) -> Any:
    if a.shape[0] == 0:
        return a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    outs = [_product(x, y) for x, y in zip(a, b, strict=True)]
    return NotImplemented if outs[0] is None else torch.stack([x for x in outs if x is not None])


def _softmax(x: Tensor, dim: int, half_to_float: bool = False) -> Any:
    if dim % x.ndim != x.ndim - 1 or not x.is_floating_point():
        return NotImplemented
    wide = x.float()
    odds = torch.exp(wide - wide.amax(-1, keepdim=True))
    return (odds / _row_sum(odds)).to(torch.float32 if half_to_float else x.dtype)


def _log_softmax(x: Tensor, dim: int, half_to_float: bool = False) -> Any:
    if dim % x.ndim != x.ndim - 1 or not x.is_floating_point():
        return NotImplemented
    wide = x.float()
    shifted = wide - wide.amax(-1, keepdim=True)
    return (shifted - torch.log(_row_sum(torch.exp(shifted)))).to(torch.float32 if half_to_float else x.dtype)


def _row_sum(x: Tensor) -> Tensor:
    """Sum over the last dimension [.., 1] as a fixed binary tree of elementwise additions: nothing is left to a library.

    x is float32; the row is padded with zeros to a power of two.
    """
    width = x.shape[-1]
    size = 1 << max(0, width - 1).bit_length()
    if size != width:
        x = torch.nn.functional.pad(x, (0, size - width))
    while size > 1:
        size //= 2
        x = x[..., :size] + x[..., size:]
    return x


def _mean(x: Tensor, dim: Any, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    total = _sum(x, dim, keepdim, dtype=torch.float32 if x.dtype is not torch.float64 else None)
    if total is NotImplemented:
        return NotImplemented
    return (total / x.shape[-1]).to(dtype or x.dtype)


def _sum(x: Tensor, dim: Any, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Any:
    dims = [dim] if isinstance(dim, int) else list(dim or [])
    if len(dims) != 1 or dims[0] % x.ndim != x.ndim - 1 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return NotImplemented
    total = _row_sum(x.float()).to(dtype or x.dtype)
    return total if keepdim else total.squeeze(-1)


def _rms_norm(x: Tensor, shape: list[int], weight: Tensor | None, eps: float | None) -> Any:
    if len(shape) != 1:
        return NotImplemented
    wide = x.float()
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    scale = torch.rsqrt(_row_sum(wide * wide) / shape[0] + eps)
    out = (wide * scale).to(x.dtype)
    return (out if weight is None else out * weight), scale


def _sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    """Attention [B, H, Lq, D] by products and softmax of this module: same bits whatever the batch; keys padded as given."""
    heads = q.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if k.shape[1] != heads:
        k, v = (x.repeat_interleave(heads // x.shape[1], 1) for x in (k, v))
    wide = torch.bfloat16 if q.is_cuda else torch.float32
    scores = _bmm((q * scale).to(wide).flatten(0, 1), k.to(wide).flatten(0, 1).transpose(1, 2))
    scores = scores.view(*q.shape[:3], k.shape[2]).float()
    if causal:
        hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril().logical_not()
        scores = scores.masked_fill(hidden, -math.inf)
    if bias is not None:
        scores = scores.masked_fill(bias.logical_not(), -math.inf) if bias.dtype is torch.bool else scores + bias
    p = torch.nan_to_num(_softmax(scores, -1))
    out = _bmm(p.to(wide).flatten(0, 1), v.to(wide).flatten(0, 1))
    return out.view(*q.shape[:3], v.shape[3]).to(q.dtype)


def _flash_cpu(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, is_causal: bool = False, *, attn_mask: Any = None, scale: Any = None
) -> Any:
    if dropout_p or any(x.requires_grad for x in (q, k, v)):
        return NotImplemented
    return _sdpa(q, k, v, attn_mask, is_causal, scale), q.new_zeros(q.shape[:3], dtype=torch.float32)


_REPLACED: dict[str, Callable[..., Any]] = {
    "aten.mm.default": _mm,
    "aten.addmm.default": _addmm,
    "aten.bmm.default": _bmm,
    "aten._softmax.default": _softmax,
    "aten._log_softmax.default": _log_softmax,
    "aten.mean.dim": _mean,
    "aten.sum.dim_IntList": _sum,
    "aten._fused_rms_norm.default": _rms_norm,
    "aten._scaled_dot_product_flash_attention_for_cpu.default": _flash_cpu,
}


# ---------------------------------------------------------------- audit


def _always(*args: Any, **kwargs: Any) -> bool:
    return True


def _not_float(x: Tensor, *args: Any, **kwargs: Any) -> bool:
    return not x.is_floating_point()


_PROVEN: dict[str, Callable[..., bool]] = {
    # exact whatever the order: comparisons, and sums of integers
    **{
        f"aten.{name}": _always
        for name in (
            "amax.default", "amin.default", "max.default", "max.dim", "min.default", "min.dim", "argmax.default",
            "argmin.default",
            "any.default", "any.dim", "all.default", "all.dim", "topk.default", "sort.default", "sort.stable", "cummax.default",
            "cummin.default", "bincount.default",
        )
    },
    **{
        f"aten.{name}": _not_float
        for name in ("sum.default", "sum.dim_IntList", "cumsum.default", "prod.default", "prod.dim_int", "cumprod.default")
    },
    "aten.scatter_add.default": _not_float,
    "aten.index_add.default": _not_float,
    "aten._local_scalar_dense.default": _always,
    **{f"aten.{name}.default": _not_float for name in ("mm", "addmm", "bmm")},
}  # fmt: skip

_REDUCING = (
    "mm", "bmm", "addmm", "addbmm", "baddbmm", "addmv", "mv", "dot", "vdot", "linear", "matmul", "einsum", "_scaled_mm",
    "_int_mm", "_grouped_mm", "sum", "nansum", "mean", "prod", "var", "std", "var_mean", "std_mean", "norm",
    "linalg_vector_norm", "logsumexp", "cumsum", "cumprod", "logcumsumexp", "_softmax", "_log_softmax", "native_layer_norm",
    "native_group_norm", "native_batch_norm",
    "_fused_rms_norm", "convolution", "_convolution", "scatter_add", "scatter_reduce", "index_add", "index_reduce", "trace",
    "nll_loss_forward", "nll_loss2d_forward", "mse_loss", "smooth_l1_loss", "binary_cross_entropy", "_embedding_bag",
    "embedding_dense_backward", "native_layer_norm_backward", "_softmax_backward_data", "_log_softmax_backward_data",
    "amax", "amin", "max", "min", "argmax", "argmin", "any", "all", "topk", "sort", "bincount", "cummax", "cummin",
    "adaptive_avg_pool2d", "_adaptive_avg_pool2d", "avg_pool2d", "cdist", "_cdist_forward", "histc",
)  # fmt: skip
_REDUCING_SET = frozenset(_REDUCING)


def _composite(func: Any) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), torch._C.DispatchKey.CompositeImplicitAutograd))


def _reduces(func: Any, name: str) -> bool:
    """Whether an op combines several elements into one. By name, and by torch's own reduction tag where there is one."""
    package, _, rest = name.partition(".")
    base = rest.partition(".")[0].rstrip("_") if not rest.startswith("__") else rest
    if package == "aten":
        attention = base.startswith(("_scaled_dot_product", "_flash_attention", "_efficient_attention", "_cudnn_attention"))
        return attention or base in _REDUCING_SET or rest.partition(".")[0] in _REDUCING_SET or _tagged(func)
    # other libraries' ops may reduce; ours are proven, torch's own plumbing does not reduce
    return package not in (
        "miles_cuda",
        "miles_kernels",
        "prims",
        "prim",
        "profiler",
        "_c10d_functional",
        "higher_order",
        "inductor",
    )


def _tagged(func: Any) -> bool:
    tag = getattr(torch.Tag, "reduction", None)
    return tag is not None and tag in getattr(func, "tags", ())
