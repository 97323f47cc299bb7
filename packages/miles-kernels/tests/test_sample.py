"""Keyed sampling: distribution, independence, purity, and the filters against a float64 loop."""

import math

import pytest
import torch

from miles_kernels.ops.logprob import logprob_from_logits
from miles_kernels.ops.noise import keyed_block_gumbel, keyed_gumbel
from miles_kernels.ops.sample import BLOCK, sample

pytestmark = pytest.mark.usefixtures("formulation")

# keyed_gumbel(seed, sample id, position, 8 tokens): noise that changes would silently change every recorded run.
GOLDEN = {
    (0, 0, 0): [0.984112, 0.212859, -0.196493, 1.643076, 1.251493, 0.367947, -1.981799, 1.551759],
    (17, 3, 41): [2.479979, 1.152765, 0.046087, -0.611749, 1.470435, -0.739401, -0.440605, 2.222917],
    (2**63 - 1, 2**40 + 5, 131071): [-0.783365, -0.41954, 0.828636, 0.580578, -0.736037, -0.721454, 0.146339, -0.960053],
}


def column(*values):
    return torch.tensor(values, dtype=torch.int64)


def draw(logits, seed=0, first_id=0, position=0, **kw):
    """One draw per row, with consecutive sample ids."""
    rows = logits.shape[0]
    return sample(
        logits, seed=seed, sample_id=torch.arange(first_id, first_id + rows), position=torch.full((rows,), position), **kw
    )


def chi_square(observed, expected):
    """Upper tail probability of Pearson's statistic (Wilson-Hilferty), cells with expectation below 5 merged."""
    big = expected >= 5
    pairs = [(o, e) for o, e in zip(observed[big].tolist(), expected[big].tolist(), strict=True)]
    if (~big).any():
        pairs.append((observed[~big].sum().item(), max(expected[~big].sum().item(), 1e-9)))
    statistic = sum((o - e) ** 2 / e for o, e in pairs)
    k = len(pairs) - 1
    z = ((statistic / k) ** (1 / 3) - (1 - 2 / (9 * k))) / math.sqrt(2 / (9 * k))
    return 0.5 * math.erfc(z / math.sqrt(2))


def test_draws_follow_the_softmax_at_the_temperature():
    torch.manual_seed(0)
    logits = torch.randn(50) * 2
    for temperature in (0.6, 1.0, 1.7):
        token = draw(logits.expand(40_000, 50), seed=5, temperature=temperature).token
        p = torch.softmax(logits.double() / temperature, 0)
        assert chi_square(torch.bincount(token, minlength=50), p * 40_000) > 1e-4
    wrong = torch.softmax(logits.double() / 1.6, 0)
    assert chi_square(torch.bincount(token, minlength=50), wrong * 40_000) < 1e-6  # the test can tell


def test_draws_along_positions_and_seeds_follow_the_softmax():
    torch.manual_seed(1)
    logits, n = torch.randn(20), 20_000
    many, axis, zero = logits.expand(n, 20), torch.arange(n), torch.zeros(n, dtype=torch.int64)
    p = torch.softmax(logits.double(), 0)
    for seed, ids, positions in ((3, zero, axis), (axis, zero, zero), (axis, axis, axis)):
        token = sample(many, seed=seed, sample_id=ids, position=positions).token
        assert chi_square(torch.bincount(token, minlength=20), p * n) > 1e-4


