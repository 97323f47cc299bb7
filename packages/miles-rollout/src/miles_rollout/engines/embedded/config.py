"""Settings of the embedded engine. No torch here, so a command line can describe them cheaply."""

from __future__ import annotations

import msgspec

DRAFTS = ("none", "ngram", "suffix")
MAX_DRAFT = 15
"""A page holds at least 16 tokens: the last token and its drafts never lie on more than two."""


class EmbeddedConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much the embedded engine holds and does at once. No field changes a result, only speed and memory.

    Example: EmbeddedConfig(max_running=32, kv_memory_bytes=256 << 20)
    """

    page_size: int = 16
    """Tokens per page of the KV cache; a positive multiple of 16, which is how the kernels cut their key blocks."""
    kv_memory_bytes: int = 1 << 30
    """Most bytes of keys and values, all layers together. Memory is touched only where pages have been used."""
    num_pages: int | None = None
    """Pages in the pool, instead of `kv_memory_bytes`."""
    max_running: int = 128
    """Most sequences that are prefilled or decoded in one step."""
    max_batched_tokens: int = 2048
    """Most tokens of one forward pass, decode and prefill together; at least `max_running`."""
    prefill_chunk: int = 512
    """Most prompt tokens of one sequence in one forward pass."""
    max_context: int | None = None
    """Most tokens of one sequence, prompt and completion; at most, and by default, what the model supports."""
    prefix_cache: bool = True
    """Keep the pages of finished sequences and reuse those a later prompt starts with."""
    draft: str = "none"
    """What proposes tokens that are then verified several at a time: "none", "ngram" or "suffix". The output is the same."""
    draft_tokens: int = 4
    """Most draft tokens of a sequence in one step."""
    draft_adaptive: bool = True
    """Choose the draft length while running, by expected tokens per second, and 0 where drafts do not pay."""
    overlap: bool | None = None
    """Start a step before the tokens of the one before have been looked at; left out, on an accelerator only."""
    cuda_graphs: bool = True
    """Capture plain decode steps and launch each as a whole; without effect on the CPU."""
    cuda_graph_prefill: bool = True
    """Capture small steps that prefill, too."""
    record_routed_experts: bool = False
    """Keep which experts every token went to, so that requests may ask for it."""

    def validate(self) -> None:
        """Raise ValueError naming every field outside its range."""
        wrong = []
        if self.page_size < 16 or self.page_size % 16:
            wrong.append(f"page_size={self.page_size} must be a positive multiple of 16")
        for name in ("kv_memory_bytes", "max_running", "max_batched_tokens", "prefill_chunk"):
            if getattr(self, name) < 1:
                wrong.append(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("num_pages", "max_context"):
            value = getattr(self, name)
            if value is not None and value < 1:
                wrong.append(f"{name}={value} must be at least 1, or left out")
        if self.draft not in DRAFTS:
            wrong.append(f"draft={self.draft!r} must be one of {', '.join(DRAFTS)}")
        if not 1 <= self.draft_tokens <= MAX_DRAFT:
            wrong.append(f"draft_tokens={self.draft_tokens} must lie in 1..{MAX_DRAFT}")
        if self.max_batched_tokens < self.max_running:
            wrong.append(
                f"max_batched_tokens={self.max_batched_tokens} must be at least max_running={self.max_running}, "
                "so that every running sequence can take a step"
            )
        if wrong:
            raise ValueError("embedded engine: " + "; ".join(wrong))
