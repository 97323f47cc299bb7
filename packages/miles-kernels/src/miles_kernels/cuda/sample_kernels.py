"""Keyed Gumbel sampling in one pass over the logits: the token, and the statistics its log-probability is made of.

Legend: B = rows, V = vocabulary. The noise is that of `miles_kernels.ops.sample`: the same hash of (seed, sample id, position,
token id), so both draw the same token unless the two best scores agree to the last bits of a float32 logarithm.

Computing two logarithms per token would cost more than reading the logits. The noise -log(-log1p(-v)) never exceeds -log(v), so
a token can beat a known score S only if v <= exp(z / T - S), one product and one comparison; only those few are computed in full.
The log-probability uses the order-independent block statistics of `logprob_kernels`, bit for bit those of a trainer.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from miles_kernels.cuda.logprob_kernels import GRID, LOWEST

LOG2E = tl.constexpr(1.4426950408889634)
NONE = tl.constexpr(0x7FFFFFFF)
TOP_BIT = tl.constexpr(-2147483648)


@triton.jit
def shift_right(x, BY: tl.constexpr, BITS: tl.constexpr):
    """Logical right shift of a signed integer."""
    return (x >> BY) & ((1 << (BITS - BY)) - 1)


@triton.jit
def mix64(x):
    """SplitMix64's finaliser."""
    x = (x ^ shift_right(x, 30, 64)) * -4658895280553007687
    x = (x ^ shift_right(x, 27, 64)) * -7723592293110705685
    return x ^ shift_right(x, 31, 64)


@triton.jit
def row_keys(seed, sample_id, position):
    """The two int32 keys of a row."""
    state = mix64(seed * -7046029254386353131 + sample_id + 2611923443488327891)
    keys = mix64(state + position * -3372029247567499371)
    return keys.to(tl.int32), (keys >> 32).to(tl.int32)


@triton.jit
def noise_bits(token, key_low, key_high):
    """32 random bits of each int32 token id, as uint32."""
    x = token.to(tl.uint32) * 2654435761 + 320440879
    x = (x ^ (x >> 16)) ^ key_low.to(tl.uint32)
    x = x * 2246822507
    # (y + key) * c as y * c + key * c: one multiply-add instead of two instructions
    x = (x ^ (x >> 15)) * 3266489909 + key_high.to(tl.uint32) * 3266489909
    x = (x ^ (x >> 13)) * 668265263
    return x ^ (x >> 16)


@triton.jit
def gumbel(bits):
    """Standard Gumbel noise of 32 random bits, in the roundings of `ops.sample`."""
    minus_v = tl.maximum((bits.to(tl.float32) + 0.5) * -2.3283064365386963e-10, -0.999999940395355224609375)
    return -libdevice.log(tl.abs(libdevice.log1p(minus_v)))


@triton.jit
def largest(x):
    return tl.max(tl.max(x, 1), 0)


@triton.jit
def smallest(x):
    return tl.min(tl.min(x, 1), 0)


@triton.jit
def block_parts(z, c):
    """(r, sum p on the grid, p) of z[rows, 128]: `logprob_kernels.block_stats`, bit for bit, with p itself."""
    r = tl.ceil(tl.maximum(tl.max(z, 1), LOWEST) * c)
    p = tl.exp2(tl.fma(z, tl.broadcast_to(c, z.shape), tl.broadcast_to(-r[:, None], z.shape)))
    # the sum of `on_grid(p)`: its constant is subtracted once per row; 128 times 0x4B000000 is 2^31 modulo 2^32
    total = tl.sum(tl.fma(p, GRID, GRID).to(tl.int32, bitcast=True), 1) ^ TOP_BIT
    return r, total, p


