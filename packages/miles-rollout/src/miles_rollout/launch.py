"""What a command line builds before it serves: an engine, its tokenizer, and how new weights are read from disk."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from miles_rollout.engine import EngineRefusal
from miles_rollout.extras import require
from miles_rollout.waits import expired, gather_all
from miles_rollout.wire import GenerateRequest, SamplingParams

if TYPE_CHECKING:
    from miles_rollout.engine import Engine
    from miles_rollout.engines.embedded.config import EmbeddedConfig
    from miles_rollout.engines.embedded.engine import EmbeddedEngine
    from miles_rollout.engines.sglang.config import SglangConfig
    from miles_rollout.server.service import WeightLoader
    from miles_rollout.text import Tokenizer


LOG = logging.getLogger("miles_rollout.launch")
FILL = 0.85
"""Share of a GPU's free memory, less the weights and one update of them, that keys and values take when nobody says."""
NCCL_BYTES = 1400 << 20
"""What NCCL's communicator takes on every GPU that holds a part of a model."""
ASK_S = 180.0
"""Longest wait for several GPUs to tell how much of them is free."""
_ASKS = "import sys, torch; print(min(torch.cuda.mem_get_info(i)[0] for i in range(int(sys.argv[1]))))"
WARM_S = 600.0
"""Longest wait for all the first requests of a start."""
_WARM: tuple[tuple[tuple[int, ...], int], ...] = (((1,), 1), (tuple(range(9, 17)), 32), ((700,), 4))
"""Rounds of requests that a start makes: lengths of the prompts, new tokens."""


def load_embedded(
    model: str,
    config: EmbeddedConfig,
    *,
    device: str = "cpu",
    dtype: str | None = "float32",
    threads: int | None = None,
    fill: bool = False,
) -> tuple[Engine, Tokenizer, WeightLoader]:
    """Engine, tokenizer and weight loader of a local model directory.

    `device`: "cpu", "cuda", or "auto", a GPU if torch sees one. `dtype` None: bfloat16 on a GPU, else float32. With `fill` keys
    and values take what a GPU has left, whatever `config.kv_memory_bytes` says. Raises ValueError naming what is wrong with
    model or settings, MissingExtraError naming the extra to install.
    """
    config.validate()
    if threads is not None and threads < 1:
        raise ValueError(f"--threads {threads} must be at least 1")
    if not Path(model).is_dir():
        raise ValueError(f"{model}: not a directory; give a local one with config.json, safetensors and tokenizer files")
    purpose = "the embedded engine"
    torch = require("torch", extra="embedded", purpose=purpose)
    require("xxhash", extra="embedded", purpose=purpose)
    env = require("miles_kernels.env", extra="embedded", purpose=purpose)
    env.prepare_process()
    if threads is not None:
        torch.set_num_threads(threads)
    place = _device(torch, device)
    dtype = dtype or ("float32" if place.type == "cpu" else "bfloat16")
    LOG.info("the engine runs on %s in %s", torch.cuda.get_device_name(place) if place.type == "cuda" else "the CPU", dtype)
    if place.type == "cuda" and fill:
        config = msgspec.structs.replace(config, kv_memory_bytes=_left_on_gpu(torch, place, model, dtype, config.tensor_parallel))
    factory = require("miles_rollout.engines.embedded.factory", extra="embedded", purpose=purpose)
    engine = factory.load_engine(model, config, dtype=dtype, device=str(place))
    if config.max_context is not None and config.max_context > (most := engine.info().max_context):
        LOG.warning("max_context=%d is more than this model's %d tokens, which hold", config.max_context, most)
    return engine, engine.tokenizer, disk_loader(dtype)


async def warm_up(engine: EmbeddedEngine) -> None:
    """Serve a few requests of usual shapes, and forget them; shorter and fewer ones where the cache is small.

    Kernels are compiled at their first use, which can take a minute on a machine that has never run them, and an engine that
    compiles looks like one that hangs. What the engine refuses is left out.

    Raises WaitExpired when all of it takes longer than `WARM_S` seconds.
    """
    began = time.monotonic()
    try:
        async with asyncio.timeout(WARM_S):
            for number in range(len(_WARM)):
                try:
                    await gather_all(engine.generate(request) for request in _first_requests(engine, number))
                except EngineRefusal as refusal:
                    LOG.warning("a start leaves out its requests of round %d: %s", number, refusal)
            await engine.flush_cache()
    except TimeoutError:
        raise expired("the engine to serve its first requests", WARM_S) from None
    LOG.info("warm after %.1f s", time.monotonic() - began)


