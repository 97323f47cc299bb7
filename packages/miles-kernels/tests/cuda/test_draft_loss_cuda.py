"""Rows of a draft's and the policy's logits compared on a GPU: the definitions in float64, each row by itself."""

import pytest
import torch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("vocab", [37, 128, 151936])
def test_rows_are_compared_as_defined(vocab):
    pytest.importorskip("triton")
    from miles_kernels.cuda.draft_loss import compare_rows

    torch.manual_seed(0)
    q, p = (3 * torch.randn(9, vocab, device="cuda") for _ in range(2))
    heat, labels = torch.rand(9, device="cuda") + 0.5, torch.randint(vocab, (9,), device="cuda")
    found = compare_rows(q, p, labels, heat, gradient=torch.float32)
    log_q, log_p = ((x.double() / heat[:, None]).log_softmax(1) for x in (q, p))
    exact_q, exact_p = log_q.exp(), log_p.exp()
    wanted = (
        -log_q.gather(1, labels[:, None])[:, 0],
        (exact_p * (log_p - log_q)).sum(1),
        torch.minimum(exact_p, exact_q).sum(1),
        torch.where(exact_q < exact_p, exact_q, 0.0).sum(1),
        (exact_q - exact_p) / heat[:, None],
    )
    for ours, right in zip(found, wanted, strict=True):
        assert float((ours - right).abs().max()) < 2e-5
    assert float((found.kl - wanted[1].flip(0)).abs().max()) > 1e-2, "the control: another row's"
    alone = compare_rows(q[4:5], p[4:5], labels[4:5], heat[4:5], gradient=torch.float32)
    assert all(torch.equal(one[0], each[4]) for one, each in zip(alone, found, strict=True))
    with pytest.raises(ValueError, match="rows to compare"):
        compare_rows(q.half(), p, labels, heat, gradient=None)
