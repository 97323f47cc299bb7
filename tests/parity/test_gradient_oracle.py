"""The gradient of a packed, accumulated, data-parallel step against float64, one sequence at a time.

The oracle shares nothing with the product but the samples and the weights: transformers' model in float64, no packing, no
batch, plain autograd of a loss written out here. Run as a script, this file is one of the data-parallel processes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import traceback
from collections import defaultdict
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.trainer.batch import SftExample, TrainBatch
from miles_core.trainer.config import OptimizerConfig, TrainerConfig
from miles_core.trainer.fsdp import FsdpTrainer
from miles_core.trainer.tensorfile import load_tensors, save_tensors
from miles_core.trainer.testing import random_samples
from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.config import DecoderConfig
from miles_kernels.nn.decoder import Decoder
from miles_rollout.wire import Sample, read_samples, write_samples

TOLERANCE = 1e-5
MODEL = {
    "family": "qwen3",
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.15,
}
TEMPERATURE = 0.8
ALGORITHMS = {
    "grpo": AlgorithmConfig(),
    "dr_grpo": AlgorithmConfig(advantage="mean", reduction="constant", constant_tokens=8, clip_high=0.28),
    "all_terms": AlgorithmConfig(reduction="sequence", kl_coef=0.2, entropy_coef=0.01, mismatch_clip=2.0, dual_clip=3.0),
}


FAMILIES = {
    "llama": {},
    "qwen2": {"attention_bias": True},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True},
}


def build(name: str, *, model: dict[str, object] | None = None, **config: object) -> FsdpTrainer:
    """A trainer whose reference policy is another model, so that the KL term has a gradient."""
    shape = DecoderConfig(**{**MODEL, **(model or {})})
    return FsdpTrainer(
        random_decoder(shape, 0),
        ALGORITHMS[name],
        TrainerConfig(grad_clip=0.0, **config),
        OptimizerConfig(lr=1e-3),
        reference=random_decoder(shape, 1),
    )


def hf_gradients(trainer: FsdpTrainer, gradients: list[Tensor]) -> dict[str, Tensor]:
    """Gradients of fused parameters, cut over the processes, under HF names."""
    weights = trainer.model.weights()
    owned = {name: weights[name].with_local(g) for name, g in zip(trainer.optimizer.names, gradients, strict=True)}
    return {piece.name: owned[piece.owner].read(piece.offset, piece.shape, torch.float32) for piece in trainer.model.slices}


def step_gradients(trainer: FsdpTrainer, batch: TrainBatch) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What `step` hands to the optimizer, and its metrics; the update itself is done as well."""
    held: list[Tensor] = []
    original = trainer.optimizer.step

    def step(gradients: list[Tensor]) -> float:
        held.extend(gradient.clone() for gradient in gradients)
        return original(gradients)

    trainer.optimizer.step = step  # type: ignore[method-assign]
    metrics = trainer.step(batch).metrics()
    trainer.optimizer.step = original  # type: ignore[method-assign]
    return hf_gradients(trainer, held), metrics


# ---- the oracle


def oracle_model(decoder: Decoder) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    values = decoder.config.to_hf(dtype="float32")
    config = AutoConfig.for_model(**values)
    model = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager", dtype=torch.float64
    )
    state = fuse_experts({name: tensor.double() for name, tensor in decoder.hf_state()})
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    return model.double()


