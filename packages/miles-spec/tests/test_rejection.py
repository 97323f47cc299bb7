"""Rejection verification has the target's distribution: enumerated in float64, and by chi-square on what is really drawn."""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor

from miles_kernels.ops.logprob import logprob_from_logits
from miles_kernels.ops.noise import keyed_gumbel
from miles_spec import rejection
from miles_spec.drafted import Drafted, sibling_probs
from miles_spec.rejection import rejection_verify, target_probs, walk

TREES = [(-1,), (-1, 0), (-1, 0, 1), (-1, -1), (-1, -1, 0, 0), (-1, -1, 0, 1), (-1, 0, 0, 0)]
CHAINS = [tree for tree in TREES if tree == tuple(range(-1, len(tree) - 1))]


def rows_of(num: int) -> dict[str, Tensor]:
    return {"seed": torch.zeros(num, dtype=torch.int64), "sample_id": torch.arange(num), "position": torch.full((num,), 3)}


class Script:
    """Makes the choices it is told and multiplies up how likely they were."""

    def __init__(self, flips: tuple[bool, ...], token: int, batch: int) -> None:
        self.flips, self.token = iter(flips), token
        self.weight = torch.ones(batch, dtype=torch.float64)

    def flip(self, depth: int, sibling: int, prob: Tensor) -> Tensor:
        yes = next(self.flips)
        self.weight *= prob if yes else 1.0 - prob
        return torch.full_like(prob, yes, dtype=torch.bool)

    def draw(self, depth: Tensor, probs: Tensor) -> Tensor:
        self.weight *= probs[:, self.token]
        return torch.full((len(probs),), self.token)


class Law:
    """Random next-token distributions by context, made when asked for."""

    def __init__(self, vocab: int, generator: torch.Generator, sharpness: float = 1.5, some_zero: bool = False) -> None:
        self.known: dict[tuple[int, ...], Tensor] = {}
        self.vocab, self.generator, self.sharpness, self.some_zero = vocab, generator, sharpness, some_zero

    def __call__(self, context: tuple[int, ...]) -> Tensor:
        if context not in self.known:
            z = torch.randn(self.vocab, generator=self.generator, dtype=torch.float64) * self.sharpness
            if self.some_zero:
                z[int(torch.randint(self.vocab, (1,), generator=self.generator))] = -math.inf
            self.known[context] = torch.softmax(z, 0)
        return self.known[context]


def contexts(parents: tuple[int, ...], tokens: tuple[int, ...]) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = [()]
    for parent, token in zip(parents, tokens, strict=True):
        found.append((*found[parent + 1], token))
    return found


def difference(parents: tuple[int, ...], p: Law, q: Law, how: str, **options: Any) -> float:
    """Largest error of the law of D + 1 tokens, over all drafts, choices and continuations. `how`: replace, without, point."""
    vocab = p.vocab
    all_tokens = list(itertools.product(range(vocab), repeat=len(parents)))
    if how == "point":
        all_tokens = [random.choice(all_tokens)]
    if how == "without":
        siblings = [(a, b) for a, b in itertools.combinations(range(len(parents)), 2) if parents[a] == parents[b]]
        all_tokens = [tokens for tokens in all_tokens if all(tokens[a] != tokens[b] for a, b in siblings)]
    tokens = torch.tensor(all_tokens)
    p_rows = torch.stack([torch.stack([p(c) for c in contexts(parents, t)]) for t in all_tokens])
    probs, weight = None, torch.ones(len(all_tokens), dtype=torch.float64)
    if how != "point":
        q_rows = torch.stack([torch.stack([q(c) for c in contexts(parents, t)]) for t in all_tokens])
        probs = q_rows[:, [parent + 1 for parent in parents]] if how == "replace" else sibling_probs(parents, tokens, q_rows)
        weight = probs.gather(2, tokens[..., None])[..., 0].prod(1)
        keep = weight > 0
        tokens, p_rows, probs, weight = tokens[keep], p_rows[keep], probs[keep], weight[keep]
    drafted = Drafted(parents=parents, tokens=tokens, probs=probs)
    depth, width = max(drafted.depths), drafted.children.shape[1]
    law: dict[tuple[int, ...], float] = defaultdict(float)
    for flips in itertools.product((True, False), repeat=depth * width):
        for token in range(vocab):
            script = Script(flips, token, len(tokens))
            path, last = walk(drafted, p_rows, script, **options)
            for row, chance in enumerate((script.weight * weight).tolist()):
                if chance:
                    out = [int(tokens[row, node]) for node in path[row].tolist() if node >= 0]
                    law[(*out, int(last[row]))] += chance
    worst = 0.0
    for sequence in itertools.product(range(vocab), repeat=depth + 1):
        expected = math.prod(float(p(sequence[:i])[t]) for i, t in enumerate(sequence))
        got = sum(
            law[sequence[:n]] * math.prod(float(p(sequence[:i])[sequence[i]]) for i in range(n, depth + 1))
            for n in range(1, depth + 2)
        )
        worst = max(worst, abs(expected - got))
    return worst


