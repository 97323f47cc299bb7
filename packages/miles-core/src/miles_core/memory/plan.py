"""What every process of a run will hold in each phase, from shapes and settings alone: no torch, no weights, no GPU.

Legend: N = weights, T = tokens of a micro-batch on one process, V = vocabulary, S = processes the trainer's state is cut over,
b = bytes of a number in the model's dtype.

A phase is a list of items that are alive together at its worst moment. Each item says what it is made of, so that a plan that
turns out wrong can be argued with. The formulas are those of our trainer and engine, not of trainers in general.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from miles_core.memory.activations import kept_per_token, layer_peak_per_token
from miles_core.memory.parameters import Parameters, count_draft, count_parameters, count_rank
from miles_core.memory.shapes import Device
from miles_core.trainer.layout import layers_per_unit
from miles_kernels.nn.config import DecoderConfig

MIB = 1 << 20
NCCL_BYTES = 1400 * MIB
"""One process' communicator that has gathered and exchanged: 0.85 GiB of buffers, 0.26 of code, 0.24 of stack for its kernels.
Taken beside torch's allocator when the first collectives run. Measured on two H200."""
WORKSPACE_BYTES = 32 * MIB
"""cuBLAS' own scratch on a Hopper card, which torch's allocator hands out."""
FRAGMENTATION = 0.04
"""Share of the allocator's bytes that lies between blocks."""
STREAM_BYTES = 3 * 3 * 128 * MIB
"""Three pieces of three columns of optimizer state that lives off the device: one coming, one updated, one leaving."""
STAGING_BYTES = 256 * MIB
"""Most bytes in flight when weights are saved or published: one bucket on each side."""
LOGPROB_ROWS, LOGPROB_STEP = 8192, 8192
"""Rows and vocabulary columns of the logits that exist at a time in the fused log-probability, at most."""


class Item(NamedTuple):
    """Something that takes memory."""

    name: str
    num_bytes: int
    why: str


class Phase(NamedTuple):
    """What is alive at the worst moment of one part of a step, on one device."""

    name: str
    items: tuple[Item, ...]

    @property
    def num_bytes(self) -> int:
        """All of it."""
        return sum(item.num_bytes for item in self.items)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run as far as memory is concerned. Sizes are per run, unless they say per process.

    Example: Job(shape=find_shape("qwen3-8b"), device=find_device("h200"), num_gpus=8)
    """

    shape: DecoderConfig
    device: Device
    num_gpus: int = 1
    trains: bool = True
    rolls_out: bool = True
    dtype_bytes: int = 2
    shard: int | None = None
    """Processes that the trainer's state is cut over; None: all of them."""
    cp: int = 1
    master: str = "float32"
    reference: bool = False
    recompute: bool = False
    microbatch_tokens: int = 16384
    longest_tokens: int = 4096
    """Of a sequence, on one process: a micro-batch must hold it."""
    num_microbatches: int = 2
    """Passes whose gradients are summed before an update; more than one keeps a sum beside the new gradient."""
    engine_gpus: int = 1
    """GPUs one engine is cut over."""
    kv_bytes: int = 0
    """Keys and values of one engine process."""
    batched_tokens: int = 2048
    max_running: int = 128
    optimizer: str = "device"
    """Where masters and moments lie: "device", "host" or "disk"."""
    sleep: bool = False
    """Whether engine and trainer take turns on the device."""
    apart: bool = False
    """Whether engines have devices of their own; `num_gpus` are the trainer's then."""
    saves_behind: bool = False
    """Whether a checkpoint goes to the disk while the run goes on."""
    backend: str = "fsdp"
    """Of the trainer. The formulas are those of fsdp."""
    draft: str = "none"
    """The draft model that is trained and served beside the policy: "none", "mtp" or "eagle3"."""
    fixed: frozenset[str] = frozenset()
    """Settings that the run's other settings do not let change, by their dotted names: no advice for this job."""

    @property
    def cut(self) -> int:
        """Processes the trainer's state is cut over (S)."""
        return self.shard or self.num_gpus


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Phases of one process on one device, and what its host and disk hold."""

    job: Job
    parameters: Parameters
    phases: tuple[Phase, ...]
    host: tuple[Item, ...]
    disk: tuple[Item, ...]

    @property
    def worst(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.num_bytes)

    @property
    def room_bytes(self) -> int:
        """What the device offers beyond the worst phase; negative when the run does not fit."""
        return self.job.device.memory_bytes - self.worst.num_bytes

    @property
    def fits(self) -> bool:
        """Whether every phase fits."""
        return self.room_bytes >= 0


def make_plan(job: Job) -> Plan:
    """Plan a job. Raises ValueError when its layout is no layout."""
    if job.num_gpus < 1 or job.num_gpus % job.cut:
        raise ValueError(f"the trainer's state is cut over {job.cut} process(es), which does not divide {job.num_gpus} GPU(s)")
    parameters = count_parameters(job.shape)
    outside, always, kv = _outside(job), _always(job, awake=True), _kv(job)
    trainer, engine = _trainer_at_rest(job, parameters), _engine_at_rest(job, parameters)
    waiting = [] if job.sleep else [*engine, *kv]
    phases = []
    if job.apart and job.trains and job.rolls_out:
        return _plan_apart(job, parameters)
    if job.rolls_out:
        awake = [*_always(job, awake=not job.sleep), *([] if job.sleep else trainer)]
        phases.append(_phase("rollout", outside, awake, engine, kv, _engine_working(job)))
    if job.trains:
        phases += [_phase(name, outside, always, trainer, waiting, items) for name, items in _train_moments(job, parameters)]
    if job.trains and job.rolls_out:
        phases.append(_phase("publish", outside, always, trainer, engine, [] if job.sleep else kv, _publishing(job, parameters)))
    return Plan(job=job, parameters=parameters, phases=tuple(phases), host=_host(job, parameters), disk=_disk(job, parameters))


def _plan_apart(job: Job, parameters: Parameters) -> Plan:
    """Trainer and engine each on their own devices: what either holds, in its own phases."""
    trainer, engine = replace(job, apart=False, rolls_out=False), replace(job, apart=False, trains=False)
    buckets = Item("buckets", 2 * STAGING_BYTES, "one filled while the other travels")
    received = [item for item in _publishing(job, parameters) if item.name != "gathered tensors"]
    gathered = [item for item in _publishing(job, parameters) if item.name == "gathered tensors"]
    outside, always = _outside(job), _always(trainer, awake=True)
    phases = (
        *make_plan(engine).phases,
        _phase("update", outside, _always(engine, awake=True), _engine_at_rest(job, parameters), _kv(job), [buckets, *received]),
        *make_plan(trainer).phases,
        _phase("publish", outside, always, _trainer_at_rest(job, parameters), [buckets, *gathered]),
    )
    return Plan(job=job, parameters=parameters, phases=phases, host=_host(job, parameters), disk=_disk(job, parameters))


def _phase(name: str, outside: list[Item], *groups: list[Item]) -> Phase:
    """The items with bytes, and the allocator's share of waste on those it hands out."""
    items = [item for group in groups for item in group if item.num_bytes]
    waste = int(FRAGMENTATION * sum(item.num_bytes for item in items))
    spare = Item("fragmentation", waste, f"{FRAGMENTATION:.0%} of what the allocator hands out")
    return Phase(name, (*outside, *items, spare))