def fuse_experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Per-expert matrices of a checkpoint as the stacked ones transformers keeps in memory."""
    fused = {name: tensor for name, tensor in state.items() if ".experts." not in name}
    parts = defaultdict(dict)
    for name, tensor in state.items():
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name):
            parts[match[1]][int(match[2]), match[3]] = tensor
    for prefix, held in parts.items():
        experts = range(1 + max(expert for expert, _ in held))
        pairs = [torch.cat((held[e, "gate_proj"], held[e, "up_proj"])) for e in experts]
        fused[f"{prefix}.gate_up_proj"] = torch.stack(pairs)
        fused[f"{prefix}.down_proj"] = torch.stack([held[e, "down_proj"] for e in experts])
    return fused


def token_logprobs(model: torch.nn.Module, sample: Sample) -> tuple[Tensor, Tensor]:
    """log p and entropy of the trained tokens of one sequence, alone in its batch."""
    ids = torch.tensor([sample.token_ids])
    logp = (model(input_ids=ids).logits[0] / sample.temperature).log_softmax(-1)
    where = [i for i, trained in enumerate(sample.loss_mask) if trained]
    rows = logp[[i - 1 for i in where]]
    return rows[range(len(where)), [sample.token_ids[i] for i in where]], -(rows.exp() * rows).sum(-1)


def oracle(trainer: FsdpTrainer, samples: list[Sample], cfg: AlgorithmConfig) -> tuple[dict[str, Tensor], float]:
    """Objective and HF-named gradients with ratio 1 at this point, summed sequence by sequence."""
    model, reference = oracle_model(trainer.decoder), oracle_model(trainer.reference) if trainer.reference is not None else None
    groups = defaultdict(list)
    for sample in samples:
        groups[sample.group_id].append(sample.reward)
    num_tokens = sum(sum(sample.loss_mask) for sample in samples)
    total = 0.0
    for sample in samples:
        rewards = torch.tensor(groups[sample.group_id], dtype=torch.float64)
        advantage = sample.reward - rewards.mean()
        if cfg.advantage == "mean_std":
            advantage = advantage / (rewards.std() + cfg.advantage_eps) if len(rewards) > 1 else 0.0
        lp, entropy = token_logprobs(model, sample)
        old = lp.detach()
        loss = -(lp - old).exp() * advantage
        if cfg.mismatch_clip is not None:
            recorded = torch.tensor(
                [v for v, m in zip(sample.rollout_logprobs, sample.loss_mask, strict=True) if m], dtype=torch.float64
            )
            loss = loss * (old - recorded).exp().clamp(max=cfg.mismatch_clip)
        if reference is not None:
            with torch.no_grad():
                ref, _ = token_logprobs(reference, sample)
            loss = loss + cfg.kl_coef * ((ref - lp).exp() - (ref - lp) - 1)
        loss = loss - cfg.entropy_coef * entropy
        own = {"token": num_tokens, "sequence": len(samples) * len(loss), "constant": len(samples) * (cfg.constant_tokens or 1)}
        part = loss.sum() / own[cfg.reduction]
        part.backward()
        total += float(part.detach())
    return {name: parameter.grad for name, parameter in model.named_parameters()}, total


def distance(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Largest relative error of a tensor, relative to that tensor's own norm."""
    got = fuse_experts(got)
    assert set(got) == set(expected)
    return max(float((got[name].double() - expected[name]).norm() / expected[name].norm()) for name in got)


@pytest.fixture
def samples() -> list[Sample]:
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"seed {seed}")
    return random_samples(seed, num_groups=7, max_group=6, temperature=TEMPERATURE)


def budgets(batch: TrainBatch) -> tuple[int, int, int]:
    """One micro-batch per sequence or so, a few, and one for all."""
    return max(batch.last), max(40, *batch.last), 10**6


