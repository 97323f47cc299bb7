"""Settings of the embedded engine. No torch here, so a command line can describe them cheaply."""

from __future__ import annotations

import msgspec

DRAFTS = ("none", "ngram", "suffix", "mtp", "eagle3")
VERIFICATIONS = ("gumbel", "rejection", "greedy")
CATCH_UP = ("whole", "keys", "captured")
DRAFT_PREFIX = "draft."
"""Before the names of a draft model's tensors in a weight update, which may bring all of them or none."""
MAX_DRAFT = 15
"""A page holds at least 16 tokens: the last token and its drafts never lie on more than two."""


class EmbeddedConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How much the embedded engine holds and does at once. No field but `tensor_parallel` changes a result.

    Example: EmbeddedConfig(max_running=32, kv_memory_bytes=256 << 20)
    """

    page_size: int | None = None
    """Tokens per page of the KV cache; a positive multiple of 16, which is how the kernels cut their key blocks. Left out: 64 on
    an accelerator, where the fast prefill kernel needs it, and 16 on the CPU."""
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
    """What proposes tokens that are then verified several at a time: "none", "ngram", "suffix", or a draft model, "mtp" or
    "eagle3". The output is the same."""
    draft_path: str | None = None
    """Directory of the draft model; for "mtp" left out, the layers that the policy's own directory holds."""
    draft_tokens: int = 4
    """Most draft tokens of a sequence in one step."""
    draft_adaptive: bool = True
    """Choose the draft length while running, by expected tokens per second, and 0 where drafts do not pay."""
    draft_tree: tuple[int, ...] = ()
    """Draft trees instead of chains: children of every node at depth 1, 2 ...; at most `draft_tokens` nodes are used."""
    draft_catch_up: str = "whole"
    """How a draft of one recycled layer makes entries that it lacks: "whole", a pass of its layer; "keys", their keys and values
    alone, all that is ever read of them; "captured", the same in CUDA graphs. The last two have not run on a GPU yet."""
    verification: str = "gumbel"
    """"gumbel": tokens are those of plain decoding, whatever is drafted. "rejection": they have its distribution, and depend on
    the draft. "greedy": for requests at temperature 0 only."""
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
    """Processes of this machine, each with a GPU of its own, that the model is divided over: 1, 2, 4 or 8. More than one is
    another numeric contract than one (`miles_kernels.nn.parallel`), the same for all numbers; `kv_memory_bytes` is each one's."""

    def validate(self) -> None:
        """Raise ValueError naming every field outside its range."""
        wrong = []
        if self.page_size is not None and (self.page_size < 16 or self.page_size % 16):
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
        wrong += self._wrong_drafts()
        if self.tensor_parallel not in (1, 2, 4, 8):
            wrong.append(f"tensor_parallel={self.tensor_parallel} must be 1, 2, 4 or 8")
        elif self.tensor_parallel > 1 and self.draft != "none":
            wrong.append(f"tensor_parallel={self.tensor_parallel} knows no drafts yet; set draft to none")
        if self.max_batched_tokens < self.max_running:
            wrong.append(
                f"max_batched_tokens={self.max_batched_tokens} must be at least max_running={self.max_running}, "
                "so that every running sequence can take a step"
            )
        if wrong:
            raise ValueError("embedded engine: " + "; ".join(wrong))

    def page_size_on(self, device_type: str) -> int:
        """Tokens per page on a device of this type ("cpu", "cuda")."""
        return self.page_size or (16 if device_type == "cpu" else 64)

    def _wrong_drafts(self) -> list[str]:
        wrong = []
        if self.draft_path is not None and self.draft not in ("mtp", "eagle3"):
            wrong.append(f"draft_path={self.draft_path!r} is for draft 'mtp' or 'eagle3', not {self.draft!r}")
        if self.draft == "eagle3" and self.draft_path is None:
            wrong.append("draft 'eagle3' needs draft_path, the directory of its weights")
        if any(width < 1 for width in self.draft_tree) or len(self.draft_tree) > MAX_DRAFT:
            wrong.append(f"draft_tree={self.draft_tree} must be up to {MAX_DRAFT} numbers of at least 1")
        if self.draft_catch_up not in CATCH_UP:
            wrong.append(f"draft_catch_up={self.draft_catch_up!r} must be one of {', '.join(CATCH_UP)}")
        if self.verification not in VERIFICATIONS:
            wrong.append(f"verification={self.verification!r} must be one of {', '.join(VERIFICATIONS)}")
        lossy = self.accept_single != 1.0 or self.accept_total != 1.0
        if not (0.0 < self.accept_single <= 1.0 and 0.0 < self.accept_total <= 1.0):
            wrong.append(f"accept_single={self.accept_single} and accept_total={self.accept_total} must lie in (0, 1]")
        elif lossy and self.verification != "rejection":
            wrong.append(f"accept_single and accept_total are for verification 'rejection', not {self.verification!r}")
        elif lossy and not self.allow_lossy:
            wrong.append(
                f"accept_single={self.accept_single}, accept_total={self.accept_total} change the sampled distribution, which "
                "breaks on-policy training; leave both at 1, or set allow_lossy"
            )
        return wrong
