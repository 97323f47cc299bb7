"""Keyed sampling in one pass over the logits: sums per block of 128 tokens, then one draw per row.

Legend: B = rows, V = vocabulary, N = blocks of 128 tokens. The draw is that of `miles_kernels.ops.sample`: first a block, by its
mass and the block's noise, then a token of it, by its logit and the token's noise. Noise is the same hash of (seed, sample id,
position, id), so both draw the same token unless the two best scores agree to the last bits of a float32 logarithm.

So the pass computes what a log-probability needs and nothing else; noise is made for one row of blocks and one block of tokens.
The sums are the order-independent ones of `logprob_kernels`, and the log-probability has the bits of a trainer's.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from miles_kernels.cuda.logprob_kernels import GRID, exponent_of, logprob_of, shift_to

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NONE = tl.constexpr(0x7FFFFFFF)
TOP_BIT = tl.constexpr(-2147483648)
WIDTH = tl.constexpr(128)
"""Tokens of a block: `logprob.BLOCK` and `ops.sample.BLOCK`."""


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
def gumbel(ids, key_low, key_high):
    """Standard Gumbel noise of int32 ids under a row's keys: hash and roundings of `ops.sample`."""
    x = ids.to(tl.uint32) * 2654435761 + 320440879
    x = (x ^ (x >> 16)) ^ key_low.to(tl.uint32)
    x = x * 2246822507
    x = (x ^ (x >> 15)) + key_high.to(tl.uint32)
    x = x * 3266489909
    x = (x ^ (x >> 13)) * 668265263
    x = x ^ (x >> 16)
    minus_v = tl.maximum((x.to(tl.float32) + 0.5) * -2.3283064365386963e-10, -0.999999940395355224609375)
    return -libdevice.log(tl.abs(libdevice.log1p(minus_v)))


@triton.jit
def larger(a, b):
    """Maximum that a NaN survives."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def inverse_temperature(temperature, row, WARM: tl.constexpr):
    """(1 / temperature rounded once, whether the row is greedy); greedy rows count as temperature 1."""
    heat = tl.load(temperature + row) if WARM else temperature
    greedy = heat == 0.0
    return tl.div_rn(1.0, tl.where(greedy, 1.0, heat)), greedy


@triton.jit
def first_largest(score, ids):
    """(largest score, lowest id that has it)."""
    best = tl.max(score, 0)
    return best, tl.min(tl.where(score == best, ids, NONE), 0)


@triton.jit(do_not_specialize=["temperature"])
def block_sums(
    logits, temperature, top_out, total_out, V, N, stride,
    WARM: tl.constexpr, BLOCKS: tl.constexpr, STEPS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Largest logit (NaN if one is) and sum of 2^(c z - r) on the grid 2^-23, per block of a row; [B, N] each.

    A tile is [BLOCKS, 4, 32]: Triton then gives a lane 16 logits of one block, which it reduces without its seven neighbours.
    """
    if EARLY:
        gdc_launch_dependents()
    row = tl.program_id(1).to(tl.int64)
    inverse, _ = inverse_temperature(temperature, row, WARM)
    c = inverse * LOG2E
    base = logits + row * stride
    groups = tl.arange(0, BLOCKS)
    lane = (groups * WIDTH)[:, None, None] + (tl.arange(0, 4) * 32)[None, :, None] + tl.arange(0, 32)[None, None, :]
    for step in tl.static_range(STEPS):
        first = (tl.program_id(0) * STEPS + step) * BLOCKS
        if (first + BLOCKS) * WIDTH <= V:
            z = tl.load(base + (first * WIDTH + lane), eviction_policy="evict_first").to(tl.float32)
        else:
            z = tl.load(base + (first * WIDTH + lane), mask=first * WIDTH + lane < V, other=float("-inf")).to(tl.float32)
        top = tl.reduce(tl.reduce(z, 1, larger), 1, larger)
        r = exponent_of(top, c)
        t = tl.fma(z, tl.broadcast_to(c, z.shape), tl.broadcast_to(-r[:, None, None], z.shape))
        # `on_grid(p)` with its constant taken off once: 128 times 0x4B000000 is 2^31 modulo 2^32
        grid = tl.fma(tl.exp2(t), GRID, GRID).to(tl.int32, bitcast=True)
        total = tl.sum(tl.sum(grid, 1), 1) ^ TOP_BIT
        where = row * N + first + groups
        tl.store(top_out + where, top, mask=first + groups < N)
        tl.store(total_out + where, total, mask=first + groups < N)


@triton.jit(do_not_specialize=["seed", "temperature"])
def draw_token(
    logits, temperature, seed, sample_id, position, top_in, total_in, token_out, logprob_out, V, N, stride,
    WARM: tl.constexpr, SEEDS: tl.constexpr, BLOCKS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Token (-1 where the logits are not numbers) and log-probability of a row from the sums of its blocks.

    `EARLY`: it may start while `block_sums` still runs, and makes the noise of the blocks meanwhile.
    """
    row = tl.program_id(0).to(tl.int64)
    inverse, greedy = inverse_temperature(temperature, row, WARM)
    c = inverse * LOG2E
    seed = (tl.load(seed + row) if SEEDS else seed).to(tl.int64)
    key_low, key_high = row_keys(seed, tl.load(sample_id + row), tl.load(position + row))
    blocks = tl.arange(0, BLOCKS)
    noise = gumbel(-1 - blocks, key_low, key_high)
    if EARLY:
        gdc_wait()
    tops = tl.load(top_in + row * N + blocks, mask=blocks < N, other=float("-inf"))
    total = tl.load(total_in + row * N + blocks, mask=blocks < N, other=0).to(tl.uint32, bitcast=True)
    highest = tl.reduce(tops, 0, larger)
    sound = (highest > float("-inf")) & (highest < float("inf"))  # false for NaN
    r = exponent_of(tops, c)
    top = exponent_of(highest, c)
    # a block: ln of its mass, relative to 2^top, and its noise
    mass = (r - top) * LN2 + libdevice.log(total.to(tl.float32) * 1.1920928955078125e-07)
    score = tl.where(tops > float("-inf"), mass + noise, float("-inf"))
    _, block = first_largest(tl.where(greedy, tops, score), blocks)
    # a token of it
    ids = tl.minimum(block, N - 1) * WIDTH + tl.arange(0, WIDTH)
    z = tl.load(logits + row * stride + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
    noisy = tl.where(z > float("-inf"), z * inverse + gumbel(ids, key_low, key_high), float("-inf"))
    _, token = first_largest(tl.where(greedy, z, noisy), ids)
    target = tl.max(tl.where(ids == token, z, float("-inf")), 0)
    # its log-probability
    down = shift_to(top, tl.maximum(r, -2.0e9))
    log_mass = tl.log(tl.sum((total.to(tl.int64) << 20) >> down, 0).to(tl.float64) * (1.0 / 8796093022208.0))
    tl.store(token_out + row, tl.where(sound, token, -1).to(tl.int64))
    tl.store(logprob_out + row, tl.where(sound, logprob_of(target, c, top, log_mass), float("nan")))
