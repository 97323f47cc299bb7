"""The one GEMM primitive. Every product whose bits a row's neighbours must not change goes through here.

Three modes, chosen per process by `miles_kernels.probe`, the first that it proves:

- `native`: the BLAS of this machine, kept inside the shape range in which its bits for one output row do not depend on
  the other rows, on the row's position or on the number of threads (at least 16 rows; few columns in multiples of 16).
- `tile`: the same BLAS in products of 16 rows each, all of one shape: for libraries whose kernels change with the rows.
- `exact`: rows are rounded to a power-of-two grid coarse enough that every partial sum of the float64 GEMM is exact,
  so that any order, blocking or BLAS gives the same bits by construction. Slower (about 2x) and coarser (19 to 23
  significant bits), for machines on which nothing else is proven.

Inputs of any float dtype are up-cast to float32; results are float32.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Mode = Literal["native", "tile", "exact"]

MIN_ROWS = 16
"""Narrow GEMMs with fewer rows take other kernels (gemv, small-M); they are padded with zero rows."""
NARROW_COLUMNS = 64
"""Below this many columns, column counts off the multiple of 16 split badly over threads; they are padded too."""
COLUMN_MULTIPLE = 16
SAFE_THREADS = 2
SLIVER = 16
"""With more than `SAFE_THREADS` threads, products of fewer than this many columns per thread are left to the C kernels."""
ATTENTION_ROWS = (4, 16)
"""Fewest query rows per matrix of a batched product: the first count that the probe proves (see `attention_rows`)."""
KV_BLOCK = 128
"""Keys per probability-times-value product: longer reductions would change the BLAS' blocking with the length."""
SUM_GRID = 2.0**32
"""Exact row sums: values up to 1 on this grid sum without rounding in float64 over rows of up to 2^20."""

GEMM_ROWS = (4, 16)
"""Fewest rows of a GEMM with at least `NARROW_COLUMNS` columns: the first count that the probe proves (see `gemm_rows`).
A decode step of a few sequences reads all weights for few rows, so every row of padding costs."""

_default_mode: Mode | None = None
_gemm_rows: int | None = None
_attention_rows: int | None = None


def default_mode() -> Mode:
    """The mode this process proved at first use (see `miles_kernels.probe`)."""
    global _default_mode
    if _default_mode is None:
        from miles_kernels.probe import probe

        _default_mode = probe().mode
    return _default_mode


def gemm_rows() -> int:
    """Rows to which the left side of a wide product is padded at least, as proved by this process' probe."""
    global _gemm_rows
    if _gemm_rows is None:
        from miles_kernels.probe import probe

        _gemm_rows = probe().gemm_rows
    return _gemm_rows


def attention_rows() -> int:
    """Query rows to which a matrix of a batched product is padded at least, as proved by this process' probe."""
    global _attention_rows
    if _attention_rows is None:
        from miles_kernels.probe import probe

        _attention_rows = probe().attention_rows
    return _attention_rows


def _pad_rows(x: Tensor, rows: int) -> Tensor:
    return torch.cat((x, x.new_zeros(rows - x.shape[0], x.shape[1])))


def mm(a: Tensor, b: Tensor, mode: Mode | None = None) -> Tensor:
    """`a[M, K] @ b[N, K]^T` as float32 [M, N]; each row's bits depend on that row and on `b` only.

    Raises ValueError for other shapes and for operands on two devices.
    """
    if (
        mode == "native"
        and a.dtype is b.dtype is torch.float32
        and a.shape[0] >= MIN_ROWS
        and b.shape[0] >= NARROW_COLUMNS
        and a.is_contiguous()
        and b.is_contiguous()
        and not _too_many_threads(b.shape[0])
    ):
        return torch.mm(a, b.t())  # the common case, without further questions
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or a.device != b.device:
        places = "" if a.device == b.device else f", on {a.device} and {b.device}"
        raise ValueError(f"a product of {tuple(a.shape)} and {tuple(b.shape)}{places}: need [M, K] and [N, K] on one device")
    if a.dtype is not torch.float32:
        a = a.float()
    if b.dtype is not torch.float32:
        b = b.float()
    mode = mode or default_mode()
    if mode == "exact":
        return _mm_exact(a, b)
    if mode == "tile":
        return mm_tiles(a, b)
    if a.stride(1) != 1:
        a = a.contiguous()
    if b.stride(1) != 1:
        b = b.contiguous()
    return mm_native(a, b, gemm_rows())


def mm_native(a: Tensor, b: Tensor, least: int) -> Tensor:
    """`a[M, K] @ b[N, K]^T` of float32 rows, padded to `least` rows; to 16 where b is narrow."""
    rows, columns = a.shape[0], b.shape[0]
    if _too_many_threads(columns):
        product = _c_product(a, b)
        if product is not None:
            return product
    narrow = columns < NARROW_COLUMNS
    padded = narrow and columns % COLUMN_MULTIPLE != 0
    if padded:
        b = _pad_rows(b, columns + -columns % COLUMN_MULTIPLE)
    least = MIN_ROWS if narrow else least
    out = torch.mm(a, b.t()) if rows >= least else torch.mm(_pad_rows(a, least), b.t())[:rows]
    return out[:, :columns].contiguous() if padded else out


