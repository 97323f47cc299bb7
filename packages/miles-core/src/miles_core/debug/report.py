"""`report.html`: one self-contained page about a run, made from its directory alone and readable offline."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from miles_core.debug.page import CSS, page
from miles_core.debug.plots import Plot, Series, draw
from miles_core.debug.profile import profile_section
from miles_core.metrics import Row, read_metrics
from miles_rollout.text import Tokenizer, load_tokenizer
from miles_rollout.wire import Sample, read_samples

_NUM_SAMPLES = 8
_MAX_TEXT = 1200


def write_report(run: Path) -> Path:
    """Write RUN/report.html and return its path. Raises ValueError when the folder holds no metrics."""
    path = run / "report.html"
    html = render_report(run)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(html, encoding="utf-8")
    partial.replace(path)
    return path


def render_report(run: Path) -> str:
    """The page as text."""
    metrics, config = run / "metrics.jsonl", run / "config.toml"
    if not config.is_file() or not metrics.is_file():
        raise ValueError(
            f"{run}: no config.toml and metrics.jsonl; a report is made from a run directory, such as runs/quickstart"
        )
    rows = read_metrics(metrics)
    if not rows:
        raise ValueError(f"{metrics}: no step is recorded yet")
    settings = tomllib.loads(config.read_text(encoding="utf-8"))
    plots = "".join(f"<figure><figcaption>{escape(plot.title)}</figcaption>{draw(plot)}</figure>" for plot in plots_of(rows))
    body = [
        f"<h1>{escape(str(settings['run'].get('name', run.name)))}</h1>",
        f'<div class="cards">{_cards(rows)}</div>',
        f'<section class="plots">{plots}</section>',
        profile_section(run),
        _samples(run),
        _settings(settings),
    ]
    return page(f"Miles: {run.name}", CSS, "\n".join(body))


def series(rows: Iterable[Row], name: str) -> Series:
    """Steps and values of one metric, where it was recorded."""
    found = [(row["step"], row[name]) for row in rows if name in row]
    return [step for step, _ in found], [value for _, value in found]


def plots_of(rows: Sequence[Row]) -> list[Plot]:
    """The pictures these metrics can fill."""

    def lines(**names: str) -> dict[str, Series]:
        all_lines = {label.replace("_", " "): series(rows, name) for label, name in names.items()}
        return {label: line for label, line in all_lines.items() if line[0]}

    times = sorted(
        {name for row in rows for name in row if name.startswith("perf/") and name.endswith("_s") and name.count("_") == 1}
        - {"perf/step_s"}
    )
    steps = [row["step"] for row in rows if row["step"] > 0]
    stacked = {name[5:-2]: (steps, [row.get(name, 0.0) for row in rows if row["step"] > 0]) for name in times} if steps else {}
    candidates = [
        Plot(
            title="Reward and held-out accuracy",
            lines=lines(reward="reward/mean", held_out="eval/accuracy"),
            points=frozenset({"held out"}),
            smooth=frozenset({"reward"}),
            y_range=_unit_range(rows),
        ),
        Plot(title="Held-out accuracy by set", lines=_by_set(rows), points=frozenset(_by_set(rows))),
        Plot(title="Mismatch between engine and trainer", lines=lines(largest_difference="mismatch/max_abs"), unit="|Δ logprob|"),
        Plot(
            title="Tokens per second",
            lines=lines(whole_step="perf/tokens_per_s", rollout="perf/rollout_tokens_per_s", train="perf/train_tokens_per_s"),
            unit="tokens / s",
        ),
        Plot(
            title="Completion length",
            lines=lines(mean="rollout/completion_tokens_mean", longest="rollout/completion_tokens_max"),
            unit="tokens",
        ),
        Plot(title="Time of a step", lines=stacked, stacked=True, unit="s"),
        Plot(title="Entropy", lines=lines(entropy="train/entropy"), unit="nats"),
        Plot(title="Loss", lines=lines(loss="train/loss"), smooth=frozenset({"loss"})),
        Plot(title="Gradient norm", lines=lines(gradient_norm="train/grad_norm"), smooth=frozenset({"gradient norm"})),
        *_objective_plots(rows),
        *_memory_plots(rows),
        *_draft_plots(rows),
    ]
    return [plot for plot in candidates if plot.lines]


def _by_set(rows: Sequence[Row]) -> dict[str, Series]:
    """Accuracy of every named evaluation set."""
    names = dict.fromkeys(name for row in rows for name in row if name.startswith("eval/") and name.endswith("/accuracy"))
    return {name.split("/")[1]: series(rows, name) for name in names if name.count("/") == 2}


_SHOWN = (
    "loss", "grad_norm", "lr", "num_tokens", "num_sequences", "num_updates", "num_skipped_updates", "num_microbatches",
    "num_forward_tokens", "num_dropped", "weight_version", "epoch", "entropy", "logprob", "ratio", "policy_kl", "ref_kl",
    "clip_low_fraction", "clip_high_fraction", "mismatch_weight",
)  # fmt: skip
"""Metrics `train/NAME` of ours; what is left is of a loss of the user's."""


