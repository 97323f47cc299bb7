"""The experiment of docs/measured/draft-training.md: a policy drifts in reinforcement learning; drafts follow it or do not.

    python tools/spec_drift.py --device cuda --size large --steps 200 --seed 0 --out OUT

One process: supervised warm-up of a policy, warm-up of a draft on its rollouts, then GRPO. Speculation changes no token, so one
trajectory serves all arms: drafts are trained beside each other on the very same states. What it takes to make the rollouts of
some steps again is saved; tools/spec_arms.py then times every arm on them. Prints tables, writes result.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 3, "head_dim": 32},
    "deeper": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 32, "num_attention_heads": 8, "head_dim": 64},
    "deep": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 24, "num_attention_heads": 8, "head_dim": 64},
    "wide": {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 16, "num_attention_heads": 12, "head_dim": 64},
    "large": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 16, "num_attention_heads": 8, "head_dim": 64},
}
TASK = "miles_core.recipes.equations"
TIMES: dict[str, float] = {}


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Note and say how long a stage took."""
    started = time.perf_counter()
    yield
    TIMES[name] = time.perf_counter() - started
    print(f"[{name}: {TIMES[name]:.1f} s]", flush=True)


def config_of(options: argparse.Namespace, name: str, steps: int, **sections: Any) -> Any:
    """A RunConfig of this experiment."""
    from miles_core.config.schema import RunConfig

    base: dict[str, Any] = {
        "run": {"name": name, "dir": str(options.out / "runs"), "num_steps": steps, "seed": options.seed},
        "rollout": {"prompts_per_step": options.prompts, "group_size": options.group},
        "sampling": {"max_new_tokens": round(options.token_room * options.count)},
        "reward": {"name": f"{TASK}:score"},
        "algorithm": {"advantage": "mean_std", "reduction": "token"},
        "trainer": {"max_tokens_per_microbatch": 32768},
        "checkpoint": {"every": 0, "keep_last": 1},
        "engine": {
            "kv_memory_bytes": 1 << (32 if options.device == "cuda" else 28),
            "max_running": 256,
            "max_batched_tokens": 4096,
        },
    }
    for section, values in sections.items():
        base[section] = {**base.get(section, {}), **values}
    return RunConfig(**base)


def run_of(config: Any, mode: str, dress: Any = None) -> Any:
    """Train a run to its end; `dress(run)` may change its parts before."""
    from miles_core.compose import Request, compose
    from miles_core.loop import train

    with compose(config, Request(mode=mode), lambda line: None) as run:
        dressed = dress(run) if dress is not None else None
        train(run)
    return dressed


def data_of(options: argparse.Namespace, seed: int) -> str:
    """The task as a data source."""
    share = f"&count={options.count}&written_out={options.written_out}&careless={options.careless}"
    bounds = f"&low={options.low}&high={options.high}&most={options.most}"
    return f"{TASK}:problems?size={40000 if seed == 0 else 4000}&seed={seed}{share}{bounds}"


def warm_up_policy(options: argparse.Namespace) -> Path:
    """Supervised training on the task's demonstrations; the model's folder."""
    shape = {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": 512, "rope_theta": 10000.0,
        "rms_norm_eps": 1e-6, "tie_word_embeddings": True, "vocab_size": 128, **SIZES[options.size],
        "num_key_value_heads": SIZES[options.size]["num_attention_heads"],
    }  # fmt: skip
    model = {"alphabet": "0123456789+-=:;,", "architecture": shape, "device": options.device, "dtype": options.dtype}
    optimizer = {"lr": options.sft_lr, "betas": (0.9, 0.95), "warmup_steps": 20, "schedule": "linear"}
    sft = {"sequences_per_step": options.sft_batch}
    run_of(config_of(
        options, "warm-up", options.sft_steps, model=model, data={"train": data_of(options, 0)}, optimizer=optimizer, sft=sft
    ), "sft")  # fmt: skip
    (found,) = (options.out / "runs" / "warm-up" / "checkpoints").glob("step_*/trainer/model")
    return found