def laws(vocab: int, seed: int, some_zero: bool = False) -> tuple[Law, Law]:
    generator = torch.Generator().manual_seed(seed)
    return Law(vocab, generator, some_zero=some_zero), Law(vocab, generator)


@pytest.mark.parametrize("how", ["replace", "without", "point"])
@pytest.mark.parametrize("parents", TREES)
def test_every_outcome_enumerated(parents: tuple[int, ...], how: str) -> None:
    for some_zero in (False, True):
        p, q = laws(3, random.getrandbits(30), some_zero)
        assert difference(parents, p, q, how) < 1e-12


def test_four_tokens_and_equal_laws_enumerated() -> None:
    p, q = laws(4, random.getrandbits(30))
    assert difference((-1, 0), p, q, "replace") < 1e-12
    assert difference((-1, -1, -1), p, q, "without") < 1e-12
    assert difference((-1, -1, 0), p, p, "replace") < 1e-12


@pytest.mark.parametrize("parents", [(-1, 0), (-1, -1, 0)])
def test_wrong_rules_are_seen_by_the_enumeration(parents: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    p, q = laws(3, 5)
    assert difference(parents, p, q, "replace", accept_total=0.8) > 1e-3
    assert difference(parents, p, q, "replace", accept_single=0.3) > 1e-3
    monkeypatch.setattr(rejection, "residual", lambda p, q: p)
    assert difference(parents, p, q, "replace") > 1e-3


NUM = 200_000
VOCAB = 8


def draws(parents: tuple[int, ...], heat_of_draft: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """First tokens that come out of NUM verify steps, their second tokens (-1: not reached), and the logits of the context.

    The draft draws with the keyed noise of the target's own sampler; with another temperature than 1 it lies about its q.
    """
    generator = torch.Generator().manual_seed(7)
    table_p, table_q = torch.randn(2, VOCAB + 1, VOCAB, generator=generator) * 1.5
    seed, position = torch.full((NUM,), random.getrandbits(40)), torch.full((NUM,), 5)
    tokens, context, following = torch.zeros(NUM, len(parents), dtype=torch.int64), [torch.full((NUM,), VOCAB)], []
    for node, parent in enumerate(parents):
        z = table_q[context[parent + 1]]
        noise = keyed_gumbel(seed, torch.arange(NUM), position + node, VOCAB)
        tokens[:, node] = (z / heat_of_draft + noise).argmax(1)
        following.append(torch.softmax(z.double(), 1))
        context.append(tokens[:, node])
    drafted = Drafted(parents=parents, tokens=tokens, probs=torch.stack(following, 1))
    logits = torch.stack([table_p[c] for c in context], 1)
    result = rejection_verify(drafted, logits, seed=seed, sample_id=torch.arange(NUM), position=position)
    assert torch.equal(result.num_accepted + 1, (result.token >= 0).sum(1))
    return result.token[:, 0], result.token[:, 1], table_p


def chi_square(counts: Tensor, law: Tensor) -> float:
    """Probability of a larger statistic, were the counts of that law (Wilson-Hilferty)."""
    expected, df = law * counts.sum(), len(law) - 1
    assert float(expected.min()) > 5
    statistic = float(((counts - expected) ** 2 / expected).sum())
    return 0.5 * math.erfc(((statistic / df) ** (1 / 3) - (1 - 2 / (9 * df))) / math.sqrt(2 / (9 * df)) / math.sqrt(2))


def p_values(parents: tuple[int, ...], heat_of_draft: float = 1.0) -> tuple[float, float]:
    """Of the first token, and of the second after the likeliest first, counted where one step gave both."""
    first, second, table = draws(parents, heat_of_draft)
    law = torch.softmax(table.double(), 1)
    values = [chi_square(torch.bincount(first, minlength=VOCAB).double(), law[VOCAB])]
    top = int(law[VOCAB].argmax())
    after = second[(first == top) & (second >= 0)]
    values.append(chi_square(torch.bincount(after, minlength=VOCAB).double(), law[top]))
    return values[0], values[1]


@pytest.mark.parametrize("parents", [(-1, 0), (-1, -1, 0)])
def test_two_hundred_thousand_draws(parents: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    assert min(p_values(parents)) > 1e-6
    assert p_values(parents, heat_of_draft=1.3)[0] < 1e-6, "a draft that lies about its temperature must be seen"
    monkeypatch.setattr(rejection, "residual", lambda p, q: p)
    assert p_values(parents)[0] < 1e-6, "drawing from p after a refusal must be seen"


def test_coins_shared_with_the_draft_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rejection, "_SALT", 0)
    assert p_values((-1, 0))[0] < 1e-6


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 0.7, "top_k": 3},
        {"top_p": 0.6},
        {"min_p": 0.2},
        {"temperature": 1.4, "top_p": 0.9},
    ],
)
def test_distribution_and_logprobs_are_those_of_the_sampler(params: dict[str, float]) -> None:
    generator = torch.Generator().manual_seed(random.getrandbits(30))
    num, vocab, depth = 400, 11, 3
    logits = (torch.randn(num, depth + 1, vocab, generator=generator) * 2).round(decimals=1)  # with ties
    tokens = torch.randint(vocab, (num, depth), generator=generator)
    tokens[::3, 1:] = -1
    row = rows_of(num)
    got = rejection_verify(Drafted.chain(tokens), logits, **row, **params)  # type: ignore[arg-type]
    heat = params.get("temperature", 1.0)
    for b in range(num):
        result = got.of(b)
        for i, token in enumerate(result.token_ids):
            probs = oracle_probs(logits[b, i].tolist(), **params)
            assert probs[token] > 0
            exact = logprob_from_logits(logits[b, i : i + 1], torch.tensor([token]), torch.full((1,), heat or 1.0), entropy=False)
            assert result.logprobs[i] == pytest.approx(float(exact.logprob), abs=0.0 if heat != 1 else 1e-7)
            if heat:
                assert result.sampled_logprobs[i] == pytest.approx(math.log(probs[token]), abs=1e-5)
        assert result.num_proposed == int((tokens[b] >= 0).sum()) >= result.num_accepted
        assert list(result.token_ids[:-1]) == tokens[b, : result.num_accepted].tolist()
    rows = target_probs(logits[:, 0], **params)
    for b in range(num):
        assert rows[b].tolist() == pytest.approx(
            oracle_probs(logits[b, 0].tolist(), **params), abs=1e-7
        )  # temperatures are fp32, as the sampler's