def _objective_plots(rows: Sequence[Row]) -> list[Plot]:
    """What moves the policy, where it moves at all: all zeros and constants are no picture."""

    def moving(**names: str) -> dict[str, Series]:
        found = {label.replace("_", " "): series(rows, name) for label, name in names.items()}
        return {label: line for label, line in found.items() if len(set(line[1])) > 1}

    names = sorted({name for row in rows for name in row if name.startswith("train/") and name[6:] not in _SHOWN})
    own = {name[6:]: series(rows, name) for name in names}
    return [
        Plot(title="KL to the reference policy", lines=moving(kl="train/ref_kl"), unit="nats"),
        Plot(title="KL of the updates of a step", lines=moving(kl="train/policy_kl"), unit="nats"),
        Plot(title="Weight that corrects the mismatch", lines=moving(weight="train/mismatch_weight")),
        Plot(
            title="Clipped tokens", lines=moving(below="train/clip_low_fraction", above="train/clip_high_fraction"), unit="share"
        ),
        Plot(title="Groups whose rewards are all equal", lines=moving(zero_variance="reward/zero_variance_share"), unit="share"),
        Plot(title="Groups left out", lines=moving(left_out="rollout/num_dropped_groups"), unit="groups"),
        Plot(title="Learning rate", lines=moving(learning_rate="train/lr")),
        *(Plot(title=f"train/{name}", lines={name: line}) for name, line in own.items()),
    ]


def _memory_plots(rows: Sequence[Row]) -> list[Plot]:
    """Device and host over the steps: the most in each phase, and what the trainer holds by tag."""

    def gib(room: str, end: str, names: Sequence[str]) -> dict[str, Series]:
        found = {name: series(rows, f"{room}/{name}{end}") for name in names}
        return {name: (steps, [value / 2**30 for value in values]) for name, (steps, values) in found.items() if any(values)}

    phases, tags = ("rollout", "train", "publish"), ("weights", "masters", "moments", "reference", "draft")
    return [
        Plot(title="Device memory, most in each phase", lines=gib("perf", "_peak_bytes", phases), unit="GiB"),
        Plot(title="Host memory after each phase", lines=gib("perf", "_rss_bytes", phases), unit="GiB"),
        Plot(title="Held by the trainer on its device", lines=gib("memory", "_bytes", tags), unit="GiB"),
    ]


def _draft_plots(rows: Sequence[Row]) -> list[Plot]:
    """What a draft model did, and the others it was compared with."""
    names = {name for row in rows for name in row if name.startswith("draft/")}

    def each(start: str, end: str, words: str = "") -> dict[str, Series]:
        """Label to series of every metric draft/START...END."""
        found = sorted(name for name in names if name.startswith(f"draft/{start}") and name.endswith(end))
        return {words + name[len(f"draft/{start}") : len(name) - len(end)].strip("/"): series(rows, name) for name in found}

    arms = {label: line for label, line in each("", "/accept_length").items() if label}
    own = {"served": "accept_length", "estimated": "accept_length_estimate", "greedy ceiling": "accept_length_greedy_ceiling"}
    lengths = {label: series(rows, f"draft/{name}") for label, name in own.items() if f"draft/{name}" in names}
    speed = {"estimated": series(rows, "draft/speedup_estimate")} if "draft/speedup_estimate" in names else {}
    return [
        Plot(title="Accept length of drafts", lines=lengths, smooth=frozenset({"served", "estimated"}), unit="tokens"),
        Plot(title="Accept length, ways to draft compared", lines=arms, points=frozenset(arms), unit="tokens"),
        Plot(
            title="Accepted at a draft position", lines=each("accept_rate_estimate_at_", "", "position "), y_range=(-0.02, 1.02)
        ),
        Plot(title="First draft token right, by entropy", lines=each("accept_rate_entropy_", ""), y_range=(-0.02, 1.02)),
        Plot(title="Draft loss", lines=each("loss_depth_", "", "depth ")),
        Plot(
            title="Rollout speed over no draft", lines={**speed, **each("", "/speedup")}, points=frozenset(each("", "/speedup"))
        ),
    ]