def _outside(job: Job) -> list[Item]:
    """Beside torch's allocator."""
    if job.device.is_host:
        return [Item("process", job.device.context_bytes, "Python and torch, before the first tensor")]
    items = [Item("CUDA context", job.device.context_bytes, "driver and kernels' code, before the first tensor")]
    if job.num_gpus > 1:
        items.append(Item("NCCL", NCCL_BYTES, "a communicator's buffers, code and stack"))
    return items


def _always(job: Job, *, awake: bool) -> list[Item]:
    """What is there in every phase; a trainer that is not `awake` has given up its tables."""
    if job.device.is_host:
        return []
    shape, models = job.shape, awake * job.trains * (1 + job.reference) + job.rolls_out
    tables = models * shape.max_position_embeddings * shape.head_dim * 2 * 4
    return [
        Item("rotary tables", tables, f"{models} x {shape.max_position_embeddings:,} positions x {shape.head_dim} x (4 + 4)"),
        Item("workspaces", WORKSPACE_BYTES, "matrix products"),
    ]


def _trainer_at_rest(job: Job, parameters: Parameters) -> list[Item]:
    """What the trainer holds between steps."""
    if not job.trains:
        return []
    count, cut, size = parameters.total, job.cut, job.dtype_bytes
    low = size < 4
    masters = low and job.master == "float32"
    here = job.optimizer == "device"
    items = []
    if cut == 1 or not masters:
        items.append(Item("weights", count * size // cut, f"N x {size} bytes" + _over(cut)))
    if masters and (here or cut > 1):
        items.append(Item("float32 masters", count * 4 // cut, "N x 4" + _over(cut)))
    if masters and cut > 1:
        tables = (parameters.embedding + parameters.head) * size // cut
        items.append(Item("tables in the model's dtype", tables, "embedding and output projection, of which slices travel"))
    if here:
        items.append(Item("AdamW moments", count * 8 // cut, "N x (4 + 4)" + _over(cut)))
    if job.reference:
        items.append(Item("reference policy", count * size // cut, f"N x {size}, frozen" + _over(cut)))
    draft = count_draft(job.shape, job.draft)
    items.append(Item("draft", draft * (size + 4 * low + 8), f"{draft:,} weights, masters and moments, whole in every process"))
    return items


def _away(job: Job, parameters: Parameters) -> list[Item]:
    """State of one process that lies outside the device for good, or while its owner sleeps."""
    if not job.trains:
        return []
    masters = job.dtype_bytes < 4 and job.master == "float32"
    apart = masters and job.cut == 1  # cut over processes, the masters are the weights
    state = parameters.total * (8 + 4 * apart) // job.cut
    items = []
    if job.optimizer != "device":
        items.append(Item("optimizer state", state, "moments" + " and masters" * apart + ", streamed through every update"))
    if job.sleep:
        weights = 0 if apart else parameters.total * (4 if masters else job.dtype_bytes) // job.cut
        draft = count_draft(job.shape, job.draft) * (job.dtype_bytes + 4 * (job.dtype_bytes < 4) + 8)
        kept = (state if job.optimizer == "device" else 0) + weights + draft
        items.append(Item("sleeping trainer", kept, "what leaves the device during rollouts and cannot be computed again"))
    return [item for item in items if item.num_bytes]


def _train_moments(job: Job, parameters: Parameters) -> list[tuple[str, list[Item]]]:
    """The three moments of an update that can be its worst."""
    shape, cut, size = job.shape, job.cut, job.dtype_bytes
    tokens = job.microbatch_tokens // job.cp
    count = parameters.total // cut
    together = layers_per_unit(parameters.largest_layer, shape.num_hidden_layers)
    unit = 0 if cut == 1 else together * parameters.largest_layer
    gather = Item("gathered layers", 2 * unit * size, f"the {together} at work and the next, whole")
    kept = Item(
        "activations",
        tokens * kept_per_token(shape, size, recompute=job.recompute),
        f"{tokens:,} tokens x {kept_per_token(shape, size, recompute=job.recompute):,} bytes kept for the backward pass",
    )
    working = Item("working set", tokens * layer_peak_per_token(shape, size, recompute=job.recompute), "one layer at work")
    in_place = size == 4 or (cut > 1 and job.master == "float32")
    summed = Item("gradient sums", 4 * count if job.num_microbatches > 1 else 0, "N x 4" + _over(cut) + ", of the passes before")
    head = parameters.head or parameters.embedding
    fresh = Item("new gradient", 0 if in_place else head * size // cut, "one at a time, until it is added to its sum")
    widened = Item("gradient sums", 4 * count, "N x 4" + _over(cut))
    layer_gradient = Item("layer gradient", unit * (4 + size), "whole, before it is summed over processes")
    busy = _first_of_backward(job, parameters, working, _logprob(job, tokens))
    late = 0 if in_place else 4 * parameters.embedding // cut  # the sum of the embedding comes when no layer is at work any more
    behind = working._replace(
        num_bytes=max(0, working.num_bytes - late), why="one layer at work, before the embedding's sum exists"
    )
    rounded = max(parameters.embedding, parameters.largest_layer) // cut if size < 4 and job.master == "stochastic" else 0
    rounding = Item("rounding by chance", rounded * 4, "as many weights in float32 as the largest has")
    columns = 3 if not in_place and job.master == "float32" else 2
    staged = Item("stages of the update", STREAM_BYTES // 3 * columns, "masters and moments passing through")
    return [
        ("forward", [gather, kept, summed, *busy]),
        ("backward", [gather, behind, widened, fresh, layer_gradient]),
        ("optimizer", [widened, rounding, *_when(job.optimizer != "device", staged)]),
    ]


def _first_of_backward(job: Job, parameters: Parameters, working: Item, logprob: Item) -> list[Item]:
    """What is at work beside all that the forward pass has kept, at the larger of two moments.

    At the output projection its gradient is made, whole. In the last layer that is still there where the projection is the
    embedding, as autograd waits for the embedding's part; else it has been added to the sum, which is new in an only pass.
    """
    size, cut = job.dtype_bytes, job.cut
    name, only = "gradient of the output projection", 4 * (job.num_microbatches == 1)
    if parameters.head and cut == 1:
        new = Item(name, parameters.head * max(size, (size < 4) * size + only), "first of the backward pass")
        added = Item(name, parameters.head * only, "its sum")
        return max([logprob, new], [working, added], key=lambda items: sum(item.num_bytes for item in items))
    in_place = size == 4 or job.master == "float32"
    wide = only if parameters.head and not in_place else 0
    table = Item(name, (parameters.head or parameters.embedding) * (size + wide) // cut, "first of the backward pass")
    return [max(working, logprob, key=lambda item: item.num_bytes), table]


def _when(condition: bool, item: Item) -> list[Item]:
    return [item] if condition else []


def _logprob(job: Job, tokens: int) -> Item:
    vocab, hidden = job.shape.vocab_size, job.shape.hidden_size
    rows = min(tokens, LOGPROB_ROWS)
    logits = rows * min(LOGPROB_STEP, vocab) * job.dtype_bytes
    statistics = rows * -(-vocab // 128) * 12
    gradient = tokens * hidden * (job.dtype_bytes + 1)
    why = f"{rows:,} x {min(LOGPROB_STEP, vocab):,} logits at a time, never {tokens:,} x {vocab:,}"
    return Item("log-probability", max(logits, statistics) + gradient, why)


def _engine_at_rest(job: Job, parameters: Parameters) -> list[Item]:
    if not job.rolls_out:
        return []
    why = f"its own copy, N x {job.dtype_bytes}"
    if job.engine_gpus > 1:
        why += f", divided over {job.engine_gpus} but for tables, norms and routers"
    draft = count_draft(job.shape, job.draft) * job.dtype_bytes
    return [
        Item("engine weights", count_rank(job.shape, job.engine_gpus) * job.dtype_bytes, why),
        Item("engine's draft", draft, "its own copy"),
    ]


def _kv(job: Job) -> list[Item]:
    return [Item("KV cache", job.kv_bytes, "engine.kv_memory_bytes, reserved from the start")] if job.rolls_out else []


def _engine_working(job: Job) -> list[Item]:
    """A forward pass of the engine without gradients, and the logits of the rows that draw."""
    tokens, vocab = job.batched_tokens, job.shape.vocab_size
    working = tokens * layer_peak_per_token(job.shape, job.dtype_bytes, recompute=False)
    logits = 4 * vocab * job.max_running
    return [
        Item("engine pass", working, f"{tokens:,} tokens, one layer at a time"),
        Item("logits", logits, f"{job.max_running} rows x {vocab:,} x 4"),
    ]


def _publishing(job: Job, parameters: Parameters) -> list[Item]:
    staged = (parameters.total + count_draft(job.shape, job.draft)) * job.dtype_bytes
    items = [Item("staged weights", staged, "the new version, whole, beside the old one, until every hash is checked")]
    if job.engine_gpus > 1:
        part, bucket = count_rank(job.shape, job.engine_gpus) * job.dtype_bytes, _bucket(job, parameters)
        items = [
            Item("staged weights", part, "this GPU's part of the new version, beside the old one, until every hash is checked"),
            Item("bucket of whole tensors", bucket, "what every GPU of the engine gets of it at a time, to check and to cut"),
        ]
    if job.cut > 1:
        largest = max(parameters.embedding, parameters.largest_layer) * job.dtype_bytes
        items.append(Item("gathered tensors", largest, "the largest that travels, whole"))
    return items


def _bucket(job: Job, parameters: Parameters) -> int:
    """Of an engine over several GPUs: whole tensors on their way, at least the largest, and two buckets of a broadcast."""
    shape, size = job.shape, job.dtype_bytes
    widest = max(shape.intermediate_size, shape.moe_intermediate_size or 0, shape.num_attention_heads * shape.head_dim)
    largest = shape.hidden_size * max(shape.vocab_size, widest) * size
    return max(min(STAGING_BYTES, parameters.total * size), largest) + 2 * STAGING_BYTES


def _host(job: Job, parameters: Parameters) -> tuple[Item, ...]:
    per_node = min(job.num_gpus, 8)
    items = [Item("processes", per_node * 1400 * MIB, f"{per_node} process(es) with torch and CUDA")]
    if job.trains:
        items.append(Item("staging", per_node * STAGING_BYTES, "one bucket a process, for loading, saving and publishing"))
        kept = [item for item in _away(job, parameters) if not (item.name == "optimizer state" and job.optimizer == "disk")]
        items += [Item(item.name, per_node * item.num_bytes, item.why) for item in kept]
        if job.saves_behind:
            items.append(Item("checkpoint on its way", _checkpoint_bytes(job, parameters), "whole, until it is on the disk"))
    return tuple(items)


def _disk(job: Job, parameters: Parameters) -> tuple[Item, ...]:
    if not job.trains:
        return ()
    size, saved = job.dtype_bytes, _checkpoint_bytes(job, parameters)
    return (
        Item("one checkpoint", saved, f"N x ({size} + {saved // parameters.total - size})"),
        Item("one HF export", parameters.total * size, f"N x {size}"),
        *(item for item in _away(job, parameters) if item.name == "optimizer state" and job.optimizer == "disk"),
    )


def _checkpoint_bytes(job: Job, parameters: Parameters) -> int:
    masters = 4 if job.dtype_bytes < 4 and job.master == "float32" else 0
    return parameters.total * (job.dtype_bytes + 8 + masters)


def _over(cut: int) -> str:
    return f" / {cut}" if cut > 1 else ""
