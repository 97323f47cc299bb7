"""The engine itself, synchronous: queue jobs, step, take what is ready. One thread at a time."""

from __future__ import annotations

import time

from torch import Tensor

from miles_kernels.nn.decoder import Decoder
from miles_rollout.engines.embedded.config import EmbeddedConfig
from miles_rollout.engines.embedded.kv import PagedKV
from miles_rollout.engines.embedded.output import OutputProcessor, Token
from miles_rollout.engines.embedded.pages import PagePool
from miles_rollout.engines.embedded.prefix import PrefixCache
from miles_rollout.engines.embedded.runner import Runner
from miles_rollout.engines.embedded.scheduler import Scheduler
from miles_rollout.engines.embedded.speculate import make_speculator
from miles_rollout.engines.embedded.state import Delivery, Job, Sequence
from miles_rollout.engines.embedded.tables import Tables
from miles_rollout.engines.embedded.weights import swap
from miles_rollout.text import Tokenizer
from miles_spec.draft import Draft


class EngineCore:
    """Continuous batching over one decoder. Call everything under `torch.inference_mode()`.

    Example:
        core.add(job)
        while core.has_work:
            for job, item in core.step(): ...
    """

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        config: EmbeddedConfig,
        *,
        num_pages: int,
        weight_version: int = 0,
        draft: Draft | None = None,
    ) -> None:
        shape = decoder.config
        self.weight_version = weight_version
        self._decoder = decoder
        self._pool = PagePool(num_pages)
        self._cache = PrefixCache(self._pool, config.page_size, config.prefix_cache)
        self._tables = Tables(config.max_running, config.page_size)
        self.speculator = make_speculator(config, shape.vocab_size, draft)
        self._scheduler = Scheduler(config, self._pool, self._cache, self._tables, self.speculator)
        kv = PagedKV(
            layers=shape.num_hidden_layers,
            kv_heads=shape.num_key_value_heads,
            head_dim=shape.head_dim,
            num_pages=num_pages,
            page_size=config.page_size,
            dtype=next(decoder.parameters()).dtype,
            device=str(decoder.embed_tokens.device),
        )
        self._runner = Runner(decoder, kv, self._tables)
        self._outputs = OutputProcessor(tokenizer, decoder.contract.digest)
        self._jobs: dict[str, Job] = {}
        self._num_steps = self._num_generated = self._num_prompt = 0
        self._busy_s = 0.0

    @property
    def has_work(self) -> bool:
        """Whether a step would do something."""
        return self._scheduler.has_work

    def add(self, job: Job) -> None:
        """Queue a request that `check_request` let through."""
        self._jobs[job.request.request_id] = job
        self._num_prompt += job.num_prompt
        for seq in job.sequences:
            seq.start_version(self.weight_version)
        self._scheduler.add(job)

    def step(self) -> list[Delivery]:
        """One forward pass and a token, or several, for every sequence whose prompt is done; returns what became ready."""
        started = time.perf_counter()
        batch = self._scheduler.schedule()
        logits = self._runner.forward(batch)
        self._scheduler.advance(batch, logits)
        forks = self._scheduler.fork()
        self._runner.copy_pages(self._scheduler.take_copies())
        sequences, rows = self._scheduler.decoding, self._scheduler.decode_rows()
        if sequences:
            drawn = self._runner.sample(logits, forks, sequences, rows, batch.drafts)
            if self.speculator is not None and batch.drafts is not None:
                sequences, drawn = self.speculator.commit(batch.drafts, sequences, rows, self._tables, drawn)
            self._append(sequences, *drawn)
        elif batch.is_empty and self.has_work and not self._scheduler.unblock():
            raise AssertionError(
                f"nothing can move: {self._scheduler.num_running} running, {len(self._scheduler.waiting)} waiting"
            )
        seconds = time.perf_counter() - started
        self._num_steps += 1
        self._busy_s += seconds
        if self.speculator is not None:
            self.speculator.note_step(len(batch.rows), batch.num_decode_tokens, bool(batch.chunks), seconds)
        return self._outputs.take_deliveries()

    def abort(self, request_id: str) -> list[Delivery]:
        """Finish a request now, with what it has; returns its deliveries, none when it is not running."""
        job = self._jobs.get(request_id)
        if job is not None:
            for seq in job.sequences:
                if seq.finish_reason is None:
                    self._outputs.abort(seq, self.weight_version)
                    self._finish(seq)
        return self._outputs.take_deliveries()

    def swap_weights(self, staged: dict[str, Tensor], version: int) -> None:
        """Replace all weights by a verified, complete set.

        Running requests go on under the new weights: they are retracted, so that their keys and values are computed
        again; their tokens stay, and their weight spans tell which version sampled what.
        """
        self._scheduler.retract_all()
        swap(self._decoder.hf_state(), staged)
        self.weight_version = version
        for seq in self._scheduler.waiting:
            seq.start_version(version)

    def metrics(self) -> dict[str, float]:
        """Counters since start and gauges of now. May be read while another thread steps; figures are then a step apart."""
        scheduler = self._scheduler
        return {
            "num_running": scheduler.num_running,
            "num_queued": len(scheduler.waiting),
            "num_steps": self._num_steps,
            "num_prompt_tokens": self._num_prompt,
            "num_cached_tokens": scheduler.num_cached_tokens,
            "num_computed_tokens": self._runner.num_tokens,
            "num_generated_tokens": self._num_generated,
            "num_retractions": scheduler.num_retractions,
            "kv_used_ratio": self._pool.num_owned / self._pool.num_pages,
            "weight_version": self.weight_version,
            "busy_s": self._busy_s,
            "generated_tokens_per_s": self._num_generated / self._busy_s if self._busy_s else 0.0,
            **(self.speculator.metrics() if self.speculator is not None else {}),
        }

    def _append(self, sequences: list[Sequence], tokens: list[int], logprobs: list[float], sampled: list[float]) -> None:
        """Hand each sequence its token, or its tokens in order, and take out the finished ones.

        A row without a token (NaN logits) fails its request.
        """
        for seq, token, logprob, sampled_logprob in zip(sequences, tokens, logprobs, sampled, strict=True):
            if seq.finish_reason is not None:
                continue  # its request failed a moment ago, or a stop rule held inside a block of draft tokens
            self._num_generated += 1
            try:
                if token < 0:
                    raise ArithmeticError(
                        f"request {seq.job.request.request_id!r}: the logits after {seq.num_tokens} tokens hold NaN or infinity "
                        f"under weight version {self.weight_version}; the weights are damaged or training has diverged"
                    )
                finished = self._outputs.append(seq, Token(token, logprob, sampled_logprob), self.weight_version)
                if finished:
                    self._finish(seq)
            except Exception as error:  # one request's fault, delivered to whoever awaits it; the others go on
                self._fail(seq.job, error)

    def _finish(self, seq: Sequence) -> None:
        self._scheduler.finish(seq)
        self._outputs.close(seq)
        if not seq.job.unfinished:
            del self._jobs[seq.job.request.request_id]

    def _fail(self, job: Job, error: Exception) -> None:
        """End a request in an error of its own. Its pages may hold NaN, so none is offered to others."""
        for seq in job.sequences:
            if seq.row >= 0 or seq.finish_reason is None:
                seq.finish_reason = "abort"
                self._scheduler.finish(seq)
        self._scheduler.forget_prefixes()
        self._jobs.pop(job.request.request_id, None)
        self._outputs.fail(job, error)
