"""Speculation gives the tokens of plain sampling, whatever the draft."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import pytest
import torch

from miles_kernels.ops.sample import sample
from miles_spec import NgramDraft, Sampling, SuffixDraft, decode, greedy_verify, gumbel_verify, gumbel_verify_batch
from miles_spec.simulate import synthetic_target
from miles_spec.verify import matching_prefix

SAMPLINGS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 1.0, "min_p": 0.1, "top_k": 20},
]


@pytest.fixture
def rng() -> random.Random:
    return random.Random()


class RandomDraft:
    """Guesses that are sometimes the truth, sometimes noise, of random length."""

    def __init__(self, rng: random.Random, vocab: int, truth: Sequence[int] = (), skill: float = 0.0) -> None:
        self.rng, self.vocab, self.truth, self.skill = rng, vocab, truth, skill

    def begin(self, token_ids: Sequence[int]) -> RandomDraft:
        session = RandomDraft(self.rng, self.vocab, self.truth, self.skill)
        session.done = 0  # type: ignore[attr-defined]
        return session

    def extend(self, token_ids: Iterable[int]) -> None:
        self.done += len(list(token_ids))  # type: ignore[attr-defined]

    def propose(self, max_tokens: int) -> tuple[int, ...]:
        count = self.rng.randint(0, max_tokens)
        truth = self.truth[self.done : self.done + count]  # type: ignore[attr-defined]
        return tuple(token if self.rng.random() < self.skill else self.rng.randrange(self.vocab) for token in truth)


def plain(target, prompt: list[int], count: int, how: Sampling) -> tuple[list[int], list[float], list[float]]:  # type: ignore[no-untyped-def]
    """Plain sampling, one row and one call at a time, straight from the kernel."""
    tokens, logprobs, sampled = list(prompt), [], []
    for _ in range(count):
        drawn = sample(
            target(tokens, 1),
            seed=torch.tensor([how.seed]),
            sample_id=torch.tensor([how.sample_id]),
            position=torch.tensor([len(tokens)]),
            temperature=how.temperature,
            top_k=how.top_k,
            top_p=how.top_p,
            min_p=how.min_p,
        )
        tokens.append(int(drawn.token))
        logprobs.append(float(drawn.logprob))
        sampled.append(float(drawn.sampled_logprob))
    return tokens[len(prompt) :], logprobs, sampled


@pytest.mark.parametrize("params", SAMPLINGS)
def test_any_draft_gives_the_tokens_of_plain_sampling(params: dict[str, float], rng: random.Random) -> None:
    vocab, count = 40, 60
    target = synthetic_target(vocab, order=1, sharpness=5.0, seed=rng.getrandbits(30))
    how = Sampling(seed=rng.getrandbits(40), sample_id=rng.getrandbits(20), **params)  # type: ignore[arg-type]
    prompt = [rng.randrange(vocab) for _ in range(rng.randint(1, 6))]
    expected = plain(target, prompt, count, how)
    drafts = [
        None,
        NgramDraft(min_n=1),
        SuffixDraft(min_match=1),
        RandomDraft(rng, vocab, expected[0], skill=0.0),
        RandomDraft(rng, vocab, expected[0], skill=0.7),
        RandomDraft(rng, vocab, expected[0], skill=1.0),
    ]
    for draft in drafts:
        result = decode(target, prompt, count, how, draft=draft, num_draft=rng.randint(1, 9))
        assert (result.token_ids, result.logprobs, result.sampled_logprobs) == expected
    assert result.stats.accept_rate == 1.0  # the last draft only ever tells the truth
    assert result.stats.num_steps < count


def test_negative_control_other_noise_gives_other_tokens(rng: random.Random) -> None:
    """The comparison above can fail: noise keyed by the step instead of the position already breaks it."""
    target = synthetic_target(40, order=1, sharpness=1.0, seed=1)
    expected, _, _ = plain(target, [3], 60, Sampling())
    tokens: list[int] = [3]
    while len(tokens) < 61:
        draft = tuple(expected[len(tokens) - 1 : len(tokens) + 2])
        tokens.extend(gumbel_verify(draft, target([*tokens, *draft], len(draft) + 1), seed=0, sample_id=0, position=0).token_ids)
    assert tokens[1:61] != expected


def test_a_batch_gives_each_sequence_its_own_result(rng: random.Random) -> None:
    vocab, rows = 97, rng.randint(3, 9)
    drafts, logits, single = [], [], []
    seed, sample_id, position = (torch.randint(0, 1 << 30, (rows,)) for _ in range(3))
    temperature = torch.rand(rows) * (torch.arange(rows) != 1)
    for i in range(rows):
        draft = [rng.randrange(vocab) for _ in range(rng.choice([0, 1, 4]))]
        block = torch.randn(len(draft) + 1, vocab) * 3
        row = gumbel_verify(
            draft,
            block,
            seed=int(seed[i]),
            sample_id=int(sample_id[i]),
            position=int(position[i]),
            temperature=float(temperature[i]),
        )
        if draft and rng.random() < 0.7:
            draft[0] = row.token_ids[0]
        drafts.append(draft)
        logits.append(block)
        single.append(
            gumbel_verify(
                draft,
                block,
                seed=int(seed[i]),
                sample_id=int(sample_id[i]),
                position=int(position[i]),
                temperature=float(temperature[i]),
            )
        )
    batch = gumbel_verify_batch(
        drafts, torch.cat(logits), seed=seed, sample_id=sample_id, position=position, temperature=temperature
    )
    assert batch == single
    order = list(range(rows))
    rng.shuffle(order)
    index = torch.tensor(order)
    shuffled = gumbel_verify_batch(
        [drafts[i] for i in order],
        torch.cat([logits[i] for i in order]),
        seed=seed[index],
        sample_id=sample_id[index],
        position=position[index],
        temperature=temperature[index],
    )
    assert shuffled == [single[i] for i in order]


def test_greedy_takes_the_largest_logit_and_the_lowest_id_on_a_tie() -> None:
    logits = torch.zeros(3, 8)
    logits[0, 5] = logits[1, 2] = logits[1, 6] = 4.0
    logits[2, 7] = 1.0
    assert greedy_verify([5, 2], logits).token_ids == (5, 2, 7)
    missed = greedy_verify([5, 6], logits)
    assert (missed.token_ids, missed.num_accepted, missed.num_proposed) == ((5, 2), 1, 2)
    oracle = torch.log_softmax(logits.double(), dim=1)
    assert missed.logprobs == pytest.approx([float(oracle[0, 5]), float(oracle[1, 2])], abs=1e-6)


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"target_logits is \[3, 8\], but drafts of 3 tokens need 4 rows"):
        greedy_verify([1, 2, 3], torch.zeros(3, 8))
    with pytest.raises(ValueError, match="prompt is empty"):
        decode(synthetic_target(4, 1, 1.0, 0), [], 3, Sampling())


def test_matching_prefix(rng: random.Random) -> None:
    for _ in range(50):
        a, b = ([rng.randrange(2) for _ in range(rng.randint(0, 6))] for _ in range(2))
        assert matching_prefix(a, b) == max(n for n in range(min(len(a), len(b)) + 1) if a[:n] == b[:n])
