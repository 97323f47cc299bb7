"""Attention against a per-query float64 loop, and bitwise across every way of scheduling the same sequences."""

from __future__ import annotations

import random

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from miles_kernels.ops.attention import AttentionPlan, Segment, attention, decode_plan, packed_plan, plan_attention, table_plan
from miles_kernels.testing import across_threads, assert_bitwise_equal, threads

pytestmark = pytest.mark.usefixtures("formulation")

SHAPES = [(4, 2, 32), (14, 2, 16), (3, 1, 64), (8, 8, 8), (16, 1, 128)]
DTYPES = [torch.float32, torch.bfloat16]


def naive(q: Tensor, k: Tensor, v: Tensor, segments: list[Segment], scale: float, window: int | None = None) -> Tensor:
    """One query at a time in the dtype of q; keys repeated per head."""
    group, rows = q.shape[1] // k.shape[0], {}
    for segment in segments:
        slots = torch.as_tensor(segment.kv_slots)
        for i in range(segment.q_len):
            last = segment.first_position + i
            seen = slots[max(0, last + 1 - window) if window else 0 : last + 1]
            keys, values = k[:, seen].repeat_interleave(group, 0), v[:, seen].repeat_interleave(group, 0)
            weights = torch.softmax((keys @ q[segment.q_start + i][:, :, None]).squeeze(2) * scale, -1)
            rows[segment.q_start + i] = (weights[:, None] @ values).squeeze(1)
    return torch.stack([rows[i] for i in range(q.shape[0])])


def family_tree(lengths: list[int], parents: list[int]) -> list[Segment]:
    """The segments that `packed_plan(lengths, parents)` means."""
    segments: list[Segment] = []
    start = 0
    for length, parent in zip(lengths, parents, strict=True):
        prefix = list(segments[parent].kv_slots) if parent >= 0 else []
        segments.append(Segment(start, length, len(prefix), prefix + list(range(start, start + length))))
        start += length
    return segments


def draw(tokens: int, heads: int, kv_heads: int, dim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(tokens, h, dim).to(dtype) for h in (heads, kv_heads, kv_heads))


@pytest.mark.parametrize("window", [None, 1, 7, 150])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), SHAPES)
def test_forward_and_gradients_against_float64(heads: int, kv_heads: int, dim: int, window: int | None, seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.choice([1, 2, 5, 20, 140]) for _ in range(6)]
    parents = [rng.randint(-1, i - 1) for i in range(6)]
    plan, positions = packed_plan(lengths, parents)
    segments = family_tree(lengths, parents)
    expected_positions = [s.first_position + i for s in segments for i in range(s.q_len)]
    assert positions.tolist() == expected_positions
    inputs = [x.requires_grad_() for x in draw(sum(lengths), heads, kv_heads, dim)]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    out = attention(inputs[0], inputs[1].transpose(0, 1), inputs[2].transpose(0, 1), plan, scale=dim**-0.5, window=window)
    oracle = naive(wide[0], wide[1].transpose(0, 1), wide[2].transpose(0, 1), segments, dim**-0.5, window)
    grad = torch.randn_like(out)
    ours, theirs = torch.autograd.grad(out, inputs, grad), torch.autograd.grad(oracle, wide, grad.double())
    for name, a, b in zip(("out", "dq", "dk", "dv"), (out, *ours), (oracle, *theirs), strict=True):
        assert (a - b).abs().max() <= 3e-6 * max(1.0, b.abs().max()), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_mode_against_float64(dtype: torch.dtype) -> None:
    lengths = [150, 3, 40]
    q, k, v = draw(193, 4, 2, 32, dtype)
    k, v = k.transpose(0, 1), v.transpose(0, 1)
    out = attention(q, k, v, packed_plan(lengths)[0], scale=0.2, mode="exact")
    oracle = naive(q.double(), k.double(), v.double(), family_tree(lengths, [-1] * 3), 0.2)
    assert (out - oracle).abs().max() <= (5e-5 if dtype is torch.float32 else 2.0**-7)