@pytest.mark.parametrize("name", ALGORITHMS)
def test_one_process(name: str, samples: list[Sample]) -> None:
    cfg = ALGORITHMS[name]
    batch = TrainBatch.from_groups(samples, cfg)
    for tied in (False, True):
        model = {"tie_word_embeddings": tied}
        expected, loss = oracle(build(name, model=model), samples, cfg)
        for budget in budgets(batch):
            got, metrics = step_gradients(build(name, model=model, max_tokens_per_microbatch=budget), batch)
            assert distance(got, expected) < TOLERANCE
            assert metrics["train/loss"] == pytest.approx(loss, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families(family: str, samples: list[Sample]) -> None:
    """Top-k routing may differ between float32 and float64 where two experts tie; random weights keep them apart."""
    model = {"family": family, **FAMILIES[family]}
    batch = TrainBatch.from_groups(samples, ALGORITHMS["all_terms"])
    expected, _ = oracle(build("all_terms", model=model), samples, ALGORITHMS["all_terms"])
    got, _ = step_gradients(build("all_terms", model=model, max_tokens_per_microbatch=budgets(batch)[1]), batch)
    assert distance(got, expected) < TOLERANCE


def test_a_step_has_the_same_bits_with_one_and_two_threads() -> None:
    wide = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    samples = random_samples(1, num_groups=12, max_group=16, max_prompt=12, max_completion=16)
    batch = TrainBatch.from_groups(samples, ALGORITHMS["all_terms"])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            trainer = build("all_terms", model=wide)
            trainer.step(batch)
            results.append((trainer.step(batch), [tensor.clone() for _, tensor in trainer.export_weights()]))
    finally:
        torch.set_num_threads(before)
    assert results[0][0] == results[1][0]
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))


def test_recomputing_layers_gives_the_same_bits(samples: list[Sample]) -> None:
    batch = TrainBatch.from_groups(samples, ALGORITHMS["grpo"])
    kept, _ = step_gradients(build("grpo"), batch)
    recomputed, _ = step_gradients(build("grpo", recompute=True), batch)
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_supervised(samples: list[Sample]) -> None:
    trainer = build("grpo")
    batch = TrainBatch.from_sft([SftExample(sample.token_ids, sample.loss_mask) for sample in samples])
    model = oracle_model(trainer.decoder)
    num_tokens = sum(sum(sample.loss_mask) for sample in samples)
    for sample in samples:
        labels = torch.tensor([[t if m else -100 for t, m in zip(sample.token_ids, sample.loss_mask, strict=True)]])
        ids = torch.tensor([sample.token_ids])
        (model(input_ids=ids, labels=labels).loss * sum(sample.loss_mask) / num_tokens).backward()
    got, _ = step_gradients(trainer, batch)
    assert distance(got, {name: parameter.grad for name, parameter in model.named_parameters()}) < TOLERANCE


def test_the_oracle_notices_a_wrong_denominator_and_a_wrong_temperature(samples: list[Sample]) -> None:
    """Negative controls."""
    import msgspec

    cfg = ALGORITHMS["grpo"]
    expected, _ = oracle(build("grpo"), samples, cfg)
    by_sequence = FsdpTrainer(
        random_decoder(DecoderConfig(**MODEL), 0),
        AlgorithmConfig(reduction="sequence"),
        TrainerConfig(grad_clip=0.0),
        OptimizerConfig(),
    )
    assert distance(step_gradients(by_sequence, TrainBatch.from_groups(samples, cfg))[0], expected) > 100 * TOLERANCE
    warm = [msgspec.structs.replace(sample, temperature=1.0) for sample in samples]
    assert distance(step_gradients(build("grpo"), TrainBatch.from_groups(warm, cfg))[0], expected) > 100 * TOLERANCE


# ---- several processes


