"""The experiment of docs/measured/draft-training.md: a policy drifts in reinforcement learning; drafts follow it or do not.

    python tools/spec_drift.py --device cuda --size large --steps 200 --seed 0 --out OUT

One process: supervised warm-up of a policy, warm-up of a draft on its rollouts, then GRPO. Speculation changes no token, so one
trajectory serves all arms: drafts are trained beside each other on the very same states, and at some steps every arm's engine
makes the step's rollout again, with the same weights, seeds and prompts, to the same tokens. Prints tables, writes result.json.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 3, "head_dim": 32},
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
        "sampling": {"max_new_tokens": 12 * options.count},
        "reward": {"name": f"{TASK}:score"},
        "algorithm": {"advantage": "mean_std", "reduction": "token"},
        "trainer": {"max_tokens_per_microbatch": 32768},
        "checkpoint": {"every": 0, "keep_last": 1},
        "engine": {"kv_memory_bytes": 1 << 28, "max_running": 256, "max_batched_tokens": 4096},
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
    return f"{TASK}:problems?size={60000 if seed == 0 else 20000}&seed={seed}{share}"


def warm_up_policy(options: argparse.Namespace) -> Path:
    """Supervised training on the task's demonstrations; the model's folder."""
    shape = {
        "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "max_position_embeddings": 256, "rope_theta": 10000.0,
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


def reinforce(
    options: argparse.Namespace, model: Path, name: str, steps: int, lr: float, make_arms: Any
) -> tuple[Any, list[dict]]:
    """A run whose trainer has the drafts that `make_arms(decoder)` gives beside it; the trainer and the rows of metrics."""
    from miles_core.draft.trainer import DraftingTrainer

    config = config_of(
        options, name, steps, model={"path": str(model), "device": options.device, "dtype": options.dtype},
        data={"train": data_of(options, 1)}, optimizer={"lr": lr, "betas": (0.9, 0.95), "warmup_steps": 5},
    )  # fmt: skip

    def dress(run: Any) -> Any:
        trainer = DraftingTrainer(run.trainer, make_arms(run.trainer.decoder), seed=options.seed)
        inner, run.trainer = run.trainer, trainer
        from miles_core.compose import _publish

        run.publisher = lambda version: _publish(run.runner, inner, run.engine, version)
        return trainer, run.tokenizer, config

    dressed = run_of(config, "train", dress)
    rows = [json.loads(line) for line in (options.out / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    return dressed, rows


def serve(
    options: argparse.Namespace, dressed: Any, samples: list[Any], arm: str, model: Any, adaptive: bool, reference: dict
) -> dict[str, float]:
    """One arm's engine rolls prompts out with the weights of now: tokens per second, accept length, tokens unlike `reference`."""
    from copy import deepcopy

    import msgspec
    import torch

    from miles_core.draft.served import _requests, accept_metrics
    from miles_rollout.engines.embedded.engine import EmbeddedEngine

    trainer, tokenizer, config = dressed
    settings = msgspec.structs.replace(config.engine.embedded(), draft_tokens=options.num_draft, draft_adaptive=adaptive)
    sampling = config.sampling.params(seed=options.seed, n=options.group)
    requests, _ = _requests(samples, sampling)

    async def measure() -> dict[str, float]:
        engine = EmbeddedEngine(deepcopy(trainer.inner.decoder), tokenizer, settings, draft=model)
        best: dict[str, float] = {}
        try:
            for _ in range(options.repeats):
                before, started = engine.metrics(), time.perf_counter()
                results = await asyncio.gather(*(engine.generate(request) for request in requests))
                seconds = time.perf_counter() - started
                made = {c.sample_id: (c.token_ids, c.logprobs) for result in results for c in result.completions}
                for key, value in made.items():
                    reference.setdefault(key, value)
                unequal = sum(made[key] != reference[key] for key in made)
                tokens = sum(len(ids) for ids, _ in made.values())
                found = {"seconds": seconds, "tokens": float(tokens), "samples_unequal": float(unequal)}
                found |= accept_metrics(before, engine.metrics())
                if not best or seconds < best["seconds"]:
                    best = found
        finally:
            await engine.close()
        return best

    with torch.no_grad():
        found = asyncio.run(measure())
    found["tokens_per_s"] = found["tokens"] / found["seconds"]
    print(f"  served {arm:<9} batch {len(samples):>3}  " + "  ".join(f"{k} {v:.4g}" for k, v in found.items()), flush=True)
    return found