class World:
    """Sequences whose keys lie scattered in one pool; any scheduling of their queries must give the same bits."""

    def __init__(
        self,
        rng: random.Random,
        lengths: list[int],
        heads: int,
        kv_heads: int,
        dim: int,
        dtype: torch.dtype,
        window: int | None,
        mode: str,
    ) -> None:
        self.rng, self.lengths, self.window, self.scale, self.mode = rng, lengths, window, dim**-0.5, mode
        slots = list(range(sum(lengths) + 50))
        rng.shuffle(slots)
        self.slots: list[list[int]] = []
        for length in lengths:
            self.slots.append(slots[:length])
            slots = slots[length:]
        self.q = [torch.randn(length, heads, dim).to(dtype) for length in lengths]
        self.k, self.v = (torch.randn(kv_heads, sum(lengths) + 50, dim).to(dtype) for _ in range(2))
        spans = [(i, 0, length) for i, length in enumerate(lengths)]
        self.reference = dict(zip(range(len(lengths)), self.run(spans), strict=True))

    def attend(self, q: Tensor, plan: AttentionPlan) -> Tensor:
        return attention(q, self.k, self.v, plan, scale=self.scale, window=self.window, mode=self.mode)

    def run(self, spans: list[tuple[int, int, int]]) -> list[Tensor]:
        """Attention of the queries (sequence, first, stop) of one step, with a plan made from lists or from a table."""
        q = torch.cat([self.q[i][first:stop] for i, first, stop in spans])
        lens = [stop - first for _, first, stop in spans]
        if self.rng.random() < 0.5:
            table = torch.full((len(spans), max(self.lengths)), self.slots[0][0])
            for row, (i, _, stop) in enumerate(spans):
                table[row, :stop] = torch.tensor(self.slots[i][:stop])
            plan = table_plan(table, lens, [first for _, first, _ in spans])
        else:
            starts = [sum(lens[:j]) for j in range(len(lens))]
            segments = [Segment(starts[j], lens[j], first, self.slots[i][:stop]) for j, (i, first, stop) in enumerate(spans)]
            self.rng.shuffle(segments)
            plan = plan_attention(segments, num_tokens=sum(lens))
        return list(self.attend(q, plan).split(lens))

    def check(self, spans: list[tuple[int, int, int]]) -> None:
        for (i, first, stop), out in zip(spans, self.run(spans), strict=True):
            assert_bitwise_equal(
                out, self.reference[i][first:stop], f"sequence {i} queries {first}..{stop} of {len(spans)} spans"
            )


@pytest.mark.parametrize("mode", ["native", "exact"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "window"), [(4, 2, 32, None), (14, 2, 64, None), (8, 8, 16, 40)])
def test_bits_do_not_depend_on_scheduling(
    heads: int, kv_heads: int, dim: int, window: int | None, dtype: torch.dtype, mode: str, seed: int
) -> None:
    rng = random.Random(seed)
    world = World(rng, [rng.randint(1, 300) for _ in range(7)] + [128, 129, 272], heads, kv_heads, dim, dtype, window, mode)
    count = len(world.lengths)
    for _ in range(3):
        spans = []
        for i in rng.sample(range(count), rng.randint(1, count)):
            first = rng.randrange(world.lengths[i])
            spans.append((i, first, rng.randint(first + 1, world.lengths[i])))
        world.check(spans)
        world.check([(i, (p := rng.randrange(world.lengths[i])), p + 1) for i in rng.sample(range(count), rng.randint(1, count))])
    world.check([(i, world.lengths[i] - 1, world.lengths[i]) for i in range(count)])
    chunk, i = rng.choice([1, 3, 16, 17, 64]), rng.randrange(count)
    for first in range(0, min(world.lengths[i], 12 * chunk), chunk):
        world.check([(i, first, min(first + chunk, world.lengths[i]))])
    with threads(2):
        world.check(spans)


@pytest.mark.parametrize("size", [1, 2, 5, 16, 33, 64])
def test_decode_batches_of_any_size(size: int) -> None:
    q, k, v = torch.randn(size, 4, 32), torch.randn(2, 999, 32), torch.randn(2, 999, 32)
    table, lens = torch.randint(0, 999, (size, 200)), torch.randint(1, 200, (size,))
    out = attention(q, k, v, decode_plan(table, lens), scale=0.2)
    order = torch.randperm(size)
    assert_bitwise_equal(attention(q[order], k, v, decode_plan(table[order], lens[order]), scale=0.2), out[order], "order")
    for i in range(0, size, 7):
        alone = attention(q[i : i + 1], k, v, decode_plan(table[i : i + 1], lens[i : i + 1]), scale=0.2)
        assert_bitwise_equal(alone, out[i : i + 1], f"row {i} of {size}")


def test_shared_prefix_equals_separate_sequences() -> None:
    prompt, completions = 37, [5, 1, 64, 130]
    q, k, v = draw(prompt + sum(completions), 4, 2, 32)
    plan, _ = packed_plan([prompt, *completions], [-1, 0, 0, 0, 0])
    shared = attention(q, k.transpose(0, 1), v.transpose(0, 1), plan, scale=0.2)
    start = prompt
    for length in completions:
        rows = torch.cat((torch.arange(prompt), torch.arange(start, start + length)))
        alone = attention(q[rows], k[rows].transpose(0, 1), v[rows].transpose(0, 1), packed_plan([len(rows)])[0], scale=0.2)
        assert_bitwise_equal(alone, shared[rows], f"completion of {length}")
        start += length


