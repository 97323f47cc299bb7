"""The pieces of a step that drafts on the device, against plain loops. On a GPU, or with TRITON_INTERPRET=1 without one."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.gpu
PAGE, ROWS, PAGES = 16, 9, 6
DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


@pytest.fixture(autouse=True)
def _triton():
    pytest.importorskip("triton")


def lanes_of(rng: random.Random, size: int, entries: int, where: list[int]) -> torch.Tensor:
    """Rows of all kinds: nobody's, at their limit, near it, with and without a token and position of their own."""
    lanes = torch.zeros((7, size), dtype=torch.int64)
    for lane, row in enumerate(rng.sample(range(ROWS), size)):
        if rng.random() < 0.2:
            lanes[0, lane] = ROWS
            continue
        unsure = rng.random() < 0.5
        position = where[row] if unsure else rng.randint(1, 60)
        heat = int(np.float32(rng.choice([0, 0.7, 1])).view(np.int32))
        token = -1 if unsure or rng.random() < 0.5 else 7
        limit = position + rng.choice([-1, 0, 1, 2, 3, 30])
        given = (row, token, -1 if unsure else position, limit, rng.randrange(2**40), rng.randrange(2**50), heat)
        lanes[:, lane] = torch.tensor(given)
    return lanes


@pytest.mark.parametrize("seed", range(12))
def test_rows_are_where_plain_loops_put_them(seed: int):
    from miles_kernels.cuda.draft import accept_drafts, begin_drafts, verify_drafts

    rng = random.Random(seed + torch.initial_seed())
    drafts = rng.randint(1, 6)
    entries, size = rng.randint(drafts + 1, 8), rng.choice([3, 8])
    pages = torch.zeros((ROWS + 1, PAGES), dtype=torch.int32)
    pages[:ROWS] = (torch.randperm(ROWS * PAGES) + 1).view(ROWS, PAGES)
    tokens, last = torch.randint(0, 100, ((ROWS * PAGES + 1) * PAGE,)), torch.randint(0, 100, (ROWS + 1,))
    where = torch.randint(1, 60, (ROWS + 1,))
    lanes = lanes_of(rng, size, entries, where.tolist())
    on = [part.clone().to(DEVICE) for part in (lanes, last, where, pages, tokens)]
    inputs = begin_drafts(*on, drafts=drafts, entries=entries, page_size=PAGE, max_kv=PAGES * PAGE)
    drafted = torch.randint(0, 3, (drafts, size))
    each, heat = verify_drafts(inputs, on[0], on[3], drafted.to(DEVICE), PAGE)
    packed = torch.randint(-1, 3, (2, size * (drafts + 1)), dtype=torch.int32)
    out = accept_drafts(inputs, drafted.to(DEVICE), packed.to(DEVICE), on[1], on[2]).cpu()
    state, table, made, places, keys = (inputs[i].cpu() for i in (0, 2, 3, 4, 5))
    each, made = each.cpu().view(6, size, drafts + 1), made.view(3, size, entries)
    drawn, bits = packed.view(2, size, drafts + 1)
    assert torch.equal(heat.cpu().view(size, -1)[:, 0], lanes[6].to(torch.int32).view(torch.float32))
    for lane in range(size):
        row, token, position, limit, seed_of, sample_id, _ = lanes[:, lane].tolist()
        token, position = int(last[row]) if token < 0 else token, int(where[row]) if position < 0 else position
        count = min(drafts, limit - position - 1)
        if position >= limit:
            row, token, position, count = ROWS, 0, entries, drafts

        def slot(place: int, row: int = row) -> int:
            return int(pages[row, place // PAGE]) * PAGE + place % PAGE

        assert state[:, lane].tolist() == [row, position, token, count] and torch.equal(table[lane], pages[row])
        index = list(range(position - entries, position))  # below 0: nobody's, in the null page
        after = [*(int(tokens[slot(i + 1)]) if i >= 0 else 0 for i in index[:-1]), token]
        assert made[:, lane].tolist() == [after, [max(i, 0) for i in index], [slot(i) if i >= 0 else 0 for i in index]]
        for k in range(drafts):
            assert k == 0 or int(places[0, k, lane]) == position + k - 1
            assert k == 0 or int(places[1, k, lane]) == (slot(position + k - 1) if k < count else 0)
            assert int(places[2, k, lane]) == position + k + 1
        behind = [position + min(k, max(count - 1, 0)) for k in range(drafts)]  # a pass nobody needs reads what the last one did
        assert keys[:, lane].tolist() == [*behind, position + 1 + count]
        # the captured bound covers what a row may touch, and no more: a page behind it is another row's, or nobody's
        assert int(keys[:, lane].max()) <= (entries + drafts + 1 if row == ROWS else min(position + drafts + 1, limit))
        for j in range(drafts + 1):
            place = j - (drafts - count)
            at = position + place  # below 0 for a limit that no step on the device is given
            value = 0 if place < 0 else token if place == 0 else int(drafted[place - 1, lane])
            assert each[:, lane, j].tolist() == [value, at, 0 if place < 0 else slot(at), at + 1, seed_of, sample_id]
        mine = drawn[lane, drafts - count :].tolist()
        accepted = next((i for i in range(count) if mine[i] != int(drafted[i, lane])), count)
        assert out[:3, lane].tolist() == [0 if row == ROWS else accepted + 1, count, position]
        assert out[3 : 4 + count, lane].tolist() == mine
        assert torch.equal(out[4 + drafts : 5 + drafts + count, lane], bits[lane, drafts - count :])
        if row != ROWS:
            assert int(on[1][row]) == max(mine[accepted], 0) and int(on[2][row]) == position + accepted + 1


@pytest.mark.parametrize(("width", "count"), [(512, 9), (96, 7), (64, 70), (2048, 3)])
def test_halves_are_those_of_the_norm_bit_for_bit(width: int, count: int):
    from miles_kernels.cuda.draft import join
    from miles_kernels.cuda.norm import rms_norm

    dtype = torch.float32 if DEVICE == "cpu" else torch.bfloat16
    embed, state = (torch.randn(n, 2 * width, device=DEVICE).to(dtype)[:, :width] for n in (50, count))
    embed, weights = embed.contiguous(), [torch.randn(width, device=DEVICE).to(dtype) for _ in range(2)]
    ids = torch.randint(-1, 50, (count,), device=DEVICE)
    want = [rms_norm(embed[ids.clamp(min=0)], weights[0], 1e-6), rms_norm(state.contiguous(), weights[1], 1e-6)]
    assert torch.equal(join(ids, embed, state, *weights, 1e-6), torch.cat(want, 1))
    assert not torch.equal(join(ids, embed, state, *reversed(weights), 1e-6), torch.cat(want, 1))
