"""The engine itself, synchronous: queue jobs, step, take what is ready. One thread at a time."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from miles_kernels.checksum import forget_tables
from miles_kernels.nn.decoder import Decoder
from miles_rollout.engine import MEMORY_TAGS
from miles_rollout.engines.embedded.config import DRAFT_PREFIX, EmbeddedConfig
from miles_rollout.engines.embedded.experts import ExpertStore
from miles_rollout.engines.embedded.features import FeatureStore
from miles_rollout.engines.embedded.flight import Flight, Start
from miles_rollout.engines.embedded.kv import PagedKV
from miles_rollout.engines.embedded.landing import Landing
from miles_rollout.engines.embedded.output import OutputProcessor
from miles_rollout.engines.embedded.pages import PagePool
from miles_rollout.engines.embedded.prefix import PrefixCache
from miles_rollout.engines.embedded.runner import Runner
from miles_rollout.engines.embedded.scheduler import Batch, Scheduler
from miles_rollout.engines.embedded.speculate import (
    HistoryProposer,
    Proposer,
    Speculator,
    make_controller,
    named_draft,
)
from miles_rollout.engines.embedded.speculate_model import ModelProposer
from miles_rollout.engines.embedded.state import Delivery, Job
from miles_rollout.engines.embedded.tables import Tables
from miles_rollout.engines.embedded.verification import Verifier
from miles_rollout.engines.embedded.weights import Staged, swap
from miles_rollout.text import Tokenizer
from miles_spec.draft import Draft
from miles_spec.models.base import DraftModel
from miles_spec.verifiers import Verifier as Rule
from miles_spec.verifiers import verifier

_FEW = 4
"""Rows from which a step's tokens are taken in by vector operations."""
MOST_OOM = 6
"""Failed allocations in a row after which the engine gives up."""