def _unit_range(rows: Sequence[Row]) -> tuple[float, float] | None:
    values = [row[name] for row in rows for name in ("reward/mean", "eval/accuracy") if name in row]
    return (-0.02, 1.02) if values and all(0.0 <= value <= 1.0 for value in values) else None


def _cards(rows: Sequence[Row]) -> str:
    cards = [("steps", f"{int(rows[-1]['step'])}")]
    _, held_out = series(rows, "eval/accuracy")
    if held_out:
        cards.append(
            ("held-out accuracy", f"{held_out[0]:.1%} → {held_out[-1]:.1%}" if len(held_out) > 1 else f"{held_out[0]:.1%}")
        )
    _, reward = series(rows, "reward/mean")
    if reward:
        few = max(1, len(reward) // 10)
        cards.append(("training reward", f"{sum(reward[:few]) / few:.3f} → {sum(reward[-few:]) / few:.3f}"))
    _, unequal = series(rows, "mismatch/tokens_unequal")
    if unequal:
        _, worst = series(rows, "mismatch/max_abs")
        checked = sum(row.get("train/num_tokens", 0) for row in rows if "mismatch/tokens_unequal" in row)
        cards.append(
            (
                "mismatched tokens",
                f"{int(sum(unequal))} of {int(checked):,}" + (f", up to {max(worst):.1e}" if sum(unequal) else ""),
            )
        )
    _, seconds = series(rows, "perf/step_s")
    cards.append(("time in steps", f"{math.fsum(seconds):.1f} s"))
    _, memory = series(rows, "perf/peak_rss_bytes")
    if memory:
        cards.append(("peak memory", f"{max(memory) / 2**30:.2f} GiB"))
    return "".join(
        f'<div class="card"><div class="value">{escape(value)}</div><div class="label">{escape(label)}</div></div>'
        for label, value in cards
    )


def _samples(run: Path) -> str:
    files = sorted((run / "samples").glob("step_*.jsonl"))
    if not files:
        return ""
    shown = list(dict.fromkeys([files[0], files[-1]]))
    tokenizer = _tokenizer(run)
    parts = ["<h2>Samples</h2>"]
    for file in shown:
        samples = read_samples(file)
        stride = max(1, len(samples) // _NUM_SAMPLES)
        rows = "".join(_sample_row(sample, tokenizer) for sample in samples[::stride][:_NUM_SAMPLES])
        step = int(file.stem.removeprefix("step_"))
        parts.append(
            f"<h3>Step {step}</h3><table><tr><th>prompt</th><th>completion</th><th>label</th><th>reward</th></tr>{rows}</table>"
        )
    return "".join(parts)


def _tokenizer(run: Path) -> Tokenizer | None:
    """The tokenizer of the newest checkpoint, to show prompts as text; a run without checkpoints shows the rows' names."""
    models = sorted(run.glob("checkpoints/step_*/trainer/model"))
    return load_tokenizer(models[-1]) if models else None


def _sample_row(sample: Sample, tokenizer: Tokenizer | None) -> str:
    reward = f"{sample.reward:g}" if sample.reward is not None else f"{sample.reward_status}: {sample.reward_detail}"
    num_prompt = next((i for i, sampled in enumerate(sample.loss_mask) if sampled), len(sample.token_ids))
    prompt = sample.prompt_id if tokenizer is None else tokenizer.decode(sample.token_ids[:num_prompt], skip_special_tokens=False)
    cells = (prompt, _completion(sample), sample.label or "", reward)
    return "<tr>" + "".join(f"<td><code>{escape(_cut(cell))}</code></td>" for cell in cells) + "</tr>"


def _completion(sample: Sample) -> str:
    """What followed the prompt; of many turns, what the environment said in between, too."""
    turns = sample.metadata.get("turns")
    if not (isinstance(turns, list) and all(isinstance(turn, dict) and {"by", "text"} <= set(turn) for turn in turns)):
        return sample.text
    return "\n".join(f"{turn['by']}: {turn['text']}" for turn in turns)


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]} … ({len(text) - _MAX_TEXT} more characters)"


def _settings(settings: dict[str, Any]) -> str:
    tables = []
    for section, values in settings.items():
        rows = "".join(
            f"<tr><td>{escape(key)}</td><td><code>{escape(_cut(str(value)))}</code></td></tr>" for key, value in values.items()
        )
        if rows:
            tables.append(f"<details><summary>[{escape(section)}]</summary><table>{rows}</table></details>")
    return "<h2>Settings</h2>" + "".join(tables)
