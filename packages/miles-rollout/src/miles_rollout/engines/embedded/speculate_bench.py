"""Draft lengths in the embedded engine: none, each fixed one, and the controller's, over numbers of rows and temperatures.

`miles-spec bench` is this module's command. Every arm decodes the same requests, in turn, to the same tokens; prefill is not
timed. The controller keeps what it learnt in the rounds before, of other temperatures, too.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import torch

from miles_kernels.contract import Contract
from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.config import DecoderConfig
from miles_kernels.nn.decoder import Decoder
from miles_rollout.engines.embedded.config import EmbeddedConfig
from miles_rollout.engines.embedded.core import EngineCore
from miles_rollout.engines.embedded.factory import DTYPES, load_draft_for, load_policy
from miles_rollout.engines.embedded.state import Job
from miles_rollout.text import CharTokenizer, Tokenizer, load_tokenizer
from miles_rollout.wire import GenerateRequest, GenerateResult, SamplingParams
from miles_spec.bench import BenchSettings, Cell
from miles_spec.control import Controller
from miles_spec.models import DraftModel, MtpDraft
from miles_spec.simulate import read_recorded
from miles_spec.simulate_control import Fixed

HEAD = 64
ALPHABET = "".join(chr(code) for code in range(0x4E00, 0x4E00 + 124))
"""Of the random model."""


def measure(settings: BenchSettings, told: Callable[[Cell], None] = lambda cell: None) -> list[Cell]:
    """Measure all cells; `told` hears of each as it is done.

    Raises ValueError for settings out of range, and for a directory or device that is not what they say.
    """
    settings.validate()
    decoder, tokenizer, draft = _models(settings)
    cells = []
    for rows in settings.rows:
        plain, drafting = (_engine(settings, decoder, tokenizer, rows, drafts, draft) for drafts in (False, True))
        controller = Controller(settings.num_draft)
        for heat in settings.temperatures:
            cells.append(_cell(settings, plain, drafting, controller, _requests(settings, rows, heat, decoder)))
            told(cells[-1])
    return cells


def machine_of(settings: BenchSettings) -> str:
    """The machine that measures, for the heading. Raises ValueError when it has no such device."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch sees no GPU")
    name = torch.cuda.get_device_name(0) if settings.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return f"{name}, torch {torch.__version__}"


def _models(settings: BenchSettings) -> tuple[Decoder, Tokenizer, DraftModel | None]:
    """Policy, tokenizer, and a draft with weights unless the draft has none."""
    named = "bfloat16" if settings.device == "cuda" else "float32"
    contract, dtype = Contract.for_device(settings.device, named), DTYPES[named]
    if settings.model is None:
        tokenizer: Tokenizer = CharTokenizer(ALPHABET)
        heads = settings.hidden // HEAD
        shape = DecoderConfig(
            family="qwen3", vocab_size=tokenizer.vocab_size, num_hidden_layers=settings.layers, hidden_size=settings.hidden,
            intermediate_size=3 * settings.hidden, num_attention_heads=heads, num_key_value_heads=heads, head_dim=HEAD,
            max_position_embeddings=max(1024, settings.prompt_tokens + settings.new_tokens + settings.num_draft + 1),
        )  # fmt: skip
        decoder = random_decoder(shape, 0, contract=contract, dtype=dtype, device=settings.device).requires_grad_(False)
        draft = MtpDraft.from_trunk(decoder).requires_grad_(False) if settings.draft == "mtp" else None
        return decoder, tokenizer, draft
    path = settings.model
    if not path.is_dir():
        raise ValueError(f"{path}: not a directory; a local model directory is wanted")
    decoder, tokenizer = load_policy(path, contract, named, settings.device), load_tokenizer(path)
    if settings.draft in ("ngram", "suffix"):
        return decoder, tokenizer, None
    return decoder, tokenizer, load_draft_for(decoder, path if settings.draft == "mtp" else settings.draft)