class EngineCore:
    """Continuous batching over one decoder. Call everything under `torch.inference_mode()`.

    With `overlap` a step starts its pass first and takes in the tokens of the step before while the device works. What is
    sampled does not depend on it: a sequence that has ended meanwhile is computed once more, and that token is dropped.

    Example:
        core.add(job)
        while core.has_work:
            for job, item in core.step(): ...
    """

    makes_room = True
    """Whether a step that found no memory is done again in smaller parts; not where other ranks are in the same step."""

    def __init__(
        self,
        decoder: Decoder,
        tokenizer: Tokenizer,
        config: EmbeddedConfig,
        *,
        num_pages: int,
        weight_version: int = 0,
        draft: Draft | DraftModel | None = None,
    ) -> None:
        shape, device = decoder.config, decoder.embed_tokens.device
        self._config, self._num_pages = config, num_pages
        self._decoder = decoder
        decoder.freeze_quantized()
        self.released: set[str] = set()
        """Memory given back, of MEMORY_TAGS; "weights" until new ones have come. No step may be made meanwhile."""
        self._pool = PagePool(num_pages)
        page_size = config.page_size_on(device.type)
        self._cache = PrefixCache(self._pool, page_size, config.prefix_cache)
        self._tables = Tables(config.max_running, page_size)
        draft = named_draft(config) if draft is None else draft
        self._num_drafts = 0
        self._flights: deque[list[Flight]] = deque()
        overlap = device.type == "cuda" if config.overlap is None else config.overlap
        self._ahead = 1 if overlap else 0
        self._kv = kv = PagedKV(
            layers=shape.num_hidden_layers,
            kv_heads=shape.num_key_value_heads,
            head_dim=shape.head_dim,
            num_pages=num_pages,
            page_size=page_size,
            dtype=next(decoder.parameters()).dtype,
            device=str(device),
        )
        experts = None
        if config.record_routed_experts and shape.num_experts:
            experts = ExpertStore(shape, (num_pages + 1) * page_size, device)
        max_context = min(config.max_context or shape.max_position_embeddings, shape.max_position_embeddings)
        self._runner = Runner(decoder, kv, self._tables, max_context=max_context, cuda_graphs=config.cuda_graphs, experts=experts)
        if self._runner.graphs is not None:
            self._runner.graphs.captures_prefill = config.cuda_graph_prefill
            self._runner.graphs.captures_drafts = config.cuda_graph_drafts
        self.speculator: Speculator | None = None
        if draft is not None:
            self.speculator = Speculator(draft, config.draft_tokens, make_controller(config), self._proposer_of)
            self.speculator.rejects = config.verification == "rejection"
            self.speculator.is_plain = self._runner.is_plain
            self._runner.verifier = Verifier(self._rule(), self._tables) if self.speculator.rejects else None
        self._scheduler = Scheduler(config, self._pool, self._cache, self._tables, self.speculator, self._land)
        self._outputs = OutputProcessor(tokenizer, decoder.contract.digest)
        self._landing = Landing(
            self._tables,
            self._runner,
            self._scheduler,
            self._outputs,
            self.speculator,
            tells_host=device.type == "cuda" or not self._ahead,
        )
        self._landing.weight_version = weight_version
        self._start = Start(*(np.zeros(0, np.int64) for _ in Start._fields))
        """Of the last step that drafted on the device."""
        self._num_steps = self._num_prompt = 0
        self._busy_s = 0.0
        self.num_oom = self._oom_in_a_row = 0
        if config.cuda_graph_lengths:
            self._capture_lengths()

    def _capture_lengths(self) -> None:
        """Capture decode steps, without drafts and with every number of them that may be chosen."""
        graphs, speculator = self._runner.graphs, self.speculator
        if graphs is None:
            return
        with torch.inference_mode():
            graphs.capture_decode()
            if speculator is not None and speculator.proposer.ahead is not None:
                most = self._config.draft_tokens
                speculator.proposer.ahead.capture(range(1 if self._config.draft_adaptive else most, most + 1))

    @property
    def weight_version(self) -> int:
        """The version of the weights held."""
        return self._landing.weight_version

    @property
    def num_generated(self) -> int:
        """Tokens sampled since start."""
        return self._landing.num_generated

    @property
    def has_work(self) -> bool:
        """Whether a step would do something: there is somebody to serve, and memory to do it in."""
        return not self.released and (self._scheduler.has_work or bool(self._flights))

    def add(self, job: Job) -> None:
        """Queue a request that `check_request` let through."""
        self._landing.jobs[job.request.request_id] = job
        self._num_prompt += job.num_prompt
        for seq in job.sequences:
            seq.start_version(self.weight_version)
        self._scheduler.add(job)

    def step(self) -> list[Delivery]:
        """Start a pass and a draw for every sequence, take in the tokens that have arrived; returns what became ready."""
        started = time.perf_counter()
        try:
            batch = self._scheduler.schedule()  # a draft model's passes allocate, too
            flights = self._launch(batch)
        except torch.OutOfMemoryError:
            if not self.makes_room:
                raise
            self._make_room()
            return self._outputs.take_deliveries()
        self._oom_in_a_row = 0
        if flights:
            self._flights.append(flights)
        at_once = batch.drafts is not None or (batch.is_empty and not flights)  # a draft's next tokens follow those accepted
        landed = self._land(keep=0 if at_once else self._ahead)
        if batch.is_empty and not flights and not landed and self.has_work and not self._scheduler.unblock():
            raise AssertionError(
                f"nothing can move: {self._scheduler.num_running} running, {len(self._scheduler.waiting)} waiting"
            )
        self._note_time(batch, time.perf_counter() - started, is_behind=bool(self._ahead) and not at_once)
        return self._outputs.take_deliveries()

    def _make_room(self) -> None:
        """After a failed allocation: drop graphs and cached pages, send what runs back to the queue, and take less at once.

        Its tokens stay and the next ones are drawn by key, so nothing that is sampled changes. As much as before is tried again
        after the next update, when there may be room.
        """
        self.num_oom += 1
        self._oom_in_a_row += 1
        if self._oom_in_a_row > MOST_OOM:
            raise torch.OutOfMemoryError(
                f"the engine has no memory for a step of {self._scheduler.most_tokens} tokens, with nothing else to give up; "
                "lower engine.max_batched_tokens or engine.kv_memory_bytes"
            )
        self._land()
        self._scheduler.retract_all()
        self._scheduler.most_tokens = max(1, self._scheduler.most_tokens // 2)
        if self._runner.graphs is not None:
            self._runner.graphs.forget()
        self._give_back()

    def _give_back(self) -> None:
        """What torch keeps for its next allocations goes back to the GPU, where another process may take it."""
        if self._decoder.embed_tokens.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def settle(self) -> list[Delivery]:
        """Take in every token that is on its way; returns what became ready by it."""
        self._land()
        return self._outputs.take_deliveries()

    def abort(self, request_id: str) -> list[Delivery]:
        """Finish a request now, with what it has; returns what became ready, nothing of it when it is not running."""
        self._land()
        job = self._landing.jobs.get(request_id)
        if job is not None:
            for seq in job.sequences:
                if seq.finish_reason is None:
                    self._outputs.abort(seq, self.weight_version)
                    self._landing.finish(seq)
        return self._outputs.take_deliveries()

    def retract_all(self) -> list[Delivery]:
        """Free all keys and values: what runs goes back to the queue, its tokens stay. Returns what became ready."""
        self._land()
        self._scheduler.retract_all()
        return self._outputs.take_deliveries()

    def flush(self) -> bool:
        """Forget cached prefixes; False, and nothing done, while any request is unfinished."""
        if self._landing.jobs:
            return False
        self._scheduler.forget_prefixes()
        return True

    def swap_weights(self, staged: Staged, version: int) -> list[Delivery]:
        """Replace all weights by a verified, complete set; returns what became ready under the old ones.

        Running requests go on under the new weights: they are retracted, so that their keys and values are computed
        again; their tokens stay, and their weight spans tell which version sampled what.

        Raises ValueError while "weights" are released: there is nothing to copy into.
        """
        self._require_weights()
        ready = self.retract_all()
        self._take(staged)
        if self.speculator is not None:
            self.speculator.forget(version if any(name.startswith(DRAFT_PREFIX) for name in staged) else None)
        self._decoder.freeze_quantized()
        self._landing.weight_version = version
        self._scheduler.most_tokens = self._config.max_batched_tokens
        self.released.discard("new weights")
        for seq in self._scheduler.waiting:
            seq.start_version(version)
        return ready

    def interrupt(self) -> None:
        """From any thread: end what a step may be waiting for outside this process. Nothing, here."""

    def close(self) -> None:
        """End what belongs to this core outside this process: nothing, here."""

    def _require_weights(self) -> None:
        if "weights" in self.released:
            raise ValueError("weight update: the memory of the weights is released; resume_memory first, then send it again")

    def _take(self, staged: Staged) -> None:
        with_draft = any(name.startswith(DRAFT_PREFIX) for name in staged)
        drafted = [(DRAFT_PREFIX + n, torch.empty_like(t)) for n, t in self.draft_state()] if with_draft else []
        swap(itertools.chain(self._decoder.hf_state(), drafted), staged)
        if drafted:
            assert self.speculator is not None and isinstance(self.speculator.draft, DraftModel)
            self.speculator.draft.load_named((name.removeprefix(DRAFT_PREFIX), tensor) for name, tensor in drafted)

    def draft_state(self) -> Iterator[tuple[str, Tensor]]:
        """(name in a checkpoint, tensor) of the draft model's weights; nothing without one."""
        if self.speculator is not None and isinstance(self.speculator.draft, DraftModel):
            yield from self.speculator.draft.named_state()

    def release(self, tags: Iterable[str]) -> None:
        """Give back the memory that `tags` name. Raises ValueError for an unknown or released tag, or while sequences run."""
        tags = tuple(tags)
        wrong = [f"unknown tag {tag!r}, known: {', '.join(MEMORY_TAGS)}" for tag in tags if tag not in MEMORY_TAGS]
        wrong += [f"{tag!r} has been released already" for tag in tags if tag in self.released]
        if self._scheduler.num_running or self._flights:
            wrong.append(f"{self._scheduler.num_running} sequences hold keys and values; pause with mode retract or abort first")
        if wrong:
            raise ValueError("release memory: " + "; ".join(wrong))
        self.released.update(tags)
        if "kv_cache" in tags:
            self._scheduler.forget_prefixes()
            for part in self._caches():
                part.release()
        if "weights" in tags:
            self._decoder.thaw_quantized()
            for parameter in self._decoder.parameters():
                parameter.untyped_storage().resize_(0)
            if self._decoder.embed_tokens.is_cuda:
                forget_tables()  # of updates: they would keep memory from the driver
        if self._runner.graphs is not None:
            self._runner.graphs.forget()  # they hold addresses of all of it
        self._give_back()

    def restore(self, tags: Iterable[str]) -> None:
        """Take memory back; weights are undefined until the next update. Raises ValueError for a tag not released."""
        tags = tuple(tags)
        strange = [tag for tag in tags if tag not in self.released]
        if strange:
            raise ValueError(f"resume memory: {', '.join(map(repr, strange))} has not been released")
        weights = list(self._decoder.parameters()) if "weights" in tags else []
        caches = list(self._caches()) if "kv_cache" in tags else []
        try:
            for part in caches:
                part.restore()
            for parameter in weights:
                parameter.untyped_storage().resize_(parameter.numel() * parameter.itemsize)
                parameter.zero_()
        except (RuntimeError, MemoryError):  # no room: all of it stays released
            for part in caches:
                part.release()
            for parameter in weights:
                parameter.untyped_storage().resize_(0)
            raise
        if "weights" in tags:
            self.released.add("new weights")
        self.released.difference_update(tags)
        if not self.released & set(MEMORY_TAGS):
            self._runner.forget_addresses()

    def metrics(self) -> dict[str, float]:
        """Counters since start and gauges of now. May be read while another thread steps; figures are then a step apart."""
        scheduler = self._scheduler
        where = self._decoder.embed_tokens.device
        return {
            "num_running": scheduler.num_running,
            "num_queued": len(scheduler.waiting),
            "num_oom": self.num_oom,
            "num_steps": self._num_steps,
            "num_prompt_tokens": self._num_prompt,
            "num_cached_tokens": scheduler.num_cached_tokens,
            "num_computed_tokens": self._runner.num_tokens,
            "num_generated_tokens": self._landing.num_generated,
            "num_retractions": scheduler.num_retractions,
            "kv_used_ratio": self._pool.num_owned / self._pool.num_pages,
            "weight_version": self.weight_version,
            "busy_s": self._busy_s,
            "generated_tokens_per_s": self._landing.num_generated / self._busy_s if self._busy_s else 0.0,
            **(self.speculator.metrics() if self.speculator is not None else {}),
            **({"device_reserved_bytes": torch.cuda.memory_reserved(where)} if where.type == "cuda" else {}),
        }

    def _caches(self) -> list[PagedKV | FeatureStore | ExpertStore]:
        """All that is kept per slot and may be released."""
        parts: list[PagedKV | FeatureStore | ExpertStore] = [self._kv]
        if self._runner.experts is not None:
            parts.append(self._runner.experts)
        if self._runner.features is not None:
            parts.append(self._runner.features)
        if self.speculator is not None and isinstance(self.speculator.proposer, ModelProposer):
            parts.append(self.speculator.proposer.kv)
        return parts

    def _rule(self) -> Rule:
        config = self._config
        single, total = config.accept_single, config.accept_total
        return verifier(config.verification, accept_single=single, accept_total=total, allow_lossy=config.allow_lossy)

    def _proposer_of(self, draft: Draft | DraftModel) -> Proposer:
        """What proposes with a draft. One with weights reads features, which are kept from its first use on."""
        self._num_drafts += 1
        if not isinstance(draft, DraftModel):
            if self._config.draft_tree and not getattr(draft, "makes_trees", False):
                raise ValueError(f"draft_tree={self._config.draft_tree}: {type(draft).__name__} makes chains only")
            return HistoryProposer(draft, self._decoder.config.vocab_size)
        layers, store = draft.config.feature_layers, self._runner.features
        if store is None or store.layers != layers:
            weight, slots = self._decoder.embed_tokens, (self._num_pages + 1) * self._tables.page_size
            store = FeatureStore(layers, draft.config.num_features, slots, weight.dtype, weight.device)
            self._runner.record(store)
        return ModelProposer(
            draft,
            self._decoder,
            self._tables,
            store,
            num_pages=self._num_pages,
            max_tokens=max(self._config.max_batched_tokens, self._config.max_running),
            widths=self._config.draft_tree,
            wants_probs=self._config.verification == "rejection",
            number=self._num_drafts,
            graphs=self._runner.graphs if self._config.cuda_graph_drafts else None,
            num_draft=self._config.draft_tokens,
            catch_up=self._config.draft_catch_up,
        )

    # ------------------------------------------------------------------ one step

    def _launch(self, batch: Batch) -> list[Flight]:
        """Start one pass and the draw of everybody who has one coming; nothing is waited for."""
        if not batch.ahead:
            return self._launch_rest(batch, 0)
        flight = self._launch_ahead(batch)
        if not batch.chunks and not self._scheduler.has_held:
            return [flight]
        return [flight, *self._launch_rest(Batch(batch.rows[:0], batch.chunks), len(batch.rows))]

    def _launch_ahead(self, batch: Batch) -> Flight:
        """A step of all decoding rows that drafts on the device, from tokens that may still be on their way."""
        speculator, tables, rows, unsure = self.speculator, self._tables, batch.rows, batch.unsure
        assert speculator is not None and speculator.proposer.ahead is not None
        if unsure is not None:
            tokens = np.where(unsure, -1, tables.last_token[rows]) if not self._flights else np.full(len(rows), -1)
            self._start = Start(rows, tokens, np.where(unsure, -1, tables.position[rows]), tables.last_position[rows])
        elif self._start.tokens is not self._start.position:  # the step before was the first
            nothing = np.full(len(rows), -1)
            self._start = Start(rows, nothing, nothing, tables.last_position[rows])
        flight = Flight(rows, tables.tail, None, speculator.proposer.ahead.launch(self._start, batch.ahead, batch.reach))
        flight.proposer = speculator.proposer
        self._runner.num_tokens += batch.num_decode_tokens
        self._scheduler.advance(batch, None)
        return flight

    def _launch_rest(self, batch: Batch, launched: int) -> list[Flight]:
        """The pass and the draws of a batch; the first `launched` decoding rows have theirs."""
        scheduler, runner = self._scheduler, self._runner
        known = self.speculator is not None and not self._flights
        whole = runner.launch_whole(batch, tokens_known=known)
        logits = runner.forward(batch, tokens_known=known) if whole is None else whole[0]
        scheduler.advance(batch, logits)
        forks = scheduler.fork()
        runner.copy_pages(scheduler.take_copies())
        rows = scheduler.decode_rows()  # the very array: what is known of these rows is looked up by it
        rows = rows[launched:] if launched else rows
        if whole is None:
            return [runner.draw(logits, forks, rows, batch.drafts)] if len(rows) else []
        drawn = len(whole[1].rows)
        rest = [runner.draw(None, forks, rows[drawn:])] if len(rows) > drawn else []
        return [whole[1], *rest] if drawn else rest

    def _land(self, keep: int = 0) -> bool:
        """Take in the tokens of all steps but the last `keep`; whether there were any."""
        landed = False
        while len(self._flights) > keep:
            landed = True
            for flight in self._flights.popleft():
                self._landing.take_in(flight)
        return landed

    def _note_time(self, batch: Batch, seconds: float, is_behind: bool) -> None:
        self._num_steps += 1
        self._busy_s += seconds
        if self.speculator is not None:
            self.speculator.note_step(len(batch.rows), bool(batch.chunks), seconds, is_behind)