def launch(directory: Path, size: int, *names: str) -> None:
    """Run `size` processes of this file over the cases `names` and wait for all of them."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__, str(directory), str(size), *names]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr


def fork_workers(directory: Path, size: int, *names: str) -> int:
    """Fork the processes from one that has imported everything and run nothing yet: importing torch is the slow part."""
    torch.set_num_threads(1)
    children = []
    for rank in range(size):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                worker(directory, size, rank, *names)
                status = 0
            finally:
                if status:
                    traceback.print_exc()
                os._exit(status)
        children.append(child)
    return max(os.waitpid(child, 0)[1] for child in children)


def worker(directory: Path, size: int, rank: int, *names: str) -> None:
    """One process. Per case and budget: a step, then its gradients, weights and metrics saved, or the refusal."""
    dist.init_process_group("gloo", f"file://{directory}/rendezvous", rank=rank, world_size=size, timeout=timedelta(seconds=120))
    for name in names:
        samples = read_samples(directory / f"{name}.jsonl")
        if name == "unequal" and rank == 1:
            samples = samples[:-1]
        batch = TrainBatch.from_groups(samples, ALGORITHMS.get(name, ALGORITHMS["grpo"]))
        for number, budget in enumerate(budgets(batch)[1:]):
            trainer = build(name if name in ALGORITHMS else "grpo", max_tokens_per_microbatch=budget)
            place = directory / f"{name}-{number}-{rank}"
            place.mkdir()
            try:
                logprob = trainer.forward_logprobs(batch)
                gradients, metrics = step_gradients(trainer, batch)
            except ValueError as error:
                (place / "refusal.txt").write_text(str(error))
                continue
            save_tensors(place / "gradients.safetensors", gradients)
            save_tensors(place / "weights.safetensors", {**dict(trainer.export_weights()), "logprob": logprob})
            (place / "metrics.json").write_text(json.dumps(metrics))
    dist.destroy_process_group()


def read(file: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    result = {name: torch.empty_like(tensor) for name, tensor in like.items()}
    load_tensors(file, result)
    return result


def check_processes(directory: Path, size: int, name: str, samples: list[Sample]) -> None:
    """Gradients of every process against the oracle, and weights, logprobs and metrics against one process."""
    cfg = ALGORITHMS[name]
    alone = build(name)
    batch = TrainBatch.from_groups(samples, cfg)
    logprob = alone.forward_logprobs(batch)
    expected, loss = oracle(alone, samples, cfg)
    _, own_metrics = step_gradients(alone, batch)
    like = dict(alone.export_weights())
    for number in range(len(budgets(batch)[1:])):
        places = [directory / f"{name}-{number}-{rank}" for rank in range(size)]
        first = read(places[0] / "weights.safetensors", {**like, "logprob": logprob})
        for place in places:
            assert distance(read(place / "gradients.safetensors", like), expected) < TOLERANCE
            weights = read(place / "weights.safetensors", {**like, "logprob": logprob})
            assert all(torch.equal(weights[key], first[key]) for key in first)  # replicas stay equal
            assert torch.equal(weights["logprob"], logprob)  # bitwise those of one process
            metrics = json.loads((place / "metrics.json").read_text())
            assert metrics["train/loss"] == pytest.approx(loss, rel=1e-5, abs=1e-7)
            for key, value in own_metrics.items():
                if "num_microbatches" not in key and "num_forward_tokens" not in key:
                    assert metrics[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key


def test_two_processes(samples: list[Sample], tmp_path: Path) -> None:
    """Same gradient together; a process without work takes part; different batches are refused on both sides."""
    one_group = random_samples(3, num_groups=1, max_group=4, temperature=TEMPERATURE)
    for name, held in {"all_terms": samples, "one_group": one_group, "unequal": samples}.items():
        write_samples(tmp_path / f"{name}.jsonl", held)
    launch(tmp_path, 2, "all_terms", "one_group", "unequal")
    check_processes(tmp_path, 2, "all_terms", samples)
    metrics = [json.loads((tmp_path / f"one_group-1-{rank}/metrics.json").read_text()) for rank in range(2)]
    assert metrics[0] == metrics[1] and "train/entropy" in metrics[0]
    for rank in range(2):
        assert "the 2 processes do not hold the same batch" in (tmp_path / f"unequal-0-{rank}/refusal.txt").read_text()


@pytest.mark.slow
def test_three_processes(samples: list[Sample], tmp_path: Path) -> None:
    write_samples(tmp_path / "grpo.jsonl", samples)
    launch(tmp_path, 3, "grpo")
    check_processes(tmp_path, 3, "grpo", samples)
    assert not list(tmp_path.glob("*/refusal.txt"))


if __name__ == "__main__":
    sys.exit(min(1, fork_workers(Path(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])))
