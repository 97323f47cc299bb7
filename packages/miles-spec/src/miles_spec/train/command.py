"""`miles-spec train`: a draft for a policy, from stored rollouts."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from miles_spec.train.config import LOSSES, DraftTrainConfig

_SAY_EVERY_S = 5.0


def add_arguments(commands: Any) -> None:
    """Describe the command to argparse."""
    parser = commands.add_parser(
        "train",
        help="train a draft model for a policy on stored rollouts",
        description="MODEL is the policy's directory, FILES are JSON lines of samples (RUN/samples/step_*.jsonl). The states the "
        "draft learns from are computed as it goes; the last tenth of the samples is held out and says what the draft is worth.",
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="directory for the draft; must not exist")
    parser.add_argument("--start", type=Path, help="directory of a draft to go on from; default: the policy's last layer")
    parser.add_argument("--kind", choices=["mtp", "eagle3"], default="mtp")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=4096, help="tokens of a step, prompts included")
    parser.add_argument("--loss", choices=LOSSES, default="kl")
    parser.add_argument("--depths", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.0)
    parser.add_argument("--num-draft", type=int, default=3, help="draft length the estimate is made for")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the samples")
    parser.add_argument("--noise-seed", type=int, default=0, help="the seed the samples were drawn with (run.seed)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")


def run(options: argparse.Namespace) -> int:
    """Train and write the draft. Raises ValueError for what does not fit."""
    from miles_kernels.contract import Contract
    from miles_kernels.nn.checkpoint import load_decoder
    from miles_spec.models import Eagle3Draft, MtpDraft
    from miles_spec.models.store import load_draft, save_draft
    from miles_spec.train.offline import read_rollouts, stream_of, train_offline
    from miles_spec.train.trainer import DraftTrainer, Policy

    for name in ("steps", "rows", "num_draft"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(options, name)}")
    if options.out.exists():
        raise ValueError(f"{options.out} exists; name another --out, or remove it")
    config = DraftTrainConfig(loss=options.loss, depths=options.depths, lr=options.lr, ema=options.ema)
    rollouts = read_rollouts(options.files)
    if len(rollouts) < 2:
        raise ValueError("one sample is too few: some are held out; give more rollouts")
    contract = Contract.for_device(options.device, options.dtype, "full")
    policy = load_decoder(options.model, contract, contract.torch_dtype, device=options.device).requires_grad_(False)
    if options.start is not None:
        draft = load_draft(options.start, policy.config, contract, dtype=contract.torch_dtype, device=options.device)
    else:
        draft = MtpDraft.from_trunk(policy) if options.kind == "mtp" else Eagle3Draft.from_trunk(policy)
    trainer = DraftTrainer(draft, config, num_draft=options.num_draft)
    held = rollouts[-max(1, len(rollouts) // 10) :]
    facts = Policy(
        embed=policy.embed_tokens, head=policy.head, seed=options.noise_seed, stop_ids=frozenset(policy.config.eos_token_ids)
    )
    test = stream_of(policy, held, draft.config.feature_layers)
    print(
        f"{len(rollouts)} samples, {len(held)} of them held out; {_words(trainer.step([test], facts, train=False))}", flush=True
    )
    started = said = time.monotonic()
    shown = rollouts[: len(rollouts) - len(held)]
    noise = options.noise_seed
    for number, made in enumerate(
        train_offline(trainer, policy, shown, options.steps, options.rows, seed=options.seed, noise_seed=noise), 1
    ):
        if time.monotonic() - said > _SAY_EVERY_S:
            said = time.monotonic()
            print(f"step {number}/{options.steps}  {_words(made)}", flush=True)
    print(f"held out after {options.steps} steps, {time.monotonic() - started:.0f} s: "
          f"{_words(trainer.step([test], facts, train=False))}")  # fmt: skip
    save_draft(trainer.serving, options.out)
    print(f"draft written to {options.out}")
    return 0


def _words(made: Any) -> str:
    losses = " ".join(f"{loss:.3f}" for loss in made.loss_by_depth)
    length = made.estimate.stats.accept_length
    return f"loss by depth {losses}" + (f"  accept length {length:.3f}" if length else "")