@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_draws_over_many_blocks_follow_the_softmax(spread):
    """Ragged last block; blocks of very unequal mass; joint shares of (block, token of a block) against their product."""
    torch.manual_seed(9)
    vocab, n = 3 * BLOCK + 19, 60_000
    logits = torch.randn(vocab) * spread
    logits[BLOCK : 2 * BLOCK] -= 2.0
    token = torch.cat([draw(logits.expand(n // 10, vocab), seed=21, position=t).token for t in range(10)])
    p = torch.softmax(logits.double(), 0)
    assert chi_square(torch.bincount(token, minlength=vocab), p * n) > 1e-4
    block = torch.arange(vocab) // BLOCK
    share = torch.zeros(4, dtype=torch.float64).index_add_(0, block, p)
    assert chi_square(torch.bincount(token // BLOCK, minlength=4), share * n) > 1e-4
    even = torch.full((4,), 0.25, dtype=torch.float64)
    assert chi_square(torch.bincount(token // BLOCK, minlength=4), even * n) < 1e-6  # the test can tell


def test_a_draw_is_the_best_block_and_the_best_token_of_it():
    """Independent oracle: float64, one block at a time."""
    torch.manual_seed(10)
    for vocab, spread in ((BLOCK, 1.0), (1000, 0.0), (5003, 3.0)):
        logits, heat = torch.randn(40, vocab) * spread, 0.7
        token = draw(logits, seed=4, position=6, temperature=heat).token.tolist()
        ids, position = torch.arange(40), torch.full((40,), 6)
        outer = keyed_block_gumbel(4, ids, position, -(-vocab // BLOCK)).double()
        inner = keyed_gumbel(4, ids, position, vocab).double()
        parts = (logits.double() / heat).split(BLOCK, 1)
        best = (torch.stack([part.logsumexp(1) for part in parts], 1) + outer).argmax(1)
        want = [int((parts[b][r] + inner[r].split(BLOCK)[b]).argmax()) + b * BLOCK for r, b in enumerate(best.tolist())]
        assert token == want
        flat = (logits.double() / heat + inner).argmax(1).tolist()  # one noise per token draws otherwise: the control
        assert vocab <= BLOCK or token != flat


def test_blocks_have_noise_of_their_own():
    n = 20_000
    ids, zero = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    outer = torch.exp(-torch.exp(-keyed_block_gumbel(7, ids, zero, 64).double())) - 0.5
    inner = torch.exp(-torch.exp(-keyed_gumbel(7, ids, zero, 64).double())) - 0.5
    correlation = (outer.t() @ inner).abs().max() * 12 / n
    assert correlation < 6 / math.sqrt(n)
    assert (outer.t() @ outer).diagonal().min() * 12 / n > 0.9  # the test can tell
    counts = torch.histc(outer + 0.5, bins=500, min=0, max=1)
    assert chi_square(counts, torch.full((500,), outer.numel() / 500)) > 1e-4


def test_noise_is_uniform_under_its_own_distribution_function():
    g = keyed_gumbel(11, torch.arange(2000), torch.arange(2000) % 37, 500).double()
    u = torch.exp(-torch.exp(-g)).flatten()
    counts = torch.histc(u, bins=1000, min=0, max=1)
    assert chi_square(counts, torch.full((1000,), u.numel() / 1000)) > 1e-4
    assert torch.isfinite(g).all()
    for level in (6.0, 9.0):  # the large values decide, so their tail must be right too
        expected = -math.expm1(-math.exp(-level)) * g.numel()
        assert abs((g > level).sum().item() - expected) < 4.5 * math.sqrt(expected)


@pytest.mark.parametrize("axis", ["seed", "sample_id", "position", "token"])
def test_neighbours_are_independent(axis):
    n, vocab = 4000, 256
    steps, zero = torch.arange(n), torch.zeros(n, dtype=torch.int64)
    keys = {
        "seed": (steps, zero, zero),
        "sample_id": (zero, steps, zero),
        "position": (zero, zero, steps),
        "token": (zero, steps, zero),
    }
    u = torch.exp(-torch.exp(-keyed_gumbel(*keys[axis], vocab).double())) - 0.5
    if axis == "token":
        u = u.t()
    for lag in (1, 2, 3, 16, 64):
        a, b = u[:-lag], u[lag:]
        correlation = (a * b).mean() * 12
        assert abs(correlation) < 5 / math.sqrt(a.numel()), lag
    pairs = torch.histc(((u[:-1] + 0.5) * 16).floor() * 16 + ((u[1:] + 0.5) * 16).floor(), bins=256, min=0, max=255)
    assert chi_square(pairs, torch.full((256,), u[1:].numel() / 256)) > 1e-5


def test_every_bit_of_every_key_matters():
    one = torch.ones(1, dtype=torch.int64)
    base = keyed_gumbel(one, one, one, 64)
    for bit in range(63):
        for which in range(3):
            keys = [one, one, one]
            keys[which] = one ^ (1 << bit)
            assert (keyed_gumbel(*keys, 64) != base).float().mean() > 0.95, (which, bit)


def test_no_key_is_special():
    zero = torch.zeros(1, dtype=torch.int64)
    assert keyed_gumbel(0, zero, zero, 4096).max() < 16  # an unoffset hash maps all-zero keys to the largest noise there is
    ids = torch.arange(200_000)
    first = keyed_gumbel(0, ids, ids * 0 + 5, 1)[:, 0].double()
    assert abs(first.mean().item() - 0.5772) < 0.015


def test_noise_is_the_golden_noise():
    for (seed, sample_id, position), expected in GOLDEN.items():
        got = keyed_gumbel(seed, column(sample_id), column(position), 8)[0].tolist()
        assert got == pytest.approx(expected, abs=2e-6)


def test_a_row_never_depends_on_its_batch():
    torch.manual_seed(2)
    rows, vocab = 48, 1000
    logits = torch.randn(rows, vocab) * 3
    pick = torch.randint(0, 4, (rows,))
    given = {
        "seed": torch.randint(0, 2**62, (rows,)),
        "sample_id": torch.randint(0, 2**40, (rows,)),
        "position": torch.randint(0, 4096, (rows,)),
        "temperature": torch.tensor([0.0, 0.7, 1.0, 1.3])[torch.randint(0, 4, (rows,))],
        "top_k": torch.tensor([-1, 1, 20, 400])[pick],
        "top_p": torch.tensor([1.0, 0.2, 0.9, 0.999])[torch.randint(0, 4, (rows,))],
        "min_p": torch.tensor([0.0, 0.05, 0.3, 0.0])[torch.randint(0, 4, (rows,))],
    }
    whole = sample(logits, **given)
    order = torch.randperm(rows)
    for part in [*order[:8].split(1), order, order[:31], order[5:7]]:
        alone = sample(logits[part], **{name: value[part] for name, value in given.items()})
        for a, b in zip(alone, whole, strict=True):
            assert torch.equal(a, b[part])
    for row in order[:12].tolist():  # numbers and tensors are the same request
        scalars = {name: value[row].item() for name, value in given.items() if name not in ("sample_id", "position")}
        alone = sample(
            logits[row : row + 1],
            sample_id=given["sample_id"][row : row + 1],
            position=given["position"][row : row + 1],
            **scalars,
        )
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, whole, strict=True))


def test_threads_do_not_change_draws():
    torch.manual_seed(3)
    logits = torch.randn(4, 70_000)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        results.append([draw(logits), draw(logits, top_p=0.9), draw(logits, temperature=0.0)])
    torch.set_num_threads(before)
    for one, two in zip(*results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def oracle(logits, temperature, top_k, top_p, min_p):
    """Kept token ids in rank order, float64, one token at a time; None when a boundary is too close to call."""
    z = [x / temperature for x in logits]
    top = max(z)
    total = math.fsum(math.exp(x - top) for x in z)
    p = [math.exp(x - top) / total for x in z]
    ranked = sorted(range(len(z)), key=lambda i: (-logits[i], i))
    kept, before = [], 0.0
    for rank, token in enumerate(ranked):
        if top_p < 1 and abs(before - top_p) < 3e-7 or min_p > 0 and abs(p[token] / p[ranked[0]] - min_p) < 1e-6:
            return None
        if (0 < top_k <= rank) or (top_p < 1 and before >= top_p) or p[token] < min_p * p[ranked[0]]:
            break
        kept.append(token)
        before += p[token]
    mass = math.fsum(p[token] for token in kept)
    return kept, {token: math.log(p[token] / mass) for token in kept}


FILTERS = [
    (3, 1.0, 0.0),
    (-1, 0.5, 0.0),
    (-1, 1.0, 0.2),
    (40, 0.8, 0.01),
    (500, 0.97, 0.0),
    (-1, 0.02, 0.0),
    (1, 1.0, 0.0),
    (-1, 0.9999, 0.0),
]


@pytest.mark.parametrize("top_k, top_p, min_p", FILTERS)
def test_filters_match_a_float64_loop(top_k, top_p, min_p):
    torch.manual_seed(top_k + int(1000 * top_p))
    checked = 0
    for _ in range(6):
        temperature = 0.5 + torch.rand(()).item()
        logits = (torch.randn(600) * 2).mul(4).round().div(4)  # quarter steps: many ties
        want = oracle(logits.tolist(), temperature, top_k, top_p, min_p)
        if want is None:
            continue
        kept, logp = want
        out = draw(logits.expand(400, 600), temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
        assert set(out.token.tolist()) <= set(kept)
        for token, got in zip(out.token.tolist(), out.sampled_logprob.tolist(), strict=True):
            assert got == pytest.approx(logp[token], abs=2e-5)
        expected = torch.tensor([math.exp(logp[t]) for t in kept], dtype=torch.float64) * 400
        counts = torch.bincount(out.token, minlength=600)[kept]
        assert len(kept) == 1 or chi_square(counts, expected) > 1e-5
        checked += 1
    assert checked >= 3


def test_ties_are_cut_lowest_id_first():
    flat = torch.zeros(500, 1000)
    assert set(draw(flat, top_k=7).token.tolist()) == set(range(7))
    assert set(draw(flat, top_p=0.0045).token.tolist()) == set(range(5))
    assert draw(flat, temperature=0.0).token.tolist() == [0] * 500
    flat[:, 10:20] = 1.0
    flat[:, 300] = -0.0
    assert set(draw(flat, top_k=12).token.tolist()) == {*range(10, 20), 0, 1}


def test_a_large_nucleus_is_found_beyond_the_ranked_prefix():
    torch.manual_seed(4)
    logits = torch.randn(3, 20_000) * 0.1  # nearly flat: the nucleus holds thousands of tokens
    out = draw(logits, top_p=0.8)
    want = oracle(logits[0].tolist(), 1.0, -1, 0.8, 0.0)
    assert want is not None and len(want[0]) > 8192
    assert out.sampled_logprob[0].item() == pytest.approx(want[1][out.token[0].item()], abs=2e-5)


def test_unfiltered_logprob_is_the_trainers_bitwise():
    torch.manual_seed(5)
    logits = torch.randn(16, 5000)
    temperature = torch.rand(16) + 0.3
    for kw in ({}, {"top_k": 10}, {"top_p": 0.7, "min_p": 0.1}):
        out = draw(logits, temperature=temperature, **kw)
        assert torch.equal(out.logprob, logprob_from_logits(logits, out.token, temperature).logprob)
    plain = draw(logits, temperature=temperature)
    assert torch.equal(plain.sampled_logprob, plain.logprob)
    assert (draw(logits, temperature=temperature, top_k=10).sampled_logprob > plain.logprob.min()).all()


def test_filters_that_keep_everything_change_nothing():
    torch.manual_seed(6)
    logits = torch.randn(64, 300)
    plain = draw(logits)
    for kw in ({"top_k": 300}, {"top_k": 1000}, {"min_p": 1e-30}, {"top_p": 1.0}):
        out = draw(logits, **kw)
        assert all(torch.equal(a, b) for a, b in zip(out, plain, strict=True)), kw


def test_greedy_takes_the_largest_and_states_logprobs_at_temperature_one():
    torch.manual_seed(7)
    logits = torch.randn(32, 400)
    out = draw(logits, temperature=0.0, top_k=5)
    assert torch.equal(out.token, logits.argmax(1))
    assert torch.equal(out.logprob, logprob_from_logits(logits, out.token, 1.0).logprob)
    mixed = draw(logits, temperature=torch.tensor([0.0, 1.0]).repeat(16))
    assert torch.equal(mixed.token[::2], out.token[::2])
    assert torch.equal(mixed.token[1::2], draw(logits).token[1::2])


def test_a_row_that_is_no_number_fails_alone():
    torch.manual_seed(8)
    logits = torch.randn(4, 50)
    good = draw(logits.clone(), top_k=9)
    logits[1, 7] = float("nan")
    logits[2] = float("-inf")
    for kw in ({}, {"top_k": 9}, {"temperature": 0.0}):
        out = draw(logits, **kw)
        assert out.token[1:3].tolist() == [-1, -1]
        assert not torch.isfinite(out.logprob[1:3]).any()
    assert torch.equal(draw(logits, top_k=9).token[[0, 3]], good.token[[0, 3]])


def test_masked_tokens_are_never_drawn():
    logits = torch.full((200, 100), float("-inf"))
    logits[:, [4, 90]] = 0.0
    for kw in ({}, {"top_p": 0.999}, {"top_k": 50}):
        out = draw(logits, **kw)
        assert set(out.token.tolist()) == {4, 90}
        assert torch.isfinite(out.sampled_logprob).all()


def test_empty_batch_and_wrong_shapes():
    out = draw(torch.empty(0, 10))
    assert out.token.shape == out.logprob.shape == (0,)
    with pytest.raises(ValueError, match=r"sample_id, position \[B\]"):
        sample(torch.zeros(2, 5), seed=0, sample_id=column(1), position=column(1, 2))
    with pytest.raises(ValueError, match="temperature=-1"):
        draw(torch.zeros(2, 5), temperature=-1.0)
