"""A trainer of somebody else's: plain torch and transformers, no part of Miles but the rollout client.

    miles-rollout serve MODEL --weights-root /tmp/policy &
    python packages/miles-rollout/examples/reinforce.py MODEL http://127.0.0.1:30000 --steps 20 --folder /tmp/policy

REINFORCE with a group baseline on a toy reward, the share of one token id in a completion. Tokens and log-probabilities come from
the server, gradients from transformers, new weights go back as safetensors after every step. Prints one line a step.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from miles_rollout.client import RolloutClient
from miles_rollout.wire import Completion, GenerateRequest, SamplingParams


async def train(
    model_dir: str, url: str, folder: Path, *, steps: int, group: int, wanted: int, lr: float, token: str | None
) -> list[float]:
    """The mean reward of every step."""
    torch.manual_seed(0)
    policy = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    prompt = (5, 6, 7)
    rewards = []
    async with RolloutClient(url, token) as client:
        for step in range(steps):
            sampling = SamplingParams(n=group, max_new_tokens=12, ignore_eos=True, seed=step)
            result = await client.generate(GenerateRequest(request_id=f"step{step}", input_ids=prompt, sampling=sampling))
            assert all(span.version == client.info().weight_version for each in result.completions for span in each.weight_spans)
            rewards.append(update(policy, optimizer, prompt, result.completions, wanted))
            print(f"step {step}: reward {rewards[-1]:.3f}, weights {client.info().weight_version}", flush=True)
            target = folder / f"step{step}"
            policy.save_pretrained(target)
            await client.update_weights_from_disk(str(target))
            shutil.rmtree(target)
    return rewards


def update(
    policy: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    prompt: tuple[int, ...],
    completions: tuple[Completion, ...],
    wanted: int,
) -> float:
    """One gradient step; the mean reward of the group."""
    ids = torch.tensor([prompt + each.token_ids for each in completions])
    sampled = ids[:, len(prompt) :]
    reward = (sampled == wanted).float().mean(dim=1)
    advantage = (reward - reward.mean()) / (reward.std() + 1e-6)
    logp = torch.log_softmax(policy(ids).logits[:, len(prompt) - 1 : -1], dim=-1).gather(-1, sampled[..., None])[..., 0]
    loss = -(advantage[:, None] * logp).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(reward.mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("url")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--group", type=int, default=32)
    parser.add_argument("--wanted", type=int, default=9, help="token id that is rewarded")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--token", help="the server's admin token")
    given = parser.parse_args()
    found = asyncio.run(
        train(
            given.model, given.url, given.folder, steps=given.steps, group=given.group, wanted=given.wanted, lr=given.lr,
            token=given.token,
        )
    )  # fmt: skip
    sys.exit(found[-1] <= found[0])