def _engine(
    settings: BenchSettings, decoder: Decoder, tokenizer: Tokenizer, rows: int, drafts: bool, model: DraftModel | None
) -> EngineCore:
    """An engine with room for `rows` requests, with the draft or without."""
    page = 64 if settings.device == "cuda" else 16
    longest = settings.prompt_tokens if settings.prompts is None else max(map(len, _recorded(settings)))
    named = settings.draft if drafts and model is None else "none"
    config = EmbeddedConfig(
        num_pages=rows * ((longest + settings.new_tokens) // page + 3) + 8, max_running=rows,
        max_batched_tokens=max(2048, 16 * rows), draft=named, draft_tokens=settings.num_draft, prefix_cache=False,
        overlap=settings.device == "cuda", draft_catch_up=settings.catch_up, cuda_graph_lengths=settings.graph_lengths,
    )  # fmt: skip
    config.validate()
    assert config.num_pages is not None
    return EngineCore(decoder, tokenizer, config, num_pages=config.num_pages, draft=model if drafts else None)


def _recorded(settings: BenchSettings) -> list[tuple[int, ...]]:
    """The prompts of the file named."""
    assert settings.prompts is not None
    return [sequence.token_ids[: sequence.num_prompt] for sequence in read_recorded(settings.prompts)]


def _requests(settings: BenchSettings, rows: int, heat: float, decoder: Decoder) -> list[GenerateRequest]:
    """As many as there are rows: the file's prompts over and over, or random ones."""
    rng = random.Random(rows)
    if settings.prompts is not None:
        known = _recorded(settings)
        prompts = [known[i % len(known)] for i in range(rows)]
    else:
        prompts = [tuple(rng.randrange(4, decoder.config.vocab_size) for _ in range(settings.prompt_tokens)) for _ in range(rows)]
    sampling = SamplingParams(max_new_tokens=settings.new_tokens, ignore_eos=True, seed=1, temperature=heat)
    return [
        GenerateRequest(request_id=f"r{i}", input_ids=ids, sample_ids=(i,), sampling=sampling) for i, ids in enumerate(prompts)
    ]


def _cell(
    settings: BenchSettings, plain: EngineCore, drafting: EngineCore, controller: Controller, requests: list[GenerateRequest]
) -> Cell:
    """All arms, in turn."""
    most, speculator = settings.num_draft, drafting.speculator
    assert speculator is not None
    rate: dict[Any, float] = {}
    step_s: dict[Any, float] = {}
    reference: dict[str, Any] = {}
    different, length = set(), 1.0
    speculator.controller = controller
    for _ in range(settings.settle):
        _decode(drafting, requests)
    for _ in range(settings.rounds):
        for arm in ("plain", *range(most + 1), "adaptive"):
            if arm != "plain":
                speculator.controller = controller if arm == "adaptive" else Fixed(most, int(arm))
            before = drafting.metrics()
            seconds, tokens, steps, done = _decode(plain if arm == "plain" else drafting, requests)
            rate[arm] = max(rate.get(arm, 0.0), tokens / seconds)
            step_s[arm] = min(step_s.get(arm, 1e9), seconds / steps)
            reference = reference or done
            if done != reference:
                different.add(arm)
            if arm == most:
                after = drafting.metrics()
                verified = after["spec_num_verified"] - before["spec_num_verified"]
                length = 1 + (after["spec_num_accepted"] - before["spec_num_accepted"]) / max(1, verified)
    return Cell(
        rows=len(requests), temperature=requests[0].sampling.temperature, accept_length=length, plain=rate["plain"],
        fixed=tuple(rate[k] for k in range(most + 1)), adaptive=rate["adaptive"],
        step_s=(step_s["plain"], *(step_s[k] for k in range(1, most + 1))), num_different=len(different),
    )  # fmt: skip


def _decode(core: EngineCore, requests: list[GenerateRequest]) -> tuple[float, int, int, dict[str, Any]]:
    """Seconds, tokens and steps of decoding the requests, and the tokens of each."""
    done: dict[str, Any] = {}
    began, tokens, steps = 0.0, 0, 0
    with torch.inference_mode():
        for arrival, request in enumerate(requests):
            core.add(Job(request, arrival, frozenset()))
        while core.has_work:
            if not began and not core._scheduler.prefilling and not core._scheduler.waiting:
                core.settle()
                began, tokens, steps = time.perf_counter(), core.num_generated, core._num_steps
            for delivery in core.step():
                assert isinstance(delivery.item, GenerateResult), delivery.item
                done[delivery.item.request_id] = delivery.item.completions[0].token_ids
    assert began, "prefill ended with the last token"
    return time.perf_counter() - began, core.num_generated - tokens, core._num_steps - steps, done
