"""The numeric contract: what every op of the one forward pass computes, as a value with a digest."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from miles_kernels import native
from miles_kernels.ops.attention_plan import KEY_MULTIPLE
from miles_kernels.ops.logprob import VOCAB_CHUNK
from miles_kernels.ops.matmul import COLUMN_MULTIPLE, KV_BLOCK, MIN_ROWS, NARROW_COLUMNS, Mode
from miles_kernels.probe import probe

SCHEMA = "mk1"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class OpContract:
    """One op: who computes it, in what precision, in what order."""

    backend: str
    compute: str
    order: str


def _reference(order: str) -> OpContract:
    return OpContract("reference", "float32", order)


def _reference_ops() -> dict[str, OpContract]:
    return {
        "matmul": _reference(f"rows>={MIN_ROWS};columns<{NARROW_COLUMNS} padded to {COLUMN_MULTIPLE}"),
        "linear": _reference("product, bias, one rounding"),
        "grouped_linear": _reference("one product per expert, rows in slot-stable expert order"),
        "rms_norm": _reference("hf: normalise, round, weight"),
        "rope": _reference("rotate-half;angles float64;table float32;one rounding"),
        "swiglu": _reference("g/(1+exp(-g))*u, one rounding"),
        "attention": _reference(f"scale q;row softmax;pv blocks of {KV_BLOCK} keys, cut to {KEY_MULTIPLE}, ascending"),
        "router": _reference("softmax all experts;top-k by (-probability, expert id);renormalise"),
        "moe_combine": _reference("weight after down projection;slot order;one rounding"),
        "embedding": _reference("row copy"),
        "logprob": _reference(f"divide by temperature;online lse over ascending chunks of {VOCAB_CHUNK}"),
        "sample": _reference("gumbel from (seed, sample id, position, id): a block of 128 ids by its mass, then an id of it"),
    }


PRECISIONS = ("full", "fp8")
CUDA_KERNELS = "cuda2"
"""Generation of the kernels for CUDA: raised whenever the decoder's bits change on the same input."""


def _fp8(ops: dict[str, OpContract]) -> dict[str, OpContract]:
    """Products of the blocks' weights in float8; router, embedding and output scores stay as they are."""
    order = "scales of 1x128 and 128x128 columns: max/448; blocks of 128 ascending; bias; one rounding"
    return ops | {name: OpContract(ops[name].backend, "float8 e4m3", order) for name in ("linear", "grouped_linear")}


def _cuda_ops() -> dict[str, OpContract]:
    def op(order: str) -> OpContract:
        return OpContract("cuda", "bfloat16 products, float32 sums", order)

    return _reference_ops() | {
        "matmul": op("k ascending in one accumulator; no split"),
        "attention": op("keys in blocks of 64, folded every 512; base 2; row sums by the tensor core"),
        "logprob": op(
            "blocks of 128 columns, integer sums of rounded exponentials; "
            "gradient in steps of 60 MiB to four times the hidden size, sums of 24 bits"
        ),
        "moe_combine": op("swiglu in the gate-up product; slot order; one rounding"),
    }


def _kernels() -> str:
    return native.status() if native.library() is not None else "torch"