def test_torch_attention_fails_the_decode_comparison() -> None:
    """Negative control: torch's own attention rounds a decoded query unlike the same query in a prefill."""
    q, k, v = (torch.randn(1, 4, 300, 32) for _ in range(3))
    full = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    unequal = sum(
        int(
            (
                F.scaled_dot_product_attention(q[:, :, p : p + 1], k[:, :, : p + 1], v[:, :, : p + 1]) != full[:, :, p : p + 1]
            ).sum()
        )
        for p in range(0, 300, 13)
    )
    assert unequal > 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_backward_repeats_itself_on_one_and_two_threads(dtype: torch.dtype) -> None:
    lengths, parents = [30, 11, 12, 300, 1, 13], [-1, 0, 0, -1, 0, 3]
    plan, _ = packed_plan(lengths, parents)
    q, k, v = draw(sum(lengths), 4, 2, 32, dtype)
    grad = torch.randn(q.shape).to(dtype)

    def gradients() -> Tensor:
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention(leaves[0], leaves[1].transpose(0, 1), leaves[2].transpose(0, 1), plan, scale=0.2)
        return torch.cat([g.flatten() for g in torch.autograd.grad(out, leaves, grad)])

    assert across_threads(gradients, (1, 2, 1, 2), "attention gradients").isfinite().all()


def test_neighbours_do_not_leak() -> None:
    """Another sequence's NaN keys and queries stay with it."""
    lengths = [20, 33]
    q, k, v = draw(53, 4, 2, 32)
    plan, _ = packed_plan(lengths)
    clean = attention(q, k.transpose(0, 1), v.transpose(0, 1), plan, scale=0.2)
    for x in (q, k, v):
        x[:20] = torch.nan
    dirty = attention(q, k.transpose(0, 1), v.transpose(0, 1), plan, scale=0.2)
    assert dirty[:20].isnan().all()
    assert_bitwise_equal(dirty[20:], clean[20:])


def test_plans_split_uneven_buckets() -> None:
    table = torch.zeros(33, 4096, dtype=torch.long)
    assert len(decode_plan(table, torch.tensor([50] * 32 + [60])).buckets) == 1
    assert len(decode_plan(table, torch.tensor([50] * 32 + [4000])).buckets) == 2
    assert [b.q_index.shape[0] for b in decode_plan(table, torch.full((33,), 4096)).buckets] == [16, 16, 1]
    mixed = table_plan(table, [1] * 32 + [500], [40] * 32 + [0])
    assert sorted(tuple(b.q_index.shape) for b in mixed.buckets) == [(1, 500), (32, 1)]
    assert all(b.kv_index.shape[1] % 16 == 0 for b in mixed.buckets)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([Segment(0, 2, 0, [0])], "1 kv_slots for 2 queries"),
        ([Segment(0, 2, 0, [0, 1]), Segment(3, 1, 0, [2])], "at token 2 comes start 3"),
        ([Segment(0, 2, 0, [0, 1]), Segment(1, 1, 0, [2])], "at token 2 comes start 1"),
    ],
)
def test_plan_errors(segments: list[Segment], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_attention(segments)


def test_attention_errors() -> None:
    with pytest.raises(ValueError, match="earlier sequence"):
        packed_plan([1, 1], [1, -1])
    with pytest.raises(ValueError, match="expected 3"):
        plan_attention([Segment(0, 2, 0, [0, 1])], num_tokens=3)
    q, k, v = draw(5, 4, 2, 32)
    plan, _ = packed_plan([5])
    with pytest.raises(ValueError, match="multiple of Hkv"):
        attention(q[:, :3], k.transpose(0, 1), v.transpose(0, 1), plan, scale=1.0)
    with pytest.raises(ValueError, match="window"):
        attention(q, k.transpose(0, 1), v.transpose(0, 1), plan, scale=1.0, window=0)
    with pytest.raises(ValueError, match="a sequence has -2 tokens"):
        packed_plan([3, -2])


def test_slots_and_lengths_that_no_pool_has_are_refused() -> None:
    q, k, v = draw(5, 4, 2, 32)
    pools = k.transpose(0, 1), v.transpose(0, 1)
    for slot in (5, 99, -1):
        plan = decode_plan(torch.tensor([[0, slot]]), torch.tensor([2]))
        with pytest.raises(ValueError, match=f"names slot {slot} of a pool of 5 slots"):
            attention(q[:1], *pools, plan, scale=1.0)
    plan, _ = packed_plan([0, 5, 0])  # sequences of nothing name no slot
    expected = attention(q, *pools, packed_plan([5])[0], scale=1.0)
    assert torch.equal(attention(q, *pools, plan, scale=1.0), expected)
    for alone in (False, True):  # nor does one of nothing behind a prefix
        plan, _ = packed_plan([5, 0], [-1, 0], alone=alone)
        asked = q.clone().requires_grad_()
        found = attention(asked, *pools, plan, scale=1.0)
        found.sum().backward()
        assert torch.equal(found, expected) and asked.grad is not None
    for plan in (packed_plan([0])[0], decode_plan(torch.zeros(0, 4, dtype=torch.long), torch.zeros(0, dtype=torch.long))):
        assert attention(q[:0], *pools, plan, scale=1.0).shape == (0, 4, 32)
    for length in (0, 4):
        with pytest.raises(ValueError, match=f"kv_len holds {length}; lengths lie in 1 .. 3"):
            decode_plan(torch.zeros(2, 3, dtype=torch.long), torch.tensor([2, length]))
