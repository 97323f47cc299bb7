"""The `[engine]` section: the fields of `miles_rollout`'s EmbeddedConfig, with the same defaults (a test compares them)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import model_validator

from miles_core.config.base import Section

if TYPE_CHECKING:
    from miles_rollout.engines.embedded.config import EmbeddedConfig


class EngineConfig(Section):
    """How much the embedded engine holds and does at once. No field changes a result but `tensor_parallel`, `max_context` and
    `verification` with its lossy settings."""

    page_size: int | None = None
    """Tokens per page of the KV cache; a positive multiple of 16. Left out: 64 on an accelerator, 16 on the CPU."""
    kv_memory_bytes: int = 1 << 30
    """Most bytes of keys and values, all layers together."""
    num_pages: int | None = None
    """Pages in the pool, instead of `kv_memory_bytes`."""
    max_running: int = 128
    """Most sequences prefilled or decoded in one engine step."""
    max_batched_tokens: int = 2048
    """Most tokens of one engine step, decode and prefill together; at least `max_running`."""
    prefill_chunk: int = 512
    """Most prompt tokens of one sequence in one engine step."""
    max_context: int | None = None
    """Most tokens of one sequence, prompt and completion; at most, and by default, what the model supports."""
    prefix_cache: bool = True
    """Keep the pages of finished sequences and reuse those a later prompt starts with."""
    draft: str = "none"
    """What proposes tokens that are verified several at a time: "none", "ngram", "suffix", "mtp" or "eagle3". The output is the
    same."""
    draft_path: str | None = None
    """Directory of the draft model; for "mtp" left out, the layers that the policy's own directory holds."""
    draft_tokens: int = 4
    """Most draft tokens of a sequence in one step."""
    draft_adaptive: bool = True
    """Choose the draft length while running, by expected tokens per second, and 0 where drafts do not pay."""
    draft_tree: tuple[int, ...] = ()
    """Draft trees instead of chains: children of every node at depth 1, 2 ..."""
    draft_catch_up: str = "whole"
    """How a draft of one recycled layer makes entries that it lacks: "whole", a pass of its layer; "keys", their keys and values
    alone, all that is ever read of them; "captured", the same in CUDA graphs. The last two have not run on a GPU yet."""
    verification: str = "gumbel"
    """"gumbel": tokens are those of plain decoding. "rejection": they have its distribution. "greedy": for temperature 0 only."""
    accept_single: float = 1.0
    """Below 1 lossy, for "rejection": a draft token at least this likely is always accepted."""
    accept_total: float = 1.0
    """Below 1 lossy, for "rejection": chances of acceptance are divided by this."""
    allow_lossy: bool = False
    """Let the two above change the distribution that is sampled, which on-policy training cannot correct."""
    overlap: bool | None = None
    """Start a step before the tokens of the one before have been looked at; left out, on an accelerator only."""
    cuda_graphs: bool = True
    """Capture plain decode steps and launch each as a whole; without effect on the CPU."""
    cuda_graph_drafts: bool = True
    """Capture drafting and verification of chains, too; without effect on the CPU."""
    cuda_graph_lengths: bool = False
    """Capture decode steps without drafts and with every draft length when the engine starts, not when one first comes up; for
    rows of up to 2,048 keys. Takes a while, and is not done again after a sleep that drops graphs. Not yet run on a GPU."""
    cuda_graph_prefill: bool = True
    """Capture small steps that prefill, too."""
    record_routed_experts: bool = False
    """Keep which experts every token went to, so that requests may ask for it."""
    tensor_parallel: int = 1
    """Processes of one machine, each with a GPU of its own, that the model is divided over: 1, 2, 4 or 8. With more than one the
    trainer computes the same folded sums, which are another numeric contract than that of 1."""

    @model_validator(mode="after")
    def _as_the_engine_sees_it(self) -> EngineConfig:
        self.embedded().validate()
        return self

    def embedded(self) -> EmbeddedConfig:
        """The same values as the engine's own type."""
        from miles_rollout.engines.embedded.config import EmbeddedConfig

        return EmbeddedConfig(**self.model_dump())
