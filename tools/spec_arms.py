"""The served arms of a run of tools/spec_drift.py: tools/spec_arms.py OUT --batches 8 32 192

At every step that run has saved, one engine per arm, all standing the whole time, takes the policy and its own draft of that step
and makes the step's rollout again, to the same tokens. An arm whose draft is trained is charged with that training, which is
timed here too, on the same sequences. Nothing else should run on the device. Prints tables, writes OUT/served.json; ends with
code 1 when an arm made another token or log-probability than the run recorded.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from spec_drift import config_of

ARMS = ("none", "frozen", "upstream", "ours", "adaptive")
_ESTIMATE = "draft/accept_length_estimate"
DRAFT_OF = {"frozen": "frozen", "upstream": "upstream", "ours": "draft", "adaptive": "draft"}
"""Which draft in training an arm serves."""


@dataclass(kw_only=True)
class Saved:
    """The policy and the drafts of one saved step, as `Comparison` wants a trainer."""

    contract: Any
    policy: dict[str, Any] = field(default_factory=dict)
    drafts: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def inner(self) -> Saved:
        """The policy's side."""
        return self

    def export_weights(self) -> Iterator[tuple[str, Any]]:
        """Of the policy."""
        yield from self.policy.items()

    def draft_weights(self, arm: str) -> Iterator[tuple[str, Any]]:
        """Of a draft."""
        yield from self.drafts[arm].items()

    def read(self, folder: Path, device: str) -> None:
        """Take another step's."""
        from safetensors.torch import load_file

        self.policy = load_file(folder / "policy.safetensors", device=device)
        self.drafts = {
            name: load_file(folder / name / "model.safetensors", device=device) for name in ("draft", "frozen", "upstream")
        }


def engines(settings: Any, loaded: Any, draft: Any, num_draft: int, graphs: bool, ahead: bool = False) -> dict[str, Any]:
    """An engine for each arm, of weight version -1: weights and drafts are published before every replay."""
    import msgspec

    from miles_rollout.engines.embedded.engine import EmbeddedEngine

    found = {}
    for arm in ARMS:
        adaptive = arm == "adaptive"
        own = msgspec.structs.replace(settings, draft_tokens=num_draft, draft_adaptive=adaptive, cuda_graph_drafts=graphs)
        if ahead:
            own = msgspec.structs.replace(own, cuda_graph_lengths=True, draft_catch_up="captured")
        model = None if arm == "none" else deepcopy(draft).requires_grad_(False)
        found[arm] = EmbeddedEngine(deepcopy(loaded.decoder), loaded.tokenizer, own, weight_version=-1, draft=model)
    return found


def trainers(options: argparse.Namespace, draft: Any, capture: bool) -> dict[str, Any]:
    """What trains a draft, by arm, as the run did."""
    from miles_spec.train import UPSTREAM, DraftTrainConfig, DraftTrainer

    settings = {
        "ours": DraftTrainConfig(
            max_rows=options.max_rows,
            lr=options.draft_lr,
            capture=capture,
            updates=options.draft_updates,
            depths=options.depths,
            ema=options.draft_ema,
        ),
        "upstream": DraftTrainConfig(**UPSTREAM, lr=options.lr),
    }
    return {
        arm: DraftTrainer(deepcopy(draft).requires_grad_(True), config, num_draft=options.num_draft)
        for arm, config in settings.items()
    }


def training_seconds(
    options: argparse.Namespace, saved: Saved, decoder: Any, made: Mapping[str, Any], samples: Any
) -> dict[str, float]:
    """Median seconds of a draft's training on a step's rollout, by arm: its states are there, its update is waited for.

    Each choice of sequences is trained on twice and the second time counts: a run of many steps has captured its shapes.
    """
    import torch

    from miles_spec.train import Policy, Rollout, stream_of

    with torch.no_grad():
        for name, view in decoder.hf_state():
            view.copy_(saved.policy[name])
    rollouts = [
        Rollout(token_ids=torch.tensor(s.token_ids), loss_mask=torch.tensor(s.loss_mask), sample_id=s.sample_id) for s in samples
    ]
    stream = stream_of(decoder, rollouts)
    facts = Policy(embed=decoder.embed_tokens.detach(), head=decoder.head.detach(), seed=options.seed)
    found = {}
    for arm, trainer in made.items():
        times = []
        for key in (0, 1, 2, 0, 1, 2):
            if stream.device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            chosen = trainer.choose(stream.sequences, key)
            part = stream if len(chosen) == len(stream.sequences) else stream.select(chosen)
            trainer.step([part], facts, measure=False)
            if stream.device.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        found[arm] = median(times[3:])
    return found | {"adaptive": found["ours"]}


