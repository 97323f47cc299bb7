"""Keyed sampling on a GPU: the CPU's draws, a trainer's log-probability, and no dependence on the batch or the launch."""

import pytest
import torch

from miles_kernels.testing import count_unequal

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _gpu():
    pytest.importorskip("triton")


def keys(rows, step=3):
    ids = torch.arange(rows, device="cuda")
    return {"sample_id": ids, "position": ids * step}


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0, 6.0])
@pytest.mark.parametrize("vocab", [100, 50_000, 50_003, 151_936])
def test_draws_are_those_of_the_cpu_and_logprobs_those_of_a_trainer(spread, vocab):
    from miles_kernels.cuda.logprob import logprob_from_logits
    from miles_kernels.cuda.sample import draw
    from miles_kernels.ops.sample import sample

    rows = 48
    wide = torch.randn(rows, vocab + -vocab % 8, device="cuda")[:, :vocab] * spread
    heat = torch.rand(rows, device="cuda") + 0.3
    heat[3] = 0.0
    got = draw(wide, seed=5, temperature=heat, **keys(rows))
    cpu = {name: x.cpu() for name, x in keys(rows).items()}
    want = sample(wide.cpu(), seed=5, temperature=heat.cpu(), **cpu)
    assert int((got.token.cpu() != want.token).sum()) <= 1  # two best scores that agree to the last bits of a logarithm
    same = got.token.cpu() == want.token
    assert float((got.logprob.cpu() - want.logprob)[same].abs().max()) < 2e-5
    scored = logprob_from_logits(wide, got.token, torch.where(heat == 0, 1.0, heat))
    assert count_unequal(scored.logprob, got.logprob) == 0
    other = draw(wide, seed=6, temperature=heat, **keys(rows))
    assert int((other.token != got.token).sum()) > rows // 4 or spread > 1  # another seed, other draws: the control


def test_a_row_depends_on_neither_batch_nor_launch():
    from miles_kernels.cuda.sample import Launch, draw

    logits = torch.randn(300, 50_003, device="cuda") * 2
    at = keys(300)
    whole = draw(logits, seed=2, temperature=0.8, **at)
    for part in (slice(9, 10), slice(0, 7), slice(100, 300)):
        alone = draw(logits[part], seed=2, temperature=0.8, **{name: x[part] for name, x in at.items()})
        assert count_unequal(alone.token, whole.token[part]) == 0 and count_unequal(alone.logprob, whole.logprob[part]) == 0
    for launch in (Launch(8, 1, 2), Launch(32, 1, 4), Launch(64, 2, 8), Launch(draw_warps=4), Launch(early=False)):
        other = draw(logits, seed=2, temperature=0.8, launch=launch, **at)
        assert count_unequal(other.token, whole.token) == 0 and count_unequal(other.logprob, whole.logprob) == 0
    heat, seed = torch.full((300,), 0.8, device="cuda"), torch.full((300,), 2, device="cuda")
    other = draw(logits, seed=seed, temperature=heat, **at)  # numbers and tensors are the same request
    assert count_unequal(other.token, whole.token) == 0 and count_unequal(other.logprob, whole.logprob) == 0


def test_a_graph_draws_from_new_logits():
    """The second kernel starts before the first has ended and must still wait for its sums."""
    from miles_kernels.bench.timing import capture
    from miles_kernels.cuda.sample import Drawn, Launch, draw

    logits, at = torch.randn(64, 151_936, device="cuda"), keys(64)
    drawn: list[Drawn] = []
    graph = capture([lambda: drawn.append(draw(logits, seed=1, temperature=0.8, **at))])
    for _ in range(10):
        logits.normal_()
        at["position"].add_(1)
        graph.replay()
        want = draw(logits, seed=1, temperature=0.8, launch=Launch(early=False), **at)
        assert count_unequal(drawn[-1].token, want.token) == 0 and count_unequal(drawn[-1].logprob, want.logprob) == 0


def test_greedy_ties_and_broken_rows():
    from miles_kernels.cuda.sample import draw

    logits = torch.zeros(5, 20_000, device="cuda")
    logits[0, [777, 15_000]] = 2.0
    logits[1, 5] = float("nan")
    logits[2, 19_999] = float("inf")
    logits[3] = float("-inf")
    logits[4] = float("-inf")
    logits[4, 123] = -3.0
    for temperature in (0.0, 1.0):
        out = draw(logits, seed=1, temperature=temperature, **keys(5))
        tokens = out.token.tolist()
        assert tokens[1:] == [-1, -1, -1, 123] and abs(float(out.logprob[4])) < 1e-6
        assert not torch.isfinite(out.logprob[1:4]).any()
        assert temperature or tokens[0] == 777


def test_draws_follow_the_distribution():
    """Four tokens, two of them in one block; the chi-square of wrong shares must be large."""
    from miles_kernels.cuda.sample import draw

    p = torch.tensor([0.5, 0.25, 0.125, 0.125], device="cuda")
    where = torch.tensor([100, 101, 200, 299], device="cuda")
    logits = torch.full((4096, 300), float("-inf"), device="cuda")
    logits[:, where] = p.log()
    counts = torch.zeros(300, device="cuda")
    for position in range(16):
        at = {"sample_id": keys(4096)["sample_id"], "position": torch.full((4096,), position, device="cuda")}
        counts += torch.bincount(draw(logits, seed=3, **at).token, minlength=300)
    assert counts.sum() == counts[where].sum()
    expected = p * counts.sum()
    assert float(((counts[where] - expected).square() / expected).sum()) < 21.1  # 3 degrees of freedom, 1e-4
    wrong = p.flip(0) * counts.sum()
    assert float(((counts[where] - wrong).square() / wrong).sum()) > 1000