def drift(options: argparse.Namespace, model: Path) -> tuple[list[dict], int]:
    """The run that all arms go through: the rows of its metrics, and the number of the policy's parameters."""
    config = config_of(
        options, "drift", options.steps, model={"path": str(model), "device": options.device, "dtype": options.dtype},
        data={"train": data_of(options, 1)}, optimizer={"lr": options.lr, "betas": (0.9, 0.98), "warmup_steps": 20},
    )  # fmt: skip

    def dress(run: Any) -> Any:
        from miles_core.compose import _publish
        from miles_core.draft.trainer import DraftingTrainer

        with timed("draft warm-up"):
            weights = warm_up_draft(options, run)
        inner = run.trainer
        arms = arms_of(options, inner.decoder, weights)
        run.trainer = DraftingTrainer(
            inner, arms, seed=options.seed, measure_every=options.measure_every, max_new_tokens=config.sampling.max_new_tokens
        )
        run.publisher = lambda version: _publish(run.runner, inner, run.engine, version)
        run.feed = Saving(feed=run.feed, trainer=run.trainer, every=options.every, home=options.out / "saved")
        return run.trainer

    trainer = run_of(config, "train", dress)
    names = [name for name in ("draft", "frozen", "upstream", "whole") if name in trainer.arms]
    rows = [json.loads(line) for line in (options.out / "runs" / "drift" / "metrics.jsonl").read_text().splitlines()]
    table(rows, names)
    half = rows[len(rows) // 2 :]
    names = ["perf/rollout_s", "perf/train_s", "perf/step_s", "perf/publish_s", "mismatch/tokens_unequal"]
    names += ["draft/train_s", "draft/upstream/train_s", "draft/whole/train_s"]
    means = {name: statistics.median(row.get(name, 0.0) for row in half) for name in names}
    print("medians of the second half:", {name: round(value, 4) for name, value in means.items()}, flush=True)
    return rows, sum(p.numel() for p in trainer.inner.decoder.parameters())


def warm_up_draft(options: argparse.Namespace, run: Any) -> dict[str, Any]:
    """Weights of a draft trained on rollouts of the policy as it is, drawn from the run's own feed."""
    import torch

    from miles_spec.models import MtpDraft
    from miles_spec.train import DraftTrainConfig, DraftTrainer, Policy, Rollout, stream_of, train_offline

    decoder, rollouts = run.trainer.decoder, []
    for _ in range(options.draft_rollouts):
        portion = run.feed.next(0)
        portion.settle()
        for sample in portion.samples:
            tokens, mask = torch.tensor(sample.token_ids), torch.tensor(sample.loss_mask)
            rollouts.append(Rollout(token_ids=tokens, loss_mask=mask, sample_id=sample.sample_id))
    trainer = DraftTrainer(MtpDraft.from_trunk(decoder), DraftTrainConfig(lr=options.draft_warm_lr))
    held, train = rollouts[:64], rollouts[64:]
    for share, scale in ((0.6, 1.0), (0.3, 0.3), (0.1, 0.1)):
        trainer.optimizer.config = DraftTrainConfig(lr=options.draft_warm_lr * scale)
        for _ in train_offline(trainer, decoder, train, round(options.draft_steps * share), 4000, seed=options.seed):
            pass
    judge = DraftTrainer(trainer.draft, DraftTrainConfig(), num_draft=options.num_draft)
    facts = Policy(embed=decoder.embed_tokens.detach(), head=decoder.head.detach(), seed=options.seed)
    found = judge.step([stream_of(decoder, held)], facts, train=False).metrics()
    size = sum(p.numel() for p in trainer.draft.parameters())
    print(f"draft of {size:,} parameters, accept length on rollouts held out {found['accept_length_estimate']:.3f}", flush=True)
    return {key: value.detach().clone() for key, value in trainer.draft.state_dict().items()}


def arms_of(options: argparse.Namespace, decoder: Any, weights: dict[str, Any]) -> dict[str, Any]:
    """Drafts that start from the same weights."""
    from miles_core.draft.trainer import Arm
    from miles_spec.models import MtpDraft
    from miles_spec.train import UPSTREAM, DraftTrainConfig, DraftTrainer

    def arm(train: bool = True, max_rows: int | None = None, **fields: Any) -> Any:
        draft = MtpDraft.from_trunk(decoder)
        draft.load_state_dict(weights)
        config = DraftTrainConfig(max_rows=max_rows, **fields)
        return Arm(trainer=DraftTrainer(draft, config, num_draft=options.num_draft), train=train)

    arms = {
        "draft": arm(
            max_rows=options.max_rows,
            lr=options.draft_lr,
            capture=options.capture,
            updates=options.draft_updates,
            depths=options.depths,
            ema=options.draft_ema,
            warmup_steps=options.draft_warmup,
        ),
        "frozen": arm(train=False),
        "upstream": arm(**UPSTREAM, lr=options.lr),
    }
    whole = {"lr": options.draft_lr, "capture": options.capture, "depths": options.depths}
    return arms | ({"whole": arm(**whole)} if options.whole else {})


@dataclass(kw_only=True)
class Saving:
    """Another feed, which saves at some steps what it takes to make their rollout again: policy, drafts and samples."""

    feed: Any
    trainer: Any
    every: int
    home: Path

    def next(self, step: int) -> Any:
        """The portion."""
        portion = self.feed.next(step)
        if portion is not None and portion.samples and (step - 1) % self.every == 0:
            self._save(self.home / f"step_{step:06d}", portion.samples)
        return portion

    def _save(self, folder: Path, samples: Any) -> None:
        from safetensors.torch import save_file

        from miles_rollout.wire import write_samples
        from miles_spec.models.store import save_draft

        part = folder.with_name(f"part_of_{folder.name}")  # a run may be cut off: what has its name is whole
        part.mkdir(parents=True)
        write_samples(part / "samples.jsonl", samples)
        save_file({name: value.contiguous() for name, value in self.trainer.inner.export_weights()}, part / "policy.safetensors")
        for name in ("draft", "frozen", "upstream"):
            save_draft(self.trainer.arms[name].trainer.serving, part / name)
        part.rename(folder)

    def state(self) -> dict[str, Any]:
        """The other feed's."""
        return self.feed.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.feed.load_state(state)


def table(rows: list[dict], arms: list[str]) -> None:
    """Estimated accept lengths over the run."""
    print("step  reward  tokens  entropy  " + "  ".join(f"{arm:>9}" for arm in arms) + "   ours/frozen", flush=True)
    measured = [row for row in rows if _key("draft") in row]
    for row in measured[:: max(1, len(measured) // 20)] + measured[-1:]:
        values = [row.get(_key(arm), float("nan")) for arm in arms]
        frozen = row.get(_key("frozen"), float("nan"))
        print(
            f"{row['step']:>4}  {row.get('reward/mean', 0):6.3f}  {row.get('rollout/completion_tokens_mean', 0):6.1f}  "
            f"{row.get('train/entropy', 0):7.3f}  " + "  ".join(f"{v:9.3f}" for v in values) + f"   {values[0] / frozen:8.3f}"
        )


def _key(arm: str) -> str:
    return "draft/accept_length_estimate" if arm == "draft" else f"draft/{arm}/accept_length_estimate"


def options_of() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", choices=list(SIZES), default="tiny")
    parser.add_argument("--model", type=Path, help="a warmed-up policy, instead of making one")
    parser.add_argument("--max-rows", type=int, help="most rows a draft is trained on per step")
    parser.add_argument("--capture", action="store_true", help="train drafts by CUDA graphs")
    parser.add_argument("--warm-up-only", action="store_true", help="make the policy, in OUT/model for --model, and end")
    parser.add_argument("--whole", action="store_true", help="also train, to compare, a draft on all rows of every step")
    numbers = {"seed": 0, "steps": 60, "prompts": 16, "group": 8, "count": 6, "sft-steps": 1500, "sft-batch": 64}
    numbers |= {
        "draft-steps": 300,
        "draft-rollouts": 6,
        "draft-updates": 1,
        "draft-warmup": 10,
        "num-draft": 3,
        "depths": 3,
        "measure-every": 5,
        "every": 15,
        "low": 10,
        "high": 99,
        "most": 99,
    }
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    rates = {
        "lr": 3e-4,
        "draft-lr": 1e-3,
        "draft-ema": 0.0,
        "draft-warm-lr": 3e-3,
        "sft-lr": 3e-3,
        "written-out": 0.05,
        "careless": 0.4,
        "token-room": 12.0,
    }
    for name, rate in rates.items():
        parser.add_argument(f"--{name}", type=float, default=rate)
    options = parser.parse_args()
    options.dtype = "bfloat16" if options.device == "cuda" else "float32"
    return options


def main() -> int:
    """Run the experiment."""
    options, started = options_of(), time.perf_counter()
    for part in ("runs", "saved"):
        shutil.rmtree(options.out / part, ignore_errors=True)
    (options.out / "saved").mkdir(parents=True)
    stated = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    (options.out / "saved" / "options.json").write_text(json.dumps(stated) + "\n")

    import torch

    torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    print(f"torch {torch.__version__} on {name}; {vars(options)}", flush=True)
    with timed("policy warm-up"):
        model = options.model or warm_up_policy(options)
    if options.warm_up_only:
        shutil.rmtree(options.out / "model", ignore_errors=True)
        shutil.copytree(model, options.out / "model")
        return 0
    shutil.copytree(model, options.out / "saved" / "model")
    with timed("draft warm-up and reinforcement learning"):
        rows, parameters = drift(options, model)
    result: dict[str, Any] = {"options": stated, "device": name, "rows": rows, "times": TIMES, "torch": torch.__version__}
    result["policy_parameters"] = parameters
    (options.out / "result.json").write_text(json.dumps(result) + "\n")
    unequal = sum(row.get("mismatch/tokens_unequal", 0.0) for row in rows)
    print(f"policy of {parameters:,} parameters; tokens unequal, engine and trainer: {unequal:.0f}", flush=True)
    print(f"{time.perf_counter() - started:.0f} s in all", flush=True)
    return 0 if unequal == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
