"""A plan for people: a table of phases, a bar for each, and what would make it fit. Plain text, in any width."""

from __future__ import annotations

from miles_core.memory.knobs import remedies
from miles_core.memory.parameters import engine_ranks
from miles_core.memory.plan import Item, Phase, Plan

_GIB = 1 << 30
_BAR = 48
_FILL = "█▓▒░"


def plan_text(plan: Plan) -> str:
    """The plan as lines. The last one says whether it fits, and if not, what would."""
    job = plan.job
    shape = job.shape
    names = list(dict.fromkeys(item.name for phase in plan.phases for item in phase.items))
    width = max(len(name) for name in [*names, "of the device"])
    head = f"{'GiB on one GPU':{width}}" + "".join(f"{phase.name:>11}" for phase in plan.phases)
    lines = [
        f"{plan.parameters.total / 1e9:.2f} B weights ({shape.family}, {shape.num_hidden_layers} layers, hidden "
        f"{shape.hidden_size}), {8 * job.dtype_bytes} bit, {job.num_gpus} x {job.device.name} "
        f"of {job.device.memory_bytes / _GIB:.1f} GiB",
        f"trainer cut over {job.cut}; {job.microbatch_tokens:,} tokens a micro-batch"
        + (", layers recomputed" if job.recompute else ""),
        "",
        head,
    ]
    for name in names:
        cells = [next((item.num_bytes for item in phase.items if item.name == name), 0) for phase in plan.phases]
        lines.append(f"{name:{width}}" + "".join(f"{_cell(cell):>11}" for cell in cells))
    lines.append(f"{'all':{width}}" + "".join(f"{_cell(phase.num_bytes):>11}" for phase in plan.phases))
    share = [f"{phase.num_bytes / job.device.memory_bytes:.0%}" for phase in plan.phases]
    lines.append(f"{'of the device':{width}}" + "".join(f"{cell:>11}" for cell in share))
    lines += ["", *(_bar(phase, plan) for phase in plan.phases), ""]
    lines += [f"note: {note}" for note in _notes(plan)]
    lines += [f"{what}: {_sum(items)}" for what, items in (("host, one node", plan.host), ("disk", plan.disk)) if items]
    return "\n".join([*lines, *verdict(plan)])


def _notes(plan: Plan) -> list[str]:
    """Where the plan is not of what would run."""
    job, found = plan.job, []
    if job.backend != "fsdp":
        found.append(f"the trainer is planned as for the fsdp backend; what {job.backend} holds besides is not in it")
    if job.apart and job.trains and job.rolls_out:
        found.append("rollout and update are of an engine's GPU, the others of a trainer's: none holds both (cluster.layout)")
    can = [1, *engine_ranks(job.shape)]
    if job.rolls_out and job.engine_gpus not in can:
        words = " or ".join(map(str, can))
        found.append(f"our engine divides this shape over {words} GPU(s); one over {job.engine_gpus} would not start")
    return found


def reasons_text(plan: Plan) -> str:
    """What every item of the worst phase is made of."""
    phase = plan.worst
    width = max(len(item.name) for item in phase.items)
    rows = (f"{item.name:{width}} {_cell(item.num_bytes):>9} GiB  {item.why}" for item in phase.items)
    return "\n".join([f"{phase.name}, the phase that needs most:", *rows])


def verdict(plan: Plan) -> list[str]:
    """Whether it fits, in one line; or what is missing and what would help, a line each."""
    worst = plan.worst
    if plan.fits:
        return [f"fits: {plan.room_bytes / _GIB:.1f} GiB stay free at the worst moment ({worst.name})"]
    missing, name = -plan.room_bytes / _GIB, plan.job.device.name
    lines = [f"does not fit: {worst.name} needs {missing:.1f} GiB more than {name} has. It would,"]
    found = remedies(plan)
    helps = [remedy for remedy in found if remedy.fits]
    for remedy in helps:
        lines.append(f"  with {remedy.words} ({remedy.cost})")
    if not helps:
        lines[-1] = lines[-1].removesuffix(" It would,") + " No setting helps enough:"
        lines.append(f"  {found[-1].cost}")
    for remedy in found:
        if not remedy.fits and remedy.saved_bytes > 0:
            lines.append(f"  {remedy.words} alone saves {remedy.saved_bytes / _GIB:.1f} GiB ({remedy.cost})")
    return lines


def _bar(phase: Phase, plan: Plan) -> str:
    """The phase as a bar; the device ends at the mark, and the four largest items have their own shading."""
    device = plan.job.device.memory_bytes
    scale = max(device, plan.worst.num_bytes) / _BAR
    largest = sorted(phase.items, key=lambda item: -item.num_bytes)[:3]
    parts = [*largest, Item("rest", phase.num_bytes - sum(item.num_bytes for item in largest), "")]
    bar = "".join(fill * round(part.num_bytes / scale) for fill, part in zip(_FILL, parts, strict=False))
    mark = min(_BAR, round(device / scale))
    bar = bar.ljust(mark)
    bar = bar[:mark] + "|" + bar[mark:]
    named = ", ".join(f"{fill} {part.name}" for fill, part in zip(_FILL, parts, strict=False))
    return f"{phase.name:>10} {bar:{_BAR + 2}} {named}"


def _cell(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:.2f}" if num_bytes else "-"


def _sum(items: tuple[Item, ...]) -> str:
    whole = sum(item.num_bytes for item in items)
    parts = ", ".join(f"{item.name} {item.num_bytes / _GIB:.1f}" for item in items)
    return f"{whole / _GIB:.1f} GiB ({parts})"