def estimate(options: argparse.Namespace, saved: Saved, decoder: Any, draft: Any, samples: Any, most: int) -> float:
    """The trainer's estimate of ours on all sequences of a step; the run made it of those that ours learnt from."""
    import torch

    from miles_spec.train import DraftTrainConfig, DraftTrainer, Policy, Rollout, stream_of

    draft.load_named(saved.drafts["draft"].items())
    rollouts = [
        Rollout(token_ids=torch.tensor(s.token_ids), loss_mask=torch.tensor(s.loss_mask), sample_id=s.sample_id) for s in samples
    ]
    facts = Policy(
        embed=decoder.embed_tokens.detach(), head=decoder.head.detach(), seed=options.seed, max_new_tokens=most,
        stop_ids=frozenset(decoder.config.eos_token_ids),
    )  # fmt: skip
    judge = DraftTrainer(draft, DraftTrainConfig(), num_draft=options.num_draft)
    return float(judge.step([stream_of(decoder, rollouts)], facts, train=False).metrics()["accept_length_estimate"])


async def replay(
    row: dict[str, float], comparisons: Mapping[str, Mapping[str, Any]], samples: Any, number: int, every: int, failed: set
) -> None:
    """All arms at one saved step; what they did goes into `row` as "BATCH/ARM/...". The last batch only every so often."""
    for at, (batch, arms) in enumerate(comparisons.items()):
        if 0 < at == len(comparisons) - 1 and number % every:
            continue
        said = []
        for arm, comparison in arms.items():
            if (batch, arm) in failed:
                continue
            try:
                found = await comparison.run(number, samples)
            except Exception as error:  # an arm that fails must cost no other
                failed.add((batch, arm))
                print(f"  {batch}/{arm} failed: {type(error).__name__}: {error}", flush=True)
                continue
            row.update({f"{batch}/{arm}/{key.rpartition('/')[2]}": value for key, value in found.items()})
            speed, length = row[f"{batch}/{arm}/rollout_tokens_per_s"], row.get(f"{batch}/{arm}/accept_length", 1.0)
            said.append(f"{arm} {speed:,.0f} ({length:.2f}; {row[f'{batch}/{arm}/tokens_unequal']:.0f} unequal)")
        print(f"  step {row['step']:.0f}, batch {batch}: " + "  ".join(said), flush=True)


# ---------------------------------------------------------------- what came out


def replay_table(rows: Sequence[Mapping[str, float]], name: str) -> list[dict[str, float]]:
    """One row per replayed step: tokens per second of every arm with its training charged, and accept lengths."""
    found = []
    for row in rows:
        out = {"step": row["step"], "reward": row["reward"]}
        for arm in ARMS:
            if f"{name}/{arm}/rollout_s" not in row:
                continue
            seconds = row[f"{name}/{arm}/rollout_s"]
            tokens = seconds * row[f"{name}/{arm}/rollout_tokens_per_s"]
            charge = row.get(f"train_s/{arm}", 0.0) * tokens / row["tokens"]  # of a step that was made again in part, its part
            out |= {f"{arm}/tokens": tokens, f"{arm}/seconds": seconds, f"{arm}/charge": charge}
            out |= {f"{arm}/speed": tokens / (seconds + charge), f"{arm}/length": row.get(f"{name}/{arm}/accept_length", 1.0)}
            out[f"{arm}/unequal"] = row[f"{name}/{arm}/tokens_unequal"]
        if len(out) > 2:
            found.append(out)
    return found