@dataclass(frozen=True)
class Contract:
    """Frozen description of the forward pass. Two sides with equal digests compute equal bits.

    Example:
        contract = Contract.reference("bfloat16")
        linear(x, weight, mode=contract.matmul)
        assert engine_digest == contract.digest
    """

    dtype: str
    """dtype of parameters and activations: "float32" or "bfloat16"; all arithmetic is float32"""
    matmul: Mode
    """how products are computed: "native" BLAS or "tile"s of it (proved by the probe), or "exact" grid arithmetic"""
    platform: str
    """fingerprint of this machine's bits (`ProbeReport.fingerprint`): another BLAS or CPU may round differently"""
    kernels: str = "torch"
    """who computes ops other than products: "torch", "c1-" and the digest of the C kernels' sources, or `CUDA_KERNELS`"""
    ops: dict[str, OpContract] = field(default_factory=_reference_ops)
    schema: str = SCHEMA

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"contract dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def precision(self) -> str:
        """ "fp8" when the blocks' products are float8 in the forward (`ops.fp8`), else "full"."""
        return "fp8" if self.ops["linear"].compute.startswith("float8") else "full"

    @property
    def torch_dtype(self) -> torch.dtype:
        """`dtype` as torch knows it."""
        return DTYPES[self.dtype]

    @functools.cached_property
    def digest(self) -> str:
        """ "mk1-" and 12 hex digits of the SHA-256 of the canonical JSON."""
        return f"{self.schema}-{hashlib.sha256(self.to_json().encode()).hexdigest()[:12]}"

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Contract:
        """Inverse of `to_json`. Raises ValueError when fields are missing or unknown."""
        data: dict[str, Any] = json.loads(text)
        try:
            return cls(**{**data, "ops": {name: OpContract(**op) for name, op in data["ops"].items()}})
        except (TypeError, KeyError) as error:
            raise ValueError(f"not a contract of schema {SCHEMA}: {error}") from None

    @classmethod
    def reference(cls, dtype: str = "float32", *, matmul: Mode | None = None, precision: str = "full") -> Contract:
        """The CPU reference backend of this process; runs the probe at first use.

        `matmul` forces a mode; forcing "native" where the probe failed raises ValueError naming a failed case. `precision`
        "fp8" emulates float8 products.
        """
        setting = torch.get_float32_matmul_precision()
        if setting != "highest":
            raise ValueError(f'float32 matmul precision is {setting!r}; call torch.set_float32_matmul_precision("highest")')
        report = probe()
        if matmul == "native" and report.failures:
            raise ValueError(f"native GEMM is not batch-invariant in this process, e.g. {report.failures[0]}; use matmul=None")
        contract = cls(dtype=dtype, matmul=matmul or report.mode, platform=report.fingerprint, kernels=_kernels())
        return contract.with_precision(precision)

    @classmethod
    def for_device(cls, device: str | torch.device, dtype: str = "float32", precision: str = "full") -> Contract:
        """The contract of a device: the reference on "cpu", the Triton order of sums on "cuda" (bfloat16 only).

        `precision` "fp8" opts in to block-scaled float8 products in the forward, with a bfloat16 (or float32) backward.

        Which library serves a product on CUDA (Triton, cuBLASLt, DeepGEMM) is no part of it: each has to prove at start-up
        that it has Triton's bits. Raises ValueError where the device is missing or the dtype has no kernels.
        """
        kind = torch.device(device).type
        if kind == "cpu":
            return cls.reference(dtype, precision=precision)
        from miles_kernels.cuda import ready

        index = torch.device(device).index
        wrong = ready.problem(index or 0) if kind == "cuda" else "there are no kernels for it"
        if wrong is not None:
            raise ValueError(f"device {device!r}: {wrong}; use cpu")
        if dtype != "bfloat16":
            raise ValueError(f"the kernels for cuda compute in bfloat16, not {dtype}; set dtype to bfloat16")
        platform = f"{torch.cuda.get_device_name(device)};triton {ready.triton_version()}"
        contract = cls(dtype=dtype, matmul="native", platform=platform, kernels=CUDA_KERNELS, ops=_cuda_ops())
        return contract.with_precision(precision)

    def with_dtype(self, dtype: str) -> Contract:
        """The same contract for another parameter dtype."""
        return replace(self, dtype=dtype)

    def with_precision(self, precision: str) -> Contract:
        """The same contract with "full" or "fp8" products. Raises ValueError for another word."""
        if precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        if precision == self.precision:
            return self
        plain = _cuda_ops() if self.kernels == CUDA_KERNELS else _reference_ops()
        restored = self.ops | {name: plain[name] for name in ("linear", "grouped_linear")}
        return replace(self, ops=_fp8(restored) if precision == "fp8" else restored)

    def with_rules(self, rules: Mapping[str, str]) -> Contract:
        """The same contract, ops that are keys computed by another rule, in words: what `DecoderConfig.rules` says of a model.

        A decoder adds its own. Without rules the contract, and so its digest, stays as it is.
        """
        base = self.ops["router"]
        changed = {name: replace(self.ops.get(name, base), order=rule) for name, rule in rules.items()}
        ops = self.ops | changed
        return self if ops == self.ops else replace(self, ops=ops)

    def difference(self, other: Contract) -> list[str]:
        """Names of the fields and ops in which two contracts differ, for error messages."""
        plain = ("schema", "dtype", "matmul", "platform", "kernels")
        names = [name for name in plain if getattr(self, name) != getattr(other, name)]
        ops = sorted(self.ops.keys() | other.ops.keys())
        return names + [f"ops.{name}" for name in ops if self.ops.get(name) != other.ops.get(name)]