def oracle_probs(
    logits: list[float], temperature: float = 1.0, top_k: int = -1, top_p: float = 1.0, min_p: float = 0.0
) -> list[float]:
    """Loops: rank, keep, renormalise."""
    order = sorted(range(len(logits)), key=lambda v: (-logits[v], v))
    if temperature == 0:
        return [float(v == order[0]) for v in range(len(logits))]
    total = sum(math.exp(z / temperature) for z in logits)
    probs = [math.exp(z / temperature) / total for z in logits]
    kept, before = [], 0.0
    for rank, v in enumerate(order):
        small = before >= top_p < 1 or probs[v] < min_p * probs[order[0]] or (0 < top_k <= rank)
        if rank and small:
            break
        kept.append(v)
        before += probs[v]
    mass = sum(probs[v] for v in kept)
    return [probs[v] / mass if v in kept else 0.0 for v in range(len(logits))]


def test_a_row_that_is_not_numbers_ends_the_step_and_touches_no_other() -> None:
    logits = torch.randn(3, 3, 5)
    tokens = torch.tensor([[1, 2]] * 3)
    row = rows_of(3)
    clean = rejection_verify(Drafted.chain(tokens), logits, **row)
    broken = logits.clone()
    broken[1, 0, 2] = math.nan
    got = rejection_verify(Drafted.chain(tokens), broken, **row)
    assert got.of(1).token_ids == (-1,) and not math.isfinite(got.of(1).logprobs[0])
    assert [got.of(b) for b in (0, 2)] == [clean.of(b) for b in (0, 2)]
    assert rejection_verify(Drafted.chain(tokens[:, :0]), logits[:, :1], **row).token.shape == (3, 1)


def test_wrong_input_is_refused() -> None:
    tokens, logits = torch.tensor([[1, 2]]), torch.zeros(1, 3, 4)
    row = rows_of(1)
    with pytest.raises(ValueError, match=r"need \[1, 3, V\]"):
        rejection_verify(Drafted.chain(tokens), logits[:, :2], **row)
    with pytest.raises(ValueError, match="vocabulary is 2"):
        rejection_verify(Drafted.chain(tokens), logits[:, :, :2], **row)
    with pytest.raises(ValueError, match=r"draft 0, node 1: probs gives its token 2 no probability"):
        rejection_verify(Drafted.chain(tokens, torch.eye(4)[[1, 1]][None]), logits, **row)
    with pytest.raises(ValueError, match="temperature"):
        rejection_verify(Drafted.chain(tokens), logits, temperature=-1.0, **row)
    with pytest.raises(ValueError, match=r"parents\[0\] = 0"):
        Drafted(parents=(0,), tokens=tokens[:, :1])
    with pytest.raises(ValueError, match="lacks node 0"):
        Drafted.chain(torch.tensor([[-1, 2]]))
    with pytest.raises(ValueError, match="must be"):
        Drafted.chain(tokens, torch.ones(1, 3, 4))
    with pytest.raises(ValueError, match="earlier siblings took all"):
        sibling_probs((-1, -1), torch.tensor([[1, 2]]), torch.eye(4)[[1, 1, 1]][None])
