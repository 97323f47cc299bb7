"""Draft targets equal those of a loop over unpacked sequences, however they are packed, padded and cut."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from miles_spec.targets import IGNORE, DraftTargets, context_slots, draft_targets

Row = tuple[int, int]


def oracle(tokens: Sequence[int], mask: Sequence[bool], depth: int, between: str) -> list[Row]:
    """(input, label) of every slot of one sequence at one depth, straight from the definition."""
    rows = []
    for i in range(len(tokens)):
        read, label = i + depth, i + depth + 1
        good = label < len(tokens) and mask[label]
        first = {"sampled": i + 1, "drafted": i + 2, "any": label}[between]
        for j in range(first, read + 1):
            good = good and j < len(tokens) and mask[j]
        rows.append((tokens[read] if read < len(tokens) else 0, tokens[label] if good else IGNORE))
    return rows


def random_sequence(rng: random.Random, length: int) -> tuple[list[int], list[bool]]:
    """Prompt, completion and now and then a tool's answer in between; sometimes nothing supervised at all."""
    prompt = rng.randint(0, length)
    mask = [i >= prompt and rng.random() < 0.8 for i in range(length)]
    return [rng.randrange(1, 50) for _ in range(length)], mask if rng.random() < 0.8 else [False] * length


def pack(sequences: list[tuple[list[int], list[bool]]], padded: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """The stream. Padding holds supervised tokens of its own, which must never be read."""
    tokens, mask = [], []
    for (own, own_mask), room in zip(sequences, padded, strict=True):
        tokens += own + [49] * (room - len(own))
        mask += own_mask + [True] * (room - len(own))
    return torch.tensor(tokens, dtype=torch.int64), torch.tensor(mask, dtype=torch.bool)


def expected(sequences: list[tuple[list[int], list[bool]]], padded: list[int], depths: int, between: str) -> list[list[Row]]:
    rows = []
    for depth in range(1, depths + 1):
        stream: list[Row] = []
        for (own, mask), room in zip(sequences, padded, strict=True):
            stream += oracle(own, mask, depth, between) + [(0, IGNORE)] * (room - len(own))
        rows.append(stream)
    return rows


def as_rows(targets: DraftTargets) -> list[list[Row]]:
    pairs = zip(targets.input_ids.tolist(), targets.labels.tolist(), strict=True)
    return [list(zip(inputs, labels, strict=True)) for inputs, labels in pairs]


def cut_and_join(targets: DraftTargets, padded: list[int], ranks: int, layout: str) -> list[list[Row]]:
    slots = [context_slots(padded, rank, ranks, layout) for rank in range(ranks)]  # type: ignore[arg-type]
    every = torch.cat(slots)
    assert sorted(every.tolist()) == list(range(sum(padded))), "every slot belongs to exactly one process"
    shards = [targets.take(own) for own in slots]
    assert all(shard.num_supervised == targets.num_supervised for shard in shards)
    joined = [as_rows(shard) for shard in shards]
    back = torch.argsort(every).tolist()
    streams = [[row for shard in joined for row in shard[k]] for k in range(len(joined[0]))]
    return [[stream[i] for i in back] for stream in streams]


LENGTHS = [[1], [2], [3], [7], [16], [1, 1, 1], [2, 5, 3], [17, 1, 9, 4], [8, 8], [31, 2], [0, 5, 0, 3], [3, 64], [0]]


@pytest.mark.parametrize("between", ["drafted", "sampled", "any"])
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_packed_padded_and_cut_equals_one_sequence_at_a_time(lengths: list[int], between: str) -> None:
    rng = random.Random(random.getrandbits(30))
    for _ in range(4):
        sequences = [random_sequence(rng, length) for length in lengths]
        for padded in (lengths, [-(-length // 8) * 8 for length in lengths]):
            tokens, mask = pack(sequences, padded)
            targets = draft_targets(tokens, mask, lengths, 4, padded_lengths=padded, between=between)  # type: ignore[arg-type]
            truth = expected(sequences, padded, 4, between)
            assert as_rows(targets) == truth
            assert targets.num_supervised == tuple(sum(label != IGNORE for _, label in rows) for rows in truth)
            for ranks in (1, 2, 4):
                for layout in ("dealt", "zigzag", "contiguous"):
                    assert cut_and_join(targets, padded, ranks, layout) == truth


def test_end_of_sequence_is_supervised_and_the_last_prompt_token_is_not() -> None:
    prompt, completion, eos = [1, 2, 3, 4, 5], [6, 7, 8], 9
    tokens = torch.tensor([*prompt, *completion, eos])
    mask = torch.tensor([False] * 5 + [True] * 4)
    targets = draft_targets(tokens, mask, [9], 3)
    labels = [[label for label in row if label != IGNORE] for row in targets.labels.tolist()]
    assert labels == [[6, 7, 8, 9], [7, 8, 9], [8, 9]]
    assert 5 not in targets.labels and targets.labels[0, 3] == 6, "the first sampled token is supervised"
    early = draft_targets(tokens, torch.roll(mask, -1), [9], 1)  # a mask that was shifted once too often
    assert eos not in early.labels and 5 in early.labels


def test_tool_tokens_are_read_but_never_predicted_nor_drafted_across() -> None:
    tokens = torch.tensor([1, 2, 10, 11, 50, 51, 20, 21])  # prompt 1 2, sampled 10 11, a tool's 50 51, sampled 20 21
    mask = torch.tensor([False, False, True, True, False, False, True, True])
    by = {between: draft_targets(tokens, mask, [8], 2, between=between) for between in ("drafted", "sampled", "any")}  # type: ignore[arg-type]
    none = IGNORE
    assert by["drafted"].labels.tolist() == [
        [10, 11, none, none, 20, 21, none, none],
        [11, none, none, none, 21, none, none, none],
    ]
    assert by["sampled"].labels.tolist() == [
        [none, 11, none, none, none, 21, none, none],
        [none] * 8,
    ]
    assert by["any"].labels.tolist() == [
        [10, 11, none, none, 20, 21, none, none],
        [11, none, none, 20, 21, none, none, none],
    ]
    assert 50 in by["drafted"].input_ids and 50 not in by["any"].labels


def test_the_teacher_is_the_slot_that_predicts_the_same_token() -> None:
    rng = random.Random(random.getrandbits(30))
    lengths = [9, 4, 12]
    tokens, mask = pack([random_sequence(rng, length) for length in lengths], lengths)
    targets = draft_targets(tokens, mask, lengths, 3)
    for depth in range(3):
        for slot in range(25):
            teacher = int(targets.teacher[depth, slot])
            assert (teacher < 0) == (targets.labels[depth, slot] == IGNORE)
            assert teacher < 0 or (teacher == slot + depth + 1 and tokens[teacher + 1] == targets.labels[depth, slot])


def test_the_cut_is_that_of_the_trainer() -> None:
    owned = [context_slots([9, 3, 5, 2], rank, 2).tolist() for rank in range(2)]
    assert owned == [[0, 1, 6, 7, 8, 12, 15, 16, 17, 18], [2, 3, 4, 5, 9, 10, 11, 13, 14]]


def test_a_cut_before_the_shift_is_seen() -> None:
    tokens, mask = torch.arange(1, 17), torch.ones(16, dtype=torch.bool)
    whole = draft_targets(tokens, mask, [16], 1)
    slots = context_slots([16], 0, 2)
    late = draft_targets(tokens[slots], mask[slots], [8], 1)
    assert not torch.equal(late.labels, whole.take(slots).labels)


def test_wrong_input_is_refused() -> None:
    tokens, mask = torch.arange(4), torch.ones(4, dtype=torch.bool)
    with pytest.raises(ValueError, match="num_depths"):
        draft_targets(tokens, mask, [4], 0)
    with pytest.raises(ValueError, match="between='all'"):
        draft_targets(tokens, mask, [4], 1, between="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must be \\[T\\]"):
        draft_targets(tokens, mask[:3], [4], 1)
    with pytest.raises(ValueError, match="take 5 slots, but the stream has 4"):
        draft_targets(tokens, mask, [2, 3], 1)
    with pytest.raises(ValueError, match=r"sequence 1: length 3 must lie in 0\.\.2"):
        draft_targets(tokens, mask, [1, 3], 1, padded_lengths=[2, 2])
    with pytest.raises(ValueError, match="1 lengths but 2 padded_lengths"):
        draft_targets(tokens, mask, [4], 1, padded_lengths=[2, 2])
    with pytest.raises(ValueError, match="rank 2 is not one of 2"):
        context_slots([4], 2, 2)
    with pytest.raises(ValueError, match="layout='ring'"):
        context_slots([4], 0, 2, "ring")  # type: ignore[arg-type]
