"""The grid of processes, the cut along the length, micro-batches that keep idle processes busy."""

from __future__ import annotations

import random

import pytest
import torch

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.config.schema import RunConfig
from miles_core.trainer.batch import TrainBatch
from miles_core.trainer.config import TrainerConfig
from miles_core.trainer.context import ContextPart, deal
from miles_core.trainer.layout import UNIT_ELEMENTS, ProcessLayout, layers_per_unit, world_size_of
from miles_core.trainer.packing import microbatches, shard
from miles_core.trainer.table import bounds_of
from miles_core.trainer.testing import random_samples


def test_the_shard_axis_takes_what_the_others_leave() -> None:
    assert ProcessLayout.of(TrainerConfig(), 1) == ProcessLayout()
    layout = ProcessLayout.of(TrainerConfig(replicate=2, cp=2, ep=4), 16, num_experts=8)
    assert (layout.replicate, layout.shard, layout.cp, layout.ep, layout.num_processes) == (2, 4, 2, 4, 16)
    assert [layout.data_rank(rank) for rank in range(5)] == [0, 0, 1, 1, 2]
    assert [layout.context_rank(rank) for rank in range(5)] == [0, 1, 0, 1, 0]
    assert layout.num_data == 8


def test_small_layers_are_gathered_together_and_large_ones_alone() -> None:
    assert layers_per_unit(15_729_920, 28) == 4  # Qwen3-0.6B
    assert layers_per_unit(100_928_256, 36) == 1  # Qwen3-4B
    assert layers_per_unit(UNIT_ELEMENTS, 4) == 1
    assert layers_per_unit(1000, 9) == 4 and layers_per_unit(1000, 2) == layers_per_unit(1000, 1) == 1  # never all of them