def summary(table: Sequence[Mapping[str, float]], steps: int) -> dict[str, float]:
    """Ratios between arms: means over replayed steps and over those of the last quarter, and of all tokens by all seconds."""
    found: dict[str, float] = {"num_replays": float(len(table))}
    late = [row for row in table if row["step"] > 0.75 * steps]

    def ratio(rows: Sequence[Mapping[str, float]], kind: str, a: str, b: str) -> float:
        pairs = [row[f"{a}/{kind}"] / row[f"{b}/{kind}"] for row in rows if f"{a}/{kind}" in row and f"{b}/{kind}" in row]
        return fmean(pairs) if pairs else float("nan")

    for kind, pairs in {
        "speed": (("ours", "frozen"), ("ours", "none"), ("adaptive", "none"), ("adaptive", "frozen"), ("ours", "upstream")),
        "length": (("ours", "frozen"), ("ours", "upstream")),
    }.items():
        for a, b in pairs:
            found[f"{kind} {a}/{b}"] = ratio(table, kind, a, b)
            found[f"{kind} {a}/{b} last quarter"] = ratio(late, kind, a, b)
    for arm in ARMS:
        mine = [row for row in table if f"{arm}/seconds" in row]
        if mine:
            spent = sum(row[f"{arm}/seconds"] + row[f"{arm}/charge"] for row in mine)
            tokens = sum(row[f"{arm}/tokens"] for row in mine)
            found |= {f"{arm} tokens": tokens, f"{arm} tokens/s": tokens / spent}
            found[f"{arm} unequal"] = sum(row[f"{arm}/unequal"] for row in mine)
    return found


def estimate_gaps(
    metrics: Path, tables: Mapping[str, Sequence[Mapping[str, float]]], rows: Sequence[Mapping[str, float]]
) -> dict[str, float]:
    """By "BATCH/ARM/STEP": the trainer's estimate of the accept length over the served one, less 1, for whole steps."""
    stated = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    estimates, whole = {row["step"]: row for row in stated}, {row["step"]: row["tokens"] for row in rows}
    ours = {row["step"]: row["estimate"] for row in rows}
    found = {}
    for batch, table in tables.items():
        for row in table:
            for arm in ("frozen", "upstream", "ours"):
                key = _ESTIMATE.replace("/", f"/{arm}/")
                expected = ours.get(row["step"]) if arm == "ours" else estimates.get(row["step"], {}).get(key)
                if expected is not None and round(row.get(f"{arm}/tokens", 0.0)) == whole[row["step"]]:
                    found[f"{batch}/{arm}/{row['step']:.0f}"] = expected / row[f"{arm}/length"] - 1.0
    return found


def show(table: Sequence[Mapping[str, float]], name: str, steps: int) -> None:
    """Print both."""
    print(f"\nbatch {name}: tokens/s with draft training charged, (seconds + charge), accept length")
    for row in table:
        parts = [
            f"{arm} {row[f'{arm}/speed']:>7,.0f} ({row[f'{arm}/seconds']:.3f}+{row[f'{arm}/charge']:.3f}) "
            f"{row[f'{arm}/length']:.2f}"
            for arm in ARMS
            if f"{arm}/speed" in row
        ]
        print(f"{row['step']:>4.0f} reward {row['reward']:.3f}  " + "  ".join(parts))
    for key, value in summary(table, steps).items():
        print(f"  {key:<36} {value:,.3f}")
    print(flush=True)


def spread(items: Sequence[Any]) -> list[Any]:
    """The last, the first, then always what lies farthest from those before: a deadline leaves an even choice."""
    order = list(range(len(items)))[-1:]
    while len(order) < len(items):
        order.append(max(set(range(len(items))) - set(order), key=lambda i: (min(abs(i - j) for j in order), i)))
    return [items[i] for i in order]


