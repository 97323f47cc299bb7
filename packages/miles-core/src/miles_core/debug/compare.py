"""Where two runs part: settings, sampled tokens, rewards, metrics, weights, each down to the first thing that differs."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import zip_longest
from pathlib import Path

from miles_core.config.dump import differences, read_config
from miles_core.debug.page import CSS, page
from miles_core.debug.plots import Plot, Series, draw
from miles_core.metrics import Row, read_metrics
from miles_core.rundir import RunDir
from miles_rollout.wire import Sample, read_samples

_TIMES = ("perf/", "memory/")
"""Metrics that differ between two runs of the same bits."""
_SHOWN = 4
_PLOTS = {
    "reward/mean": ("Reward", ""),
    "eval/accuracy": ("Held-out accuracy", ""),
    "mismatch/max_abs": ("Mismatch between engine and trainer", "|Δ logprob|"),
    "rollout/completion_tokens_mean": ("Completion length", "tokens"),
    "train/entropy": ("Entropy", "nats"),
    "train/loss": ("Loss", ""),
    "train/grad_norm": ("Gradient norm", ""),
    "perf/tokens_per_s": ("Tokens per second", "tokens / s"),
    "draft/accept_length": ("Accept length of drafts", "tokens"),
}
"""Metric to title and unit."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was compared in one respect. `step` is that of the first difference, None where there is none."""

    what: str
    step: int | None
    words: str


def compare_runs(a: Path, b: Path) -> list[Finding]:
    """Everything two run directories recorded, side by side, in the order in which a difference spreads through a step.

    Floats are compared by their bits. Raises ValueError naming a file that cannot be read.
    """
    return [_settings(a, b), _samples(a, b), _metrics(a, b), _weights(a, b)]


def verdict(findings: Sequence[Finding]) -> tuple[bool, str]:
    """Whether the two runs did the same, and where they parted first, in words. Settings alone part nothing."""
    parted = [finding for finding in findings if finding.step is not None]
    if not parted:
        return True, "the same numbers in both, wherever both recorded any"
    first = min(parted, key=lambda finding: finding.step or 0)
    return False, f"they part at step {first.step}: {first.what}: {first.words}"


def write_comparison(a: Path, b: Path, out: Path) -> Path:
    """One page with the findings and both runs in every plot. Raises ImportError naming the extra without matplotlib."""
    names = (a.name, b.name) if a.name != b.name else (str(a), str(b))
    rows = [read_metrics(RunDir(run).metrics.path) for run in (a, b)]
    plots = []
    for metric, (title, unit) in _PLOTS.items():
        lines: dict[str, Series] = {}
        for name, own in zip(names, rows, strict=True):
            found = [(row["step"], row[metric]) for row in own if metric in row]
            if found:
                lines[name] = ([step for step, _ in found], [value for _, value in found])
        if lines:
            points = frozenset(lines) if metric == "eval/accuracy" else frozenset()
            drawn = draw(Plot(title=title, lines=lines, points=points, unit=unit))
            plots.append(f"<figure><figcaption>{escape(title)}</figcaption>{drawn}</figure>")
    findings = compare_runs(a, b)
    cells = "".join(f"<tr><td>{escape(one.what)}</td><td><code>{escape(one.words)}</code></td></tr>" for one in findings)
    title = f"{names[0]} and {names[1]}"
    body = f"<h1>{escape(title)}</h1><p>{escape(verdict(findings)[1])}</p><table>{cells}</table>"
    partial = out.with_name(out.name + ".partial")
    partial.write_text(page(title, CSS, f'{body}<section class="plots">{"".join(plots)}</section>'), encoding="utf-8")
    partial.replace(out)
    return out


def _settings(a: Path, b: Path) -> Finding:
    lines = [line for line in differences(read_config(a), read_config(b)) if not line.startswith(("run.name", "run.dir"))]
    return Finding(what="settings", step=None, words="; ".join(lines) or "equal")


def _samples(a: Path, b: Path) -> Finding:
    steps = sorted(set(RunDir(a).recorded_steps()) & set(RunDir(b).recorded_steps()))
    for step in steps:
        ours, theirs = (read_samples(RunDir(run).step_samples(step)) for run in (a, b))
        for mine, other in zip_longest(ours, theirs):
            words = _sample_difference(mine, other)
            if words:
                return Finding(what="samples", step=step, words=words)
    return Finding(what="samples", step=None, words=f"equal in {len(steps)} steps" if steps else "no step recorded in both")


def _sample_difference(a: Sample | None, b: Sample | None) -> str:
    if a is None or b is None:
        return f"sample {(a or b).sample_id} is only in one of them"  # type: ignore[union-attr]
    if a.sample_id != b.sample_id:
        return f"sample {a.sample_id} stands where the other run has {b.sample_id}"
    name = f"sample {a.sample_id} ({a.prompt_id})"
    for place, (mine, other) in enumerate(zip_longest(a.token_ids, b.token_ids)):
        if mine != other:
            return f"{name}: token {place} of {len(a.token_ids)}: {mine} and {other}"
    for place, (x, y) in enumerate(zip(a.rollout_logprobs, b.rollout_logprobs, strict=True)):
        if not _same(x, y):
            return f"{name}: log-probability of token {place} of {len(a.token_ids)}: {x!r} and {y!r}"
    if a.reward != b.reward or a.reward_status != b.reward_status:
        return f"{name}: reward {a.reward} ({a.reward_status}) and {b.reward} ({b.reward_status})"
    return ""


def _metrics(a: Path, b: Path) -> Finding:
    ours, theirs = ({int(row["step"]): row for row in read_metrics(RunDir(run).metrics.path)} for run in (a, b))
    steps = sorted(set(ours) & set(theirs))
    for step in steps:
        wrong = list(_unequal(ours[step], theirs[step]))
        if wrong:
            more = f", and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            return Finding(what="metrics", step=step, words="; ".join(wrong[:_SHOWN]) + more)
    return Finding(what="metrics", step=None, words=f"equal in {len(steps)} rows" if steps else "no step recorded in both")


def _unequal(a: Row, b: Row) -> Iterator[str]:
    for name in sorted(set(a) & set(b)):
        if not name.startswith(_TIMES) and not _same(a[name], b[name]):
            yield f"{name} {a[name]!r} and {b[name]!r}"


def _weights(a: Path, b: Path) -> Finding:
    folders = [{path.name: path / "trainer" / "model" for path in (run / "checkpoints").glob("step_*")} for run in (a, b)]
    steps = sorted(name for name in set(folders[0]) & set(folders[1]) if all((own[name]).is_dir() for own in folders))
    for name in steps:
        ours, theirs = (_hashes(own[name]) for own in folders)
        wrong = sorted(key for key in ours | theirs if ours.get(key) != theirs.get(key))
        if wrong:
            words = f"{len(wrong)} of {len(ours)} tensors of {name} differ, the first by name is {wrong[0]}"
            return Finding(what="weights", step=int(name.removeprefix("step_")), words=words)
    return Finding(
        what="weights", step=None, words=f"equal in {', '.join(steps)}" if steps else "no checkpoint of one step in both"
    )


def _hashes(folder: Path) -> dict[str, str]:
    from miles_core.trainer.hashing import tensor_hash
    from miles_kernels.nn.checkpoint import iter_tensors

    return {name: tensor_hash(tensor) for name, tensor in iter_tensors(folder)}


def _same(x: float, y: float) -> bool:
    """Equal bits."""
    return struct.pack("<d", x) == struct.pack("<d", y)