def mm_tiles(a: Tensor, b: Tensor) -> Tensor:
    """`a[M, K] @ b[N, K]^T` of float32 rows, 16 at a time: every product the BLAS sees has the same shape."""
    rows, columns = a.shape[0], b.shape[0]
    a = torch.nn.functional.pad(a, (0, 0, 0, -rows % MIN_ROWS)).contiguous()
    if columns % COLUMN_MULTIPLE:
        b = _pad_rows(b, columns + -columns % COLUMN_MULTIPLE)
    weight = b.contiguous().t()
    out = torch.empty((a.shape[0], weight.shape[1]))
    for start in range(0, a.shape[0], MIN_ROWS):
        torch.mm(a[start : start + MIN_ROWS], weight, out=out[start : start + MIN_ROWS])
    return out[:rows, :columns].contiguous()


def _too_many_threads(columns: int) -> bool:
    """Whether the BLAS would cut the columns into slivers of fewer than 16, which it computes by other kernels."""
    count = torch.get_num_threads()
    return count > SAFE_THREADS and columns < SLIVER * count


def _c_product(a: Tensor, b: Tensor) -> Tensor | None:
    """The product by the C kernels, with the BLAS' bits; None where there are none."""
    from miles_kernels.native import library
    from miles_kernels.native.gemm import gemm_depth

    kernels, depth = library(), gemm_depth()
    return None if kernels is None or depth is None else kernels.linear(a, b, depth)


def mm_dgrad(grad: Tensor, b: Tensor) -> Tensor:
    """`grad[M, N] @ b[N, K]` as float32: the gradient of `mm` for its first operand. Deterministic."""
    return torch.mm(grad.float(), b.float())


def mm_wgrad(grad: Tensor, a: Tensor) -> Tensor:
    """`grad[M, N]^T @ a[M, K]` as float32: the gradient of `mm` for its second operand. Deterministic."""
    return torch.mm(grad.float().t(), a.float())


def bmm_nt(q: Tensor, k: Tensor, mode: Mode) -> Tensor:
    """`q[B, R, D] @ k[B, n, D]^T` as float32 [B, R, n] for float32 inputs, R >= `attention_rows()`, n a multiple of 16."""
    if mode == "exact":
        return _mm_exact(q, k)
    return _bmm(q, k.transpose(1, 2))


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """torch.bmm, but a lone small matrix gets a twin: alone it would be one GEMM, whose rows are split over threads."""
    if a.shape[0] == 1 and a.shape[1] < MIN_ROWS:
        return torch.bmm(a.repeat(2, 1, 1), b.repeat(2, 1, 1))[:1]
    return torch.bmm(a, b)


def bmm_pv(p: Tensor, v: Tensor, mode: Mode) -> Tensor:
    """`p[B, R, n] @ v[B, n, D]` as float32 [B, R, D], in ascending blocks of `KV_BLOCK` keys.

    Keys whose probability is zero add exact zeros, so a row's bits do not depend on how far n reaches beyond its keys.
    """
    product = _pv_exact if mode == "exact" else _bmm
    n = p.shape[2]
    if n <= KV_BLOCK:
        return product(p, v)
    out = product(p[:, :, :KV_BLOCK], v[:, :KV_BLOCK])
    for start in range(KV_BLOCK, n, KV_BLOCK):
        out += product(p[:, :, start : start + KV_BLOCK], v[:, start : start + KV_BLOCK])
    return out


def softmax_rows(x: Tensor, mode: Mode) -> Tensor:
    """Softmax over the last dimension (a multiple of 16 long); trailing -inf columns do not change a row's bits."""
    if mode != "exact":
        return torch.softmax(x, -1)
    p = torch.exp(x - x.amax(-1, keepdim=True))
    grid = torch.round(p.double().mul_(SUM_GRID))
    return p / grid.sum(-1, keepdim=True).div_(SUM_GRID).float()


def _grid_bits(reduction: int) -> int:
    """Significant bits per operand such that `reduction` products sum without rounding in 53 bits."""
    return (53 - max(reduction - 1, 1).bit_length()) // 2


def _to_grid(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Integers (as float64) of at most `bits` bits, and the power of two of each row that scales them back."""
    exponent = torch.frexp(x.abs().amax(-1, keepdim=True)).exponent
    return torch.round(x.double() * _power_of_two(bits - exponent)), _power_of_two(exponent - bits)


def _power_of_two(exponent: Tensor) -> Tensor:
    """2^exponent as float64, by its bits: torch's pow and ldexp go through rounding arithmetic."""
    return ((exponent.long() + 1023) << 52).view(torch.float64)


def _mm_exact(a: Tensor, b: Tensor) -> Tensor:
    bits = _grid_bits(a.shape[-1])
    a_grid, a_scale = _to_grid(a, bits)
    b_grid, b_scale = _to_grid(b, bits)
    product = torch.matmul(a_grid, b_grid.transpose(-1, -2))
    return product.mul_(a_scale).mul_(b_scale.transpose(-1, -2)).float()


def _pv_exact(p: Tensor, v: Tensor) -> Tensor:
    """Exact p @ v. A grid per key (a row of v), its power of two folded into p: a key of probability 0 leaves no trace."""
    bits = _grid_bits(KV_BLOCK)
    v_grid, v_scale = _to_grid(v, bits)
    p_grid, p_scale = _to_grid(p.double() * v_scale.transpose(-1, -2), bits)
    return torch.matmul(p_grid, v_grid).mul_(p_scale).float()