def overhead(trainer: Any, samples: list[Any], depths: int, max_rows: int | None, rounds: int) -> dict[str, float]:
    """Seconds of the policy's step and of the draft's beside it, in turns on the same batch; both are then forgotten."""
    import torch

    from miles_core.draft.trainer import Arm, DraftingTrainer
    from miles_core.trainer.batch import TrainBatch
    from miles_spec.models import MtpDraft
    from miles_spec.train import DraftTrainConfig, DraftTrainer

    batch = TrainBatch.from_samples(samples, [sample.reward - 0.5 for sample in samples])
    cuda = trainer.inner.decoder.embed_tokens.is_cuda
    draft = MtpDraft.from_trunk(trainer.inner.decoder)
    own = DraftTrainer(draft, DraftTrainConfig(depths=depths, max_rows=max_rows))
    beside = DraftingTrainer(trainer.inner, {"draft": Arm(trainer=own)})
    whole, alone = [], []
    for number in range(rounds + 2):
        for times, step in ((whole, beside.step), (alone, trainer.inner.step)):
            trainer.inner.observe(beside)
            if step != beside.step:
                trainer.inner._observer = trainer.inner.model.watcher = None
            if cuda:
                torch.cuda.synchronize()
            started = time.perf_counter()
            step(batch)
            if cuda:
                torch.cuda.synchronize()
            if number >= 2:
                times.append(time.perf_counter() - started)
    whole.sort(), alone.sort()
    a, b = whole[len(whole) // 2], alone[len(alone) // 2]
    rows = sum(len(sample.token_ids) - 1 for sample in samples)
    return {"step_s": b, "with_draft_s": a, "share": a / b - 1.0, "rows": rows, "max_rows": max_rows or rows, "depths": depths}


def table(rows: list[dict], arms: list[str]) -> None:
    """Accept lengths over the run."""
    print("step  reward  tokens  entropy  " + "  ".join(f"{arm:>9}" for arm in arms) + "   ours/frozen", flush=True)
    for row in rows[:: max(1, len(rows) // 20)] + rows[-1:]:
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
    parser.add_argument("--deadline", type=float, default=1e9, help="seconds after which no further arm is served")
    numbers = {"seed": 0, "steps": 60, "prompts": 16, "group": 8, "count": 6, "sft-steps": 1500, "sft-batch": 64}
    numbers |= {"draft-steps": 40, "num-draft": 3, "repeats": 3}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, rate in {"lr": 3e-4, "draft-lr": 2e-3, "sft-lr": 3e-3, "written-out": 0.05, "careless": 0.4}.items():
        parser.add_argument(f"--{name}", type=float, default=rate)
    options = parser.parse_args()
    options.dtype = "bfloat16" if options.device == "cuda" else "float32"
    return options


def warm_up_draft(options: argparse.Namespace, model: Path) -> tuple[dict[str, Any], int]:
    """A draft trained on the rollouts of the policy as it is; its weights, and the number of the policy's."""
    from miles_core.draft.trainer import Arm
    from miles_spec.models import MtpDraft
    from miles_spec.train import DraftTrainConfig, DraftTrainer

    def one(decoder: Any) -> dict[str, Any]:
        draft, config = MtpDraft.from_trunk(decoder), DraftTrainConfig(lr=3e-3)
        return {"draft": Arm(trainer=DraftTrainer(draft, config, num_draft=options.num_draft))}

    (trainer, *_), rows = reinforce(options, model, "draft-warm-up", options.draft_steps, 0.0, one)
    table(rows, ["draft"])
    parameters = sum(p.numel() for p in trainer.inner.decoder.parameters())
    print(f"policy {parameters:,} parameters, draft {sum(p.numel() for p in trainer.main.draft.parameters()):,}", flush=True)
    return {key: value.clone() for key, value in trainer.main.draft.state_dict().items()}, parameters


def drift(options: argparse.Namespace, model: Path, weights: dict[str, Any]) -> tuple[Any, list[dict]]:
    """The run that all arms go through."""
    from miles_core.draft.trainer import Arm
    from miles_spec.models import MtpDraft
    from miles_spec.train import UPSTREAM, DraftTrainConfig, DraftTrainer

    def drafts(decoder: Any) -> dict[str, Any]:
        def arm(train: bool = True, **fields: Any) -> Any:
            draft = MtpDraft.from_trunk(decoder)
            draft.load_state_dict(weights)
            config = DraftTrainConfig(max_rows=options.max_rows, **fields)
            return Arm(trainer=DraftTrainer(draft, config, num_draft=options.num_draft), train=train)

        ours = arm(lr=options.draft_lr, warmup_steps=0)
        return {"draft": ours, "frozen": arm(train=False), "upstream": arm(**UPSTREAM, lr=options.lr)}

    dressed, rows = reinforce(options, model, "drift", options.steps, options.lr, drafts)
    table(rows, ["draft", "frozen", "upstream"])
    half = rows[len(rows) // 2 :]
    names = ["perf/rollout_s", "perf/train_s", "perf/step_s", "perf/publish_s", "mismatch/tokens_unequal"]
    names += ["draft/train_s", "draft/frozen/train_s", "draft/upstream/train_s"]
    means = {name: round(sum(row.get(name, 0.0) for row in half) / len(half), 4) for name in names}
    print("means of the second half:", means, flush=True)
    return dressed, rows


def serve_all(options: argparse.Namespace, dressed: Any, samples: list[Any], started: float) -> dict[str, Any]:
    """Every arm at a small batch and at that of a step."""
    found: dict[str, Any] = {}
    arms = {"none": None, "frozen": "frozen", "upstream": "upstream", "ours": "draft", "adaptive": "draft"}
    for batch in (options.group * 4, len(samples)):
        chosen, reference = sorted(samples, key=lambda sample: sample.sample_id)[:batch], {}
        for arm, draft in arms.items():
            if time.perf_counter() - started > options.deadline:
                print("  deadline: no further arm", flush=True)
                return found
            try:
                served = None if draft is None else dressed[0].arms[draft].trainer.serving
                made = serve(options, dressed, chosen, arm, served, arm == "adaptive", reference)
                found[f"{arm}@{len(chosen)}"] = made
            except Exception as error:  # an arm that fails must not cost the others
                print(f"  served {arm} failed: {type(error).__name__}: {error}", flush=True)
    return found


def main() -> int:
    """Run the experiment."""
    options, started = options_of(), time.perf_counter()
    shutil.rmtree(options.out / "runs", ignore_errors=True)
    options.out.mkdir(parents=True, exist_ok=True)

    import torch

    from miles_rollout.wire import read_samples

    torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if options.device == "cuda" else "cpu"
    print(f"torch {torch.__version__} on {name}; {vars(options)}", flush=True)
    with timed("policy warm-up"):
        model = options.model or warm_up_policy(options)
    with timed("draft warm-up"):
        weights, parameters = warm_up_draft(options, model)
    with timed("reinforcement learning"):
        dressed, rows = drift(options, model, weights)
    result: dict[str, Any] = {"options": {k: str(v) for k, v in vars(options).items()}, "device": name, "rows": rows}
    result |= {"times": TIMES, "policy_parameters": parameters, "torch": torch.__version__, "overhead": []}

    def save() -> None:
        (options.out / "result.json").write_text(json.dumps(result) + "\n")

    save()
    samples = read_samples(sorted((options.out / "runs" / "drift" / "samples").glob("step_*.jsonl"))[-1])
    with timed("served"):
        result["served"] = serve_all(options, dressed, samples, started)
    save()
    with timed("overhead"):
        for depths, most in ((3, options.max_rows), (3, None), (1, None)):
            found = overhead_guarded(dressed[0], samples, depths, most)
            print("  draft training:", {k: round(v, 4) for k, v in found.items()}, flush=True)
            result["overhead"].append(found)
    save()
    return 0


def overhead_guarded(trainer: Any, samples: list[Any], depths: int, most: int | None) -> dict[str, float]:
    """`overhead` with learning rates of zero, so that the policy stays as it is."""
    optimizer = trainer.inner.optimizer
    kept, optimizer.cfg = optimizer.cfg, optimizer.cfg.model_copy(update={"lr": 0.0, "weight_decay": 0.0})
    try:
        return overhead(trainer, samples, depths, most, 8)
    finally:
        optimizer.cfg = kept


if __name__ == "__main__":
    sys.exit(main())
