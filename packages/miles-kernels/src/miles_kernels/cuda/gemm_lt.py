"""cuBLASLt called directly, with split-K forbidden: the backend `cublaslt`.

`torch.mm` cannot say which algorithms are allowed. Here the heuristic is asked for algorithms without workspace and without a
reduction scheme, once per shape; the answers can be timed (`Plan.tune`), and a call costs a few microseconds of CPU. No process
setting is changed. The library is the one torch has loaded.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import re
import threading
from typing import Any, NamedTuple

import torch
from torch import Tensor

COMPUTE_32F = 68
R_32F, R_16F, R_16BF = 0, 2, 14
DTYPES = {torch.float32: R_32F, torch.float16: R_16F, torch.bfloat16: R_16BF}
OP_N, OP_T = 0, 1
DESC_TRANSA, DESC_TRANSB, DESC_EPILOGUE, DESC_BIAS_POINTER = 3, 4, 7, 8
EPILOGUE_BIAS = 4
PREF_WORKSPACE, PREF_REDUCTION_MASK, PREF_ALIGNMENTS = 1, 3, (5, 6, 7, 8)
ALGO_SPLITK = 2
ALGO_SETTINGS = (0, 1, 4, 5, 6, 7, 8)
"""id, tile, swizzle, custom option, stages, inner shape, cluster: what names an algorithm"""
ALIGNMENT = 16
"""bytes that every row of every operand must be a multiple of"""
MOST_PLANS = 4096


class LtError(RuntimeError):
    """cuBLASLt returned a status other than success."""


class NoAlgorithm(LtError):
    """cuBLASLt takes a problem with split-K only, or not at all."""


class _Heuristic(ctypes.Structure):
    _fields_ = [
        ("algo", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    ]


@functools.cache
def library() -> ctypes.CDLL:
    """The cuBLASLt that torch loaded. Raises LtError when there is none."""
    torch.cuda.init()
    found = _loaded()
    if found is None:
        torch.cuda.current_blas_handle()  # loads it, and takes a workspace of 32 MiB
        found = _loaded()
    if found is None:
        raise LtError("cublaslt: libcublasLt is not loaded in this process; is this a CUDA build of torch on Linux?")
    loaded = ctypes.CDLL(found)
    pointer = ctypes.c_void_p
    loaded.cublasLtMatmul.argtypes = [pointer] * 14 + [ctypes.c_size_t, pointer]
    return loaded


def _loaded() -> str | None:
    """The file of the cuBLASLt in this process."""
    with open("/proc/self/maps") as maps:
        found = re.search(r"(/\S*libcublasLt\.so\.\d+\S*)", maps.read())
    return None if found is None else found.group(1)


def _check(status: int, what: str) -> None:
    if status:
        raise LtError(f"{what}: status {status}")


@functools.cache
def _handle(device: int) -> ctypes.c_void_p:
    handle = ctypes.c_void_p()
    with torch.cuda.device(device):
        _check(library().cublasLtCreate(ctypes.byref(handle)), "cublasLtCreate")
    return handle


def _set(fn: Any, target: ctypes.c_void_p, attribute: int, value: Any) -> None:
    _check(fn(target, attribute, ctypes.byref(value), ctypes.sizeof(value)), f"attribute {attribute}")


def _layout(dtype: int, rows: int, cols: int, ld: int) -> ctypes.c_void_p:
    layout = ctypes.c_void_p()
    lib = library()
    made = lib.cublasLtMatrixLayoutCreate(
        ctypes.byref(layout), dtype, ctypes.c_uint64(rows), ctypes.c_uint64(cols), ctypes.c_int64(ld)
    )
    _check(made, "cublasLtMatrixLayoutCreate")
    return layout


class Problem(NamedTuple):
    """out[m, n] = a b for row-major tensors; `a_t`: a is stored [k, m]; `b_t`: b is stored [k, n] instead of [n, k]."""

    m: int
    n: int
    k: int
    lda: int
    ldb: int
    ldo: int
    a_t: bool
    b_t: bool
    dtype: torch.dtype
    out_dtype: torch.dtype
    bias: bool
    accumulate: bool
    device: int


class Plan:
    """Descriptors and allowed algorithms of one problem; `run` launches on the current stream."""

    def __init__(self, problem: Problem, candidates: int = 8) -> None:
        self.problem = p = problem
        lib = library()
        self.handle = _handle(p.device)
        self.desc = ctypes.c_void_p()
        _check(lib.cublasLtMatmulDescCreate(ctypes.byref(self.desc), COMPUTE_32F, R_32F), "cublasLtMatmulDescCreate")
        # Column-major cuBLAS computes out^T[n, m] = b a^T: our b is its A, our a its B.
        _set(lib.cublasLtMatmulDescSetAttribute, self.desc, DESC_TRANSA, ctypes.c_int32(OP_N if p.b_t else OP_T))
        _set(lib.cublasLtMatmulDescSetAttribute, self.desc, DESC_TRANSB, ctypes.c_int32(OP_T if p.a_t else OP_N))
        if p.bias:
            _set(lib.cublasLtMatmulDescSetAttribute, self.desc, DESC_EPILOGUE, ctypes.c_uint32(EPILOGUE_BIAS))
        kind, out_kind = DTYPES[p.dtype], DTYPES[p.out_dtype]
        self.a_layout = _layout(kind, *((p.n, p.k) if p.b_t else (p.k, p.n)), p.ldb)
        self.b_layout = _layout(kind, *((p.m, p.k) if p.a_t else (p.k, p.m)), p.lda)
        self.out_layout = _layout(out_kind, p.n, p.m, p.ldo)
        self.one = ctypes.c_float(1.0)
        self.beta = ctypes.c_float(1.0 if p.accumulate else 0.0)
        self.lib = lib
        self.one_pointer, self.beta_pointer = ctypes.addressof(self.one), ctypes.addressof(self.beta)
        self.algorithms = self._ask(candidates)
        self.pointers = [ctypes.addressof(found.algo) for found in self.algorithms]
        self.best = 0
        self._busy = threading.Lock()

    def __del__(self) -> None:
        """Give the descriptors back: a training run meets a new number of rows with every batch."""
        lib = getattr(self, "lib", None)
        if lib is not None:
            with contextlib.suppress(Exception):  # at the end of the process the library may be gone
                for layout in (self.a_layout, self.b_layout, self.out_layout):
                    lib.cublasLtMatrixLayoutDestroy(layout)
                lib.cublasLtMatmulDescDestroy(self.desc)

    def _ask(self, count: int) -> list[_Heuristic]:
        lib = library()
        preference = ctypes.c_void_p()
        _check(lib.cublasLtMatmulPreferenceCreate(ctypes.byref(preference)), "cublasLtMatmulPreferenceCreate")
        try:
            _set(lib.cublasLtMatmulPreferenceSetAttribute, preference, PREF_WORKSPACE, ctypes.c_uint64(0))
            _set(lib.cublasLtMatmulPreferenceSetAttribute, preference, PREF_REDUCTION_MASK, ctypes.c_uint32(0))
            for attribute in PREF_ALIGNMENTS:
                _set(lib.cublasLtMatmulPreferenceSetAttribute, preference, attribute, ctypes.c_uint32(ALIGNMENT))
            results = (_Heuristic * count)()
            found = ctypes.c_int()
            status = lib.cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                self.desc,
                self.a_layout,
                self.b_layout,
                self.out_layout,
                self.out_layout,
                preference,
                count,
                results,
                ctypes.byref(found),
            )
        finally:
            lib.cublasLtMatmulPreferenceDestroy(preference)
        if status or not found.value:
            raise NoAlgorithm(f"cublaslt: no algorithm without split-K for {self.problem} (status {status})")
        allowed = [r for r in results[: found.value] if r.state == 0 and self._setting(r, ALGO_SPLITK) <= 1]
        if not allowed:
            raise NoAlgorithm(f"cublaslt: {found.value} algorithms for {self.problem}, all of them with split-K")
        return allowed

    def _setting(self, result: _Heuristic, attribute: int) -> int:
        value, written = ctypes.c_uint32(), ctypes.c_size_t()
        status = library().cublasLtMatmulAlgoConfigGetAttribute(
            ctypes.byref(result.algo), attribute, ctypes.byref(value), 4, ctypes.byref(written)
        )
        return 0 if status else value.value

    def name(self, index: int) -> str:
        """Settings of a candidate, as in `66.36.0.0.0.0.11`: the same algorithm for another number of rows has the same name."""
        return ".".join(str(self._setting(self.algorithms[index], key)) for key in ALGO_SETTINGS)

    def select(self, name: str) -> bool:
        """Use the candidate of this name from now on; False (and the heuristic's first choice) when there is none."""
        for index in range(len(self.algorithms)):
            if self.name(index) == name:
                self.best = index
                return True
        return False

    def run(self, a: Tensor, b: Tensor, out: Tensor, bias: Tensor | None = None, index: int | None = None) -> Tensor:
        """Launch on the current stream; tensors must match the problem this plan was made for."""
        if bias is None:
            return self._run(a, b, out, index)
        with self._busy:  # the descriptor holds the address, and ctypes lets other threads in
            _set(self.lib.cublasLtMatmulDescSetAttribute, self.desc, DESC_BIAS_POINTER, ctypes.c_void_p(bias.data_ptr()))
            return self._run(a, b, out, index)

    def _run(self, a: Tensor, b: Tensor, out: Tensor, index: int | None) -> Tensor:
        pointer = out.data_ptr()
        status = self.lib.cublasLtMatmul(
            self.handle,
            self.desc,
            self.one_pointer,
            b.data_ptr(),
            self.a_layout,
            a.data_ptr(),
            self.b_layout,
            self.beta_pointer,
            pointer,
            self.out_layout,
            pointer,
            self.out_layout,
            self.pointers[self.best if index is None else index],
            None,
            0,
            torch._C._cuda_getCurrentRawStream(self.problem.device),
        )
        if status:
            raise LtError(f"cublasLtMatmul: status {status} for {self.problem}")
        return out


def fits(*tensors: Tensor) -> bool:
    """Whether dtypes and alignments are those that plans assume."""
    return all(
        x.dtype in DTYPES
        and x.stride(-1) == 1
        and x.data_ptr() % ALIGNMENT == 0
        and x.stride(0) * x.element_size() % ALIGNMENT == 0
        and x.stride(0) >= x.shape[1]
        for x in tensors
    )


_plans: dict[Problem, Plan | None] = {}
"""None for a problem that no allowed algorithm takes."""


def forget() -> None:
    """Drop all cached plans."""
    _plans.clear()


def problem_of(
    a: Tensor, b: Tensor, out: Tensor, *, a_t: bool = False, b_t: bool = False, bias: bool = False, accumulate: bool = False
) -> Problem:
    """Describe out = a b; see `Problem`."""
    m, k = (a.shape[1], a.shape[0]) if a_t else (a.shape[0], a.shape[1])
    n = b.shape[1] if b_t else b.shape[0]
    return Problem(
        m, n, k, a.stride(0), b.stride(0), out.stride(0), a_t, b_t, a.dtype, out.dtype, bias, accumulate, a.device.index or 0
    )


def plan_of(problem: Problem, prefer: str = "") -> Plan | None:
    """The cached plan of a problem; a new one takes the algorithm named `prefer` if the heuristic offers it.

    None where cuBLASLt has no algorithm without split-K.
    """
    if problem not in _plans:
        if len(_plans) >= MOST_PLANS:
            _plans.pop(next(iter(_plans)), None)
        try:
            plan = Plan(problem)
        except NoAlgorithm:
            _plans[problem] = None
            return None
        if prefer:
            plan.select(prefer)
        _plans[problem] = plan
    return _plans[problem]


def gemm(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    *,
    a_t: bool = False,
    b_t: bool = False,
    accumulate: bool = False,
    prefer: str = "",
) -> Tensor:
    """out = a b (+ bias) (+ out when `accumulate`); rows contiguous in their last dimension."""
    problem = problem_of(a, b, out, a_t=a_t, b_t=b_t, bias=bias is not None, accumulate=accumulate)
    plan = plan_of(problem, prefer)
    if plan is None:
        raise NoAlgorithm(f"cublaslt: no algorithm without split-K for {problem}")
    return plan.run(a, b, out, bias)
