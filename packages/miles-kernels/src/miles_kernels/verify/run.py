"""One verification run: choose subjects, run their axes, add the negative controls, report."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from miles_kernels.verify import attention_axes, controls, decoder_case, extra_cases, golden, model_axes, op_cases, row_axes
from miles_kernels.verify.backends import Backend, backend
from miles_kernels.verify.blocks import FAMILIES, shape
from miles_kernels.verify.report import Report, machine
from miles_kernels.verify.result import Control, Row, Tally

OPS = (*op_cases.NAMES, *extra_cases.FP8_NAMES, "row_parallel_linear", "attention", "window_attention", "latent_attention")
GPU_OPS = (*OPS, "compiled")
"""On a GPU code compiled by torch.compile is covered too."""
MODELS = (*(f"model {family}" for family in FAMILIES), *(f"decoder {name}" for name in decoder_case.CASES))
DTYPES = ("float32", "bfloat16")


def subjects(what: str, device: str = "cpu") -> tuple[str, ...]:
    """Names a request stands for: "op", "model", "all", or a single one. Raises ValueError listing what there is."""
    ops = GPU_OPS if device == "cuda" else OPS
    if what in ("op", "ops"):
        return ops
    if what == "model":
        return MODELS
    if what == "all":
        return (*ops, *MODELS)
    if what in ops or what in MODELS:
        return (what,)
    if f"model {what}" in MODELS:
        return (f"model {what}",)
    known = ", ".join((*ops, *FAMILIES, *(name for name in MODELS if name.startswith("decoder"))))
    raise ValueError(f"nothing called {what!r} to verify on {device}; there is: op, model, all, {known}")


def verify(
    what: str | Sequence[str] = "all",
    *,
    device: str = "cpu",
    dtype: str = "bfloat16",
    seed: int = 0,
    bisect: bool = False,
    tell: Callable[[Row], None] = lambda row: None,
) -> Report:
    """Verify on a device and return the report; `tell` sees each row as it is finished.

    Raises ValueError for an unknown subject, a missing device, or float32 on CUDA (its kernels are for bfloat16).
    """
    asked = (what,) if isinstance(what, str) else what
    names = tuple(dict.fromkeys(name for one in asked for name in subjects(one, device)))
    if dtype not in DTYPES or (device == "cuda" and dtype != "bfloat16"):
        raise ValueError(f"dtype must be {' or '.join(DTYPES)} on the CPU and bfloat16 on CUDA, got {dtype!r} for {device}")
    ops = backend(device)
    kind: torch.dtype = getattr(torch, dtype)
    began = time.perf_counter()
    rows: list[Row] = []
    for row in _rows(ops, names, kind, seed):
        rows.append(row)
        tell(row)
    caught: list[Control] = list(controls.controls(device, kind, model=any(name in MODELS for name in names)))
    found = _bisect(ops, names, kind, seed) if bisect else ""
    contract = _contract(device, dtype)
    return Report(device, dtype, contract, tuple(rows), tuple(caught), time.perf_counter() - began, found, machine(device))


def _contract(device: str, dtype: str) -> str:
    if device == "cuda":
        return "cuda, order of reductions as in miles_kernels.cuda"
    from miles_kernels.contract import Contract

    return Contract.reference(dtype).digest


def _rows(ops: Backend, names: Sequence[str], dtype: torch.dtype, seed: int) -> Iterator[Row]:
    large = ops.device == "cuda"
    sizes = row_axes.SIZES if large else row_axes.FEW_SIZES
    for name in names:
        if name in op_cases.NAMES:
            (op,) = op_cases.row_ops(ops, dtype, large=large, seed=seed, names=(name,))
        elif name in extra_cases.FP8_NAMES:
            (op,) = extra_cases.fp8_ops(ops.device, dtype, large=large, seed=seed, names=(name,))
        else:
            continue
        yield from row_axes.verify_rows(op, sizes=_affordable(op, sizes), seed=seed)
        if name == "linear":
            yield op_cases.column_shards(ops, dtype)
        if name == "router":
            yield op_cases.router_ties(ops)
        if name == "moe":
            yield op_cases.expert_load(ops, dtype)
    for name in names:
        if name in ("attention", "window_attention", "latent_attention"):
            yield from attention_axes.verify_attention(_attention(ops, name, dtype, seed, large))
    if "row_parallel_linear" in names:
        yield extra_cases.row_shards(ops.device, dtype, large=large)
    if "compiled" in names:
        yield extra_cases.compiled(ops.device, dtype)
    for family in FAMILIES:
        if f"model {family}" in names:
            yield from model_axes.verify_model(_model(ops, family, dtype, seed))
    for name in decoder_case.CASES:
        if f"decoder {name}" in names:
            size = shape(name.split()[0], large=large)
            yield from decoder_case.verify_decoder(ops, size, dtype, _lengths(large), name, seed)
    if "model qwen3_moe" in names:
        yield _restart(ops, dtype)


def _affordable(op: row_axes.RowOp, sizes: Sequence[int]) -> Sequence[int]:
    """All sizes for most ops; every fourth for those that read a whole vocabulary or all experts per row."""
    heavy = op.name in ("logprob", "logits_logprob", "sample", "moe", "fp8_moe") and len(sizes) > 100
    return sizes if not heavy else (*sizes[:20], *sizes[20::4])


def _attention(ops: Backend, name: str, dtype: torch.dtype, seed: int, large: bool) -> attention_axes.AttentionCase:
    latent = name == "latent_attention"
    if large:
        lengths = [700, 1300, 95, 1, 513, 64]
        heads, kv_heads, dim, dim_v = (16, 16, 192, 128) if latent else (32, 8, 128, 128)
    else:
        lengths = [150, 300, 33, 1, 90, 64]
        heads, kv_heads, dim, dim_v = (4, 4, 48, 32) if latent else (4, 2, 32, 32)
    window = 100 if name == "window_attention" else None
    return attention_axes.AttentionCase(
        ops, dtype, name=name, lengths=lengths, heads=heads, kv_heads=kv_heads, dim=dim, dim_v=dim_v, window=window, seed=seed
    )


def _model(ops: Backend, family: str, dtype: torch.dtype, seed: int) -> model_axes.ModelCase:
    large = ops.device == "cuda"
    return model_axes.ModelCase(ops, shape(family, large=large), dtype, _lengths(large), seed)


def _lengths(large: bool) -> list[int]:
    return [700, 90, 260, 1, 33, 140] if large else [270, 130, 66, 1, 190, 33]


def _restart(ops: Backend, dtype: torch.dtype) -> Row:
    """A fresh process, with an empty kernel cache, against this one."""
    start = time.perf_counter()
    here, count = golden.digest(ops.device, dtype)
    there = golden.digest_of_child(ops.device, dtype)
    tally = Tally()
    tally.elements = count
    if here != there:
        tally.unequal, tally.worst = count, f"digest {there[:12]} in a fresh process, {here[:12]} here"
    return tally.row("model qwen3_moe", 11, time.perf_counter() - start)


def _bisect(ops: Backend, names: Sequence[str], dtype: torch.dtype, seed: int) -> str:
    for family in FAMILIES:
        if f"model {family}" in names:
            found = model_axes.first_difference(_model(ops, family, dtype, seed))
            if found is not None:
                return f"{family}: {found}"
    return "no op of any model differs in any schedule"
