"""Keyed and greedy trees follow plain sampling token for token; verifiers by name."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from miles_kernels.ops.sample import sample
from miles_spec.decoding import Sampling, decode
from miles_spec.drafted import Drafted
from miles_spec.rejection import rejection_verify
from miles_spec.simulate import synthetic_target
from miles_spec.verifiers import VERIFIERS, greedy_tree_verify, gumbel_tree_verify, verifier
from miles_spec.verify import gumbel_verify

VOCAB = 12


def where_of(seed: int, sample_id: int, position: int) -> dict[str, Tensor]:
    return {"seed": torch.tensor([seed]), "sample_id": torch.tensor([sample_id]), "position": torch.tensor([position])}


def random_tree(rng: random.Random, truth: list[int]) -> tuple[tuple[int, ...], list[int]]:
    """Up to nine nodes that are often the truth at their depth, sometimes equal to a sibling, sometimes lacking."""
    parents: list[int] = []
    tokens: list[int] = []
    depths: list[int] = []
    for node in range(rng.randint(0, 9)):
        parent = rng.randint(-1, node - 1)
        depth = 0 if parent < 0 else depths[parent] + 1
        lacking = parent >= 0 and tokens[parent] < 0
        known = depth < len(truth) and rng.random() < 0.6
        parents.append(parent)
        depths.append(depth)
        tokens.append(-1 if lacking or rng.random() < 0.1 else truth[depth] if known else rng.randrange(VOCAB))
    return tuple(parents), tokens


@pytest.mark.parametrize("params", [{}, {"temperature": 0.0}, {"temperature": 0.8, "top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}])
def test_any_tree_gives_the_tokens_of_plain_sampling(params: dict[str, float]) -> None:
    rng = random.Random(random.getrandbits(30))
    target = synthetic_target(VOCAB, order=2, sharpness=2.0, seed=rng.getrandbits(30))
    how = Sampling(seed=rng.getrandbits(40), sample_id=rng.getrandbits(20), **params)  # type: ignore[arg-type]
    prompt = [rng.randrange(VOCAB) for _ in range(4)]
    plain = decode(target, prompt, 80, how)
    verify = greedy_tree_verify if params.get("temperature") == 0 else gumbel_tree_verify
    tokens, logprobs, sampled, most = list(prompt), [], [], 0
    while (done := len(tokens) - len(prompt)) < 60:
        parents, nodes = random_tree(rng, plain.token_ids[done:])
        drafted = Drafted(parents=parents, tokens=torch.tensor([nodes], dtype=torch.int64).view(1, len(nodes)))
        contexts = [tokens]
        for parent, node in zip(parents, nodes, strict=True):
            contexts.append([*contexts[parent + 1], max(node, 0)])
        logits = torch.cat([target(context, 1) for context in contexts])[None]
        where = where_of(how.seed, how.sample_id, len(tokens))
        verified = verify(drafted, logits, **where, **params)  # type: ignore[operator]
        result = verified.of(0)
        assert [nodes[n] for n in verified.node[0].tolist() if n >= 0] == list(result.token_ids[:-1])
        tokens += result.token_ids
        logprobs += result.logprobs
        sampled += result.sampled_logprobs
        most = max(most, result.num_accepted)
    count = len(logprobs)
    assert tokens[len(prompt) :] == plain.token_ids[:count]
    assert logprobs == plain.logprobs[:count] and sampled == plain.sampled_logprobs[:count]
    assert most >= 2, "the drafts must have been good enough to test anything"


def test_a_chain_is_the_chain_verifier() -> None:
    logits = torch.randn(20, 5, VOCAB) * 3
    truth = sample(
        logits.flatten(0, 1), seed=3, sample_id=torch.arange(20).repeat_interleave(5), position=torch.arange(5).repeat(20)
    )
    tokens = truth.token.view(20, 5)[:, :4].clone()
    tokens[::2, 2] = (tokens[::2, 2] + 1) % VOCAB
    ids = torch.arange(20)
    got = gumbel_tree_verify(
        Drafted.chain(tokens), logits, seed=torch.full_like(ids, 3), sample_id=ids, position=torch.zeros_like(ids)
    )
    for b in range(20):
        assert got.of(b) == gumbel_verify(tokens[b].tolist(), logits[b], seed=3, sample_id=b, position=0)
    assert got.num_accepted.tolist() == [2, 4] * 10


def test_noise_of_another_position_is_seen() -> None:
    logits, ids = torch.randn(50, 2, VOCAB), torch.arange(50)
    drafted = Drafted.chain(torch.zeros(50, 1, dtype=torch.int64))

    def tokens(position: int) -> Tensor:
        return gumbel_tree_verify(
            drafted, logits, seed=torch.zeros_like(ids), sample_id=ids, position=torch.full_like(ids, position)
        ).token

    assert torch.equal(tokens(4), tokens(4)) and not torch.equal(tokens(4), tokens(5))


def test_verifiers_by_name() -> None:
    assert {name: verifier(name) for name in VERIFIERS} == dict(VERIFIERS)
    with pytest.raises(ValueError, match="no verifier 'typical'; there are: gumbel, rejection, greedy"):
        verifier("typical")
    for thresholds in ({"accept_single": 0.9}, {"accept_total": 0.5}):
        with pytest.raises(ValueError, match="allow_lossy=True"):
            verifier("rejection", **thresholds)
        with pytest.raises(ValueError, match="has no thresholds"):
            verifier("gumbel", allow_lossy=True, **thresholds)
    with pytest.raises(ValueError, match=r"\(0, 1\]"):
        verifier("rejection", accept_total=0.0, allow_lossy=True)
    ids = torch.arange(500)
    where = {"seed": torch.zeros_like(ids), "sample_id": ids, "position": torch.zeros_like(ids)}
    drafted, logits = Drafted.chain(torch.zeros(500, 1, dtype=torch.int64)), torch.zeros(500, 2, 4)
    assert 0.15 < float(verifier("rejection")(drafted, logits, **where).num_accepted.float().mean()) < 0.35
    with pytest.raises(ValueError, match="allow_lossy=True"):
        rejection_verify(drafted, logits, accept_total=0.9, **where)
    lossy = verifier("rejection", accept_single=0.25, allow_lossy=True)
    assert float(lossy(drafted, logits, **where).num_accepted.float().mean()) == 1.0
    with pytest.raises(ValueError, match="lossless at temperature 0 only"):
        verifier("greedy")(drafted, logits, temperature=0.5, **where)