@triton.jit
def exact_span(base, span, inverse, key_low, key_high, V, BLOCK: tl.constexpr, STEPS: tl.constexpr, NOISE: tl.constexpr):
    """Best (score, token, logit) of a span with every token's noise in full; without noise (greedy) when NOISE is off."""
    best = float("-inf")
    best_id = V
    best_z = 0.0
    lane = tl.arange(0, BLOCK // 128)[:, None] * 128 + tl.arange(0, 128)[None, :]
    for step in range(STEPS):
        token = (span * STEPS + step) * BLOCK + lane
        z = tl.load(base + token, mask=token < V, other=float("-inf")).to(tl.float32)
        score = z
        if NOISE:
            score = tl.where(token < V, z * inverse + gumbel(noise_bits(token, key_low, key_high)), float("-inf"))
        top = largest(score)
        if top > best:
            best = top
            best_id = smallest(tl.where(score == top, token, NONE))
            best_z = largest(tl.where(token == best_id, z, float("-inf")))
    return best, best_id, best_z


@triton.jit
def draw(
    logits_ptr, inverse_temperature_ptr, greedy_ptr, seed_ptr, sample_ptr, position_ptr,
    best_ptr, id_ptr, z_ptr, r_ptr, total_ptr, B, V, stride, spans,
    BLOCK: tl.constexpr, STEPS: tl.constexpr, EXACT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Best (score, token, logit) of one span of BLOCK * STEPS columns of one row, and its block statistics [V / 128, B].

    The first block's most promising token gives a score S. From then on a lane only notes tokens that could beat S; the noted
    ones, a handful per span, are computed in full at the end. Should two fall on one lane, the span is done again in full.
    """
    row = tl.program_id(0)
    span = tl.program_id(1)
    inverse = tl.load(inverse_temperature_ptr + row)
    greedy = tl.load(greedy_ptr + row) != 0
    key_low, key_high = row_keys(tl.load(seed_ptr + row), tl.load(sample_ptr + row), tl.load(position_ptr + row))
    c = inverse * LOG2E
    base = logits_ptr + row.to(tl.int64) * stride
    group = tl.arange(0, BLOCK // 128)
    lane = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    noted = tl.full((BLOCK // 128, 128), NONE, tl.int32)
    count = tl.zeros((BLOCK // 128, 128), tl.int32)
    poison = tl.zeros((BLOCK // 128, 128), tl.float32)
    known = float("-inf")
    for step in tl.range(0, STEPS, num_stages=STAGES):
        begin = (span * STEPS + step) * BLOCK
        token = begin + lane
        if begin + BLOCK <= V:
            z = tl.load(base + token).to(tl.float32)
        else:
            z = tl.load(base + token, mask=token < V, other=float("-inf")).to(tl.float32)
        r, total, p = block_parts(z, c)
        poison = tl.fma(p, 0.0, poison)  # p is NaN for NaN and for +inf, and finite otherwise
        where = (begin // 128 + group).to(tl.int64) * B + row
        keep = (begin + group * 128) < V
        tl.store(r_ptr + where, r.to(tl.int32), mask=keep)
        tl.store(total_ptr + where, total, mask=keep)
        if not EXACT:
            bits = noise_bits(token, key_low, key_high)
            v = tl.fma(bits.to(tl.float32), 2.3283064365386963e-10, 1.1641532182693481e-10)
            if known == float("-inf"):
                promise = tl.where(z > float("-inf"), z * inverse - tl.log(v), float("-inf"))
                top = largest(promise)
                if top > float("-inf"):
                    choice = smallest(tl.where(promise == top, token, NONE))
                    z_one = largest(tl.where(token == choice, z, float("-inf")))
                    known = z_one * inverse + gumbel(noise_bits(choice, key_low, key_high))
            # odds = exp(z / T - S), from p = 2^(c z - r) of the statistics; the factor covers all rounding
            scale = tl.exp2(tl.minimum(r - known * LOG2E, 126.0)) * 1.001
            could = v <= p * scale[:, None]
            noted = tl.where(could, token, noted)
            count += could.to(tl.int32)
    if EXACT or greedy:
        if greedy:
            best, best_id, best_z = exact_span(base, span, inverse, key_low, key_high, V, BLOCK, STEPS, False)
        else:
            best, best_id, best_z = exact_span(base, span, inverse, key_low, key_high, V, BLOCK, STEPS, True)
    elif largest(count) > 1:
        best, best_id, best_z = exact_span(base, span, inverse, key_low, key_high, V, BLOCK, STEPS, True)
    else:
        z = tl.load(base + noted, mask=count > 0, other=float("-inf")).to(tl.float32)
        score = tl.where(count > 0, z * inverse + gumbel(noise_bits(noted, key_low, key_high)), float("-inf"))
        best = largest(score)
        best_id = tl.minimum(smallest(tl.where((score == best) & (count > 0), noted, NONE)), V)
        best_z = largest(tl.where(noted == best_id, z, float("-inf")))
    bad = largest((poison != poison).to(tl.int32)) > 0
    place = row.to(tl.int64) * spans + span
    tl.store(best_ptr + place, tl.where(bad, float("inf"), best))
    tl.store(id_ptr + place, tl.where(bad, V, best_id))
    tl.store(z_ptr + place, best_z)


@triton.jit
def pick(best_ptr, id_ptr, z_ptr, token_ptr, target_ptr, V, spans, SPANS: tl.constexpr):
    """The best span of a row: largest score, lowest token id on a tie; token -1 where nothing could be drawn."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, SPANS)
    mask = lane < spans
    best = tl.load(best_ptr + row * spans + lane, mask=mask, other=float("-inf"))
    token = tl.load(id_ptr + row * spans + lane, mask=mask, other=NONE)
    z = tl.load(z_ptr + row * spans + lane, mask=mask, other=0.0)
    top = tl.max(best, 0)
    chosen = tl.min(tl.where(best == top, token, NONE), 0)
    target = tl.max(tl.where((best == top) & (token == chosen), z, float("-inf")), 0)
    tl.store(token_ptr + row, tl.where((chosen < V) & (top < float("inf")), chosen, -1).to(tl.int64))
    tl.store(target_ptr + row, target)