@pytest.mark.parametrize(
    ("fields", "world", "experts", "words"),
    [
        ({"cp": 2}, 3, None, "trainer.replicate x trainer.cp = 1 x 2 = 2 does not divide the 3 process"),
        ({"cp": 4}, 2, None, "start a multiple of that many processes"),
        ({"shard": 2}, 1, None, "trainer.replicate x trainer.shard x trainer.cp = 1 x 2 x 1 = 2, but the trainer has 1 process"),
        ({"ep": 3}, 4, None, "trainer.ep = 3 does not divide the 4 processes of a replica"),
        ({"ep": 2}, 2, 0, "trainer.ep = 2, but the model has no experts"),
        ({"ep": 2}, 2, 7, "the model has 7 experts; choose a divisor"),
    ],
)
def test_what_does_not_fit_is_said_with_a_way_out(fields: dict[str, int], world: int, experts: int | None, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ProcessLayout.of(TrainerConfig(**fields), world, experts)


def test_all_misfits_come_at_once() -> None:
    with pytest.raises(ValueError, match=r"does not divide the 3 process(.|\n)*trainer.ep = 5"):
        ProcessLayout.of(TrainerConfig(cp=2, ep=5), 3)


def test_the_configuration_is_checked_against_the_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    model = {"path": "recipe:quickstart"}
    assert RunConfig(model=model, trainer={"cp": 2}, cluster={"num_trainers": 4}).num_trainers == 4
    with pytest.raises(ValueError, match="does not divide the 1 process"):
        RunConfig(model=model, trainer={"cp": 2})
    monkeypatch.setenv("WORLD_SIZE", "2")
    launched = RunConfig(model=model, trainer={"cp": 2})
    assert launched.num_trainers == 2
    with pytest.raises(ValueError, match="WORLD_SIZE = 2 .* start it once, without a launcher, with --cluster.num_trainers 2"):
        launched.require_one_driver()
    apart = RunConfig(model=model, cluster={"num_engines": 1})
    assert apart.num_trainers == 1
    apart.require_one_driver()
    with pytest.raises(ValueError, match="WORLD_SIZE = 'two'"):
        world_size_of({"WORLD_SIZE": "two"})


def test_a_layout_in_words() -> None:
    assert ProcessLayout().words() == "1 process holds the whole model"
    words = ProcessLayout(replicate=2, shard=2, cp=2, ep=4).words()
    assert words == (
        "8 processes: 2 replicas of the model, each cut over 4, sequences dealt to 4, each cut along its length over 2 "
        "(context parallel), experts spread over 4 (expert parallel)"
    )
    assert "each with the whole model" in ProcessLayout(replicate=2).words()


def test_rows_are_dealt_as_torch_does() -> None:
    for rows in (1, 5, 8, 50, 151936):
        for ranks in (1, 2, 3, 8):
            sizes = [chunk.numel() for chunk in torch.arange(rows).chunk(ranks)]
            bounds = bounds_of(rows, ranks)
            assert [b - a for a, b in zip(bounds, bounds[1:], strict=False) if b > a] == sizes


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_every_token_has_one_owner_and_the_load_is_even(ranks: int) -> None:
    rng = random.Random()
    lengths = [rng.choice([1, 2, 3, 17, 400, 1001]) for _ in range(rng.randint(1, 12))]
    dealt = deal(lengths, ranks)
    owned = sorted((run.segment, token) for runs in dealt for run in runs for token in range(run.start, run.stop))
    assert owned == [(segment, token) for segment, length in enumerate(lengths) for token in range(length)]
    pairs = [sum(sum(range(run.start + 1, run.stop + 1)) for run in runs) for runs in dealt]  # query-key pairs each computes
    if max(lengths) > 100:
        assert max(pairs) - min(pairs) < 0.1 * sum(pairs)


def test_a_contiguous_cut_would_be_uneven() -> None:
    """The control of the test above: halves of one sequence differ threefold, the zig-zag does not."""
    halves = [sum(range(1, 501)), sum(range(501, 1001))]
    assert halves[1] > 2.9 * halves[0]
    pairs = [sum(sum(range(run.start + 1, run.stop + 1)) for run in runs) for runs in deal([1000], 2)]
    assert abs(pairs[0] - pairs[1]) < 0.01 * sum(pairs)


def test_the_parts_of_a_stream_fit_together() -> None:
    """What the ranks gather, in the places they say, is the stream and its trained tokens; also when a rank has nothing."""
    for lengths, parents, ranks in (([9, 5, 30], [-1, 0, 0], 2), ([1], [-1], 3), ([40, 1], [-1, -1], 4)):
        total = sum(lengths)
        source = torch.arange(0, total, 2)
        parts = [ContextPart.of(lengths, parents, source, rank, ranks) for rank in range(ranks)]
        rows = torch.full((ranks, parts[0].most_rows), -1)
        tokens = torch.full((ranks, parts[0].most_tokens), -1)
        for rank, part in enumerate(parts):
            rows[rank, : len(part.rows)] = part.rows
            tokens[rank, : len(part.source)] = part.rows[part.source]
            assert part.plan(lengths, parents).num_tokens == len(part.rows)
        assert torch.equal(rows.flatten()[parts[0].place], torch.arange(total))
        assert torch.equal(tokens.flatten()[parts[0].token_place], source)
        assert sorted(int(i) for part in parts for i in part.own) == list(range(len(source)))


def test_the_pool_of_cuda_counts_every_copy_of_a_key_once_in_the_gradient() -> None:
    lengths, ranks = [23, 4, 40], 2
    for rank in range(ranks):
        part = ContextPart.of(lengths, [-1, -1, -1], torch.arange(sum(lengths)), rank, ranks).to(torch.device("cpu"))
        assert part.pool is not None and part.home is not None
        grad = torch.rand(len(part.pool) + 1, dtype=torch.float64)
        grad[-1] = 0.0
        summed = grad[part.home[0]] + grad[part.home[1]]
        expected = torch.zeros(len(summed), dtype=torch.float64).index_add_(0, part.pool, grad[:-1])
        assert torch.allclose(summed, expected) and float(summed.sum()) == pytest.approx(float(grad.sum()))


def test_a_process_out_of_work_gets_idle_rounds() -> None:
    batch = TrainBatch.from_groups(random_samples(3, num_groups=5), AlgorithmConfig())
    weight_S = batch.loss_weights(range(len(batch.blocks)), "token")
    budget = max(batch.last) + 8
    counts = []
    for rank in range(2):
        mine = shard(batch, range(len(batch.blocks)), rank, 2)
        found = list(microbatches(batch, mine, budget, weight_S, rounds=lambda count: count + 2))
        assert [micro.idle for micro in found][-3:] == [False, True, True]
        assert all(micro.num_tokens == 1 and micro.targets.numel() == 0 for micro in found[-2:])
        counts.append(sum(micro.targets.numel() for micro in found))
    assert sum(counts) == batch.num_tokens