async def serve(args: argparse.Namespace, options: argparse.Namespace) -> list[dict[str, float]]:
    """The rows of all saved steps."""
    import msgspec

    from miles_core.draft.served import Comparison
    from miles_core.models import load_model
    from miles_rollout.wire import read_samples
    from miles_spec.models.store import load_draft

    home = args.out / "saved"
    model = {"path": str(home / "model"), "device": options.device, "dtype": options.dtype}
    config = config_of(options, "serve", 1, model=model, data={"train": "unused"})
    loaded = load_model(config, lambda line: None)
    decoder, weight = loaded.decoder, loaded.decoder.embed_tokens
    folders = sorted(home.glob("step_*"))
    draft = load_draft(folders[0] / "draft", decoder.config, decoder.contract, dtype=weight.dtype, device=weight.device)
    saved = Saved(contract=decoder.contract)
    sampling = config.sampling.params(seed=options.seed, n=options.group)
    judged = deepcopy(draft)
    learning = trainers(options, draft, args.capture)
    comparisons, made = {}, []
    for batch in args.batches:
        settings = msgspec.structs.replace(config.engine.embedded(), max_running=batch)
        each = engines(settings, loaded, draft, options.num_draft, args.graph_drafts, args.graph_lengths)
        made += [(f"{batch}/{arm}", engine) for arm, engine in each.items()]
        comparisons[str(batch)] = {
            arm: Comparison(saved, {arm: engine}, sampling, 1, args.waves * batch)  # type: ignore[arg-type]
            for arm, engine in each.items()
        }
    rows: list[dict[str, float]] = []
    failed: set[tuple[str, str]] = set()
    started = time.perf_counter()
    for number, folder in enumerate(spread(folders)):
        if time.perf_counter() - started > args.deadline:
            print(f"  deadline: {len(folders) - number} saved steps are left out", flush=True)
            break
        saved.read(folder, options.device)
        samples = read_samples(folder / "samples.jsonl")
        row = {"step": float(folder.name.removeprefix("step_")), "reward": fmean(sample.reward for sample in samples)}
        row["tokens"] = float(sum(sum(sample.loss_mask) for sample in samples))
        seconds = training_seconds(options, saved, decoder, learning, samples)
        row |= {f"train_s/{arm}": value for arm, value in seconds.items()}
        row["estimate"] = estimate(options, saved, decoder, judged, samples, config.sampling.max_new_tokens)
        if number < 2:  # the ends of the run have all lengths: made again untimed first, they capture what the others need
            for each in comparisons.values():
                for comparison in each.values():
                    comparison.warm.clear()
        await replay(row, comparisons, samples, number, args.every, failed)
        rows.append(row)
        print(f"  [{time.perf_counter() - started:.1f} s; draft training {seconds}]", flush=True)
    for name, engine in made:
        counts = engine.metrics()
        print(f"  {name}: {counts['num_steps']:.0f} steps, {counts.get('spec_num_on_device', 0):.0f} drafted for on the device")
        await engine.close()
    return sorted(rows, key=lambda row: row["step"])


def main() -> int:
    """Serve, then say what came out."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("out", type=Path, help="the --out of tools/spec_drift.py")
    parser.add_argument("--batches", type=int, nargs="*", default=[32, 128], help="sequences that engines run at once")
    parser.add_argument("--every", type=int, default=4, help="saved steps between two at the last of several batches")
    parser.add_argument("--graph-drafts", action="store_true", help="capture drafting and verification")
    parser.add_argument("--graph-lengths", action="store_true", help="capture every draft length ahead, and catching up")
    parser.add_argument("--num-draft", type=int, help="draft length, instead of that of the run")
    parser.add_argument("--capture", action="store_true", help="time draft training by a CUDA graph")
    parser.add_argument("--deadline", type=float, default=1e9, help="seconds after which no further step is served")
    parser.add_argument("--report", type=Path, help="where to write, instead of OUT/served.json")
    parser.add_argument("--waves", type=int, default=8, help="most sequences made again of a step, in batches")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(1)
    stated = json.loads((args.out / "saved" / "options.json").read_text())
    options = argparse.Namespace(**stated)
    options.out, options.num_draft = args.out, args.num_draft or options.num_draft
    rows = asyncio.run(serve(args, options))
    result: dict[str, Any] = {"options": stated, "rows": rows, "torch": torch.__version__, "tables": {}}
    for batch in args.batches:
        found = replay_table(rows, str(batch))
        show(found, str(batch), options.steps)
        result["tables"][str(batch)] = {"replays": found, "summary": summary(found, options.steps)}
    gaps = estimate_gaps(
        args.out / "runs" / "drift" / "metrics.jsonl", {b: t["replays"] for b, t in result["tables"].items()}, rows
    )
    result["estimate_gaps"] = gaps
    if gaps:
        worst = max(gaps, key=lambda name: abs(gaps[name]))
        print(f"trainer's estimate over the served accept length, {len(gaps)} of them: largest gap {gaps[worst]:.5f} at {worst}")
    (args.report or args.out / "served.json").write_text(json.dumps(result) + "\n")
    unequal = sum(value for row in rows for key, value in row.items() if key.endswith("/tokens_unequal"))
    print(f"tokens unlike the record, all arms: {unequal:.0f}", flush=True)
    return 0 if unequal == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