def _first_requests(engine: EmbeddedEngine, number: int) -> list[GenerateRequest]:
    """A round of `_WARM`, of which all rows fit the cache at once."""
    info, (pages, page_size), (lengths, new) = engine.info(), engine.cache_pages, _WARM[number]
    lengths = lengths[:pages]
    most = min(info.max_context, pages // len(lengths) * page_size)
    requests: list[GenerateRequest] = []
    for length in (min(each, most - 1) for each in lengths):
        sampling = SamplingParams(
            max_new_tokens=min(new, most - length),
            ignore_eos=True,
            seed=0,
            temperature=0.0 if engine.config.verification == "greedy" else 1.0,
        )
        ids = tuple(token % info.vocab_size for token in range(length))
        requests.append(GenerateRequest(request_id=f"warm-{number}-{len(requests)}", input_ids=ids, sampling=sampling))
    return requests


def _device(torch: Any, name: str) -> Any:
    """The device of that name. Raises ValueError for one that is not there."""
    there = torch.cuda.is_available() and torch.cuda.device_count() > 0
    if name not in ("cpu", "cuda", "auto"):
        raise ValueError(f"--device {name} must be cpu, cuda or auto; CUDA_VISIBLE_DEVICES=INDEX chooses among several GPUs")
    if name == "cuda" and not there:
        raise ValueError("--device cuda: torch sees no GPU; use --device cpu")
    if name == "cpu" and there:
        LOG.warning("this machine has a GPU that --device cpu leaves alone; --device cuda uses it")
    return torch.device("cuda" if there and name != "cpu" else "cpu")


def _left_on_gpu(torch: Any, place: Any, model: str, dtype: str, ranks: int = 1) -> int:
    """Bytes that keys and values may take. Raises ValueError when the weights, twice for updates, leave nothing.

    Where the model is divided they are a rank's part, a bucket of an update is on its way, and the fullest GPU counts.
    """
    if ranks == 1:
        stored = sum(path.stat().st_size for path in Path(model).glob("*.safetensors"))
        weights, bucket = stored * (2 if dtype == "float32" else 1), 0  # two bytes an element, rarely four
    else:
        room = require("miles_rollout.engines.embedded.room", extra="embedded", purpose="the embedded engine")
        weights, bucket = room.part_bytes(model, dtype, ranks)
        bucket += NCCL_BYTES
    free = _free_on_gpus(torch, place, ranks)
    left = int(FILL * (free - 2 * weights - bucket))
    if left < 1:
        raise ValueError(
            f"{place} has {free >> 20} MiB free; {model} needs {weights >> 20} MiB, and as much again while weights are updated; "
            "say how much keys and values may take with --kv-memory-mib"
        )
    return left


def _free_on_gpus(torch: Any, place: Any, ranks: int) -> int:
    """Bytes free on the fullest GPU of the ranks. Another process asks several: whoever asks a GPU keeps memory on it."""
    if ranks == 1:
        return int(torch.cuda.mem_get_info(place)[0])
    count = str(min(ranks, torch.cuda.device_count()))
    try:
        done = subprocess.run([sys.executable, "-c", _ASKS, count], capture_output=True, text=True, timeout=ASK_S)
    except subprocess.TimeoutExpired:
        raise expired(f"{count} GPUs to tell how much of them is free", ASK_S) from None
    if done.returncode:
        why = done.stderr.strip().rpartition("\n")[2]
        raise ValueError(f"{count} GPUs do not tell how much of them is free: {why}; say what to take with --kv-memory-mib")
    return int(done.stdout.split()[-1])


def disk_loader(dtype: str) -> WeightLoader:
    """Reads weight updates for an engine that computes in `dtype`: twice, once for the hashes, and never as a whole."""

    def load(directory: str, version: int, contract_digest: str) -> Any:
        factory = require("miles_rollout.engines.embedded.factory", extra="embedded", purpose="a weight update from disk")
        weights = require("miles_rollout.engines.embedded.weights", extra="embedded", purpose="a weight update from disk")
        shell = factory.shell_of(Path(directory), None, dtype)
        pairs = factory.stored_weights(Path(directory), shell)
        manifest = weights.make_manifest(pairs, version=version, contract_digest=contract_digest)
        return manifest, factory.stored_weights(Path(directory), shell)

    return load


async def load_sglang(model: str, config: SglangConfig) -> tuple[Engine, Tokenizer]:
    """An SGLang server, started or attached to, and the tokenizer of its model directory.

    Raises ValueError for settings, model or server, MissingExtraError naming what to install.
    """
    if not Path(model).is_dir():
        raise ValueError(f"{model}: not a directory; give the model's local one, with config.json and tokenizer files")
    from miles_rollout.engines.sglang.engine import SglangEngine
    from miles_rollout.text import load_tokenizer

    tokenizer = load_tokenizer(model)
    return await SglangEngine.start(config), tokenizer
