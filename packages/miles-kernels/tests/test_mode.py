"""invariant(): stock models become batch-invariant, everything is restored, and unproven reductions are named."""

import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from miles_kernels.mode import UnprovenReduction, invariant
from miles_kernels.testing import count_unequal


class Small(nn.Module):
    """Attention, a gated MLP, a norm and a softmax head, all of them torch's own."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 2 * width, bias=False), nn.Linear(2 * width, width)
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 700)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        return self.head(x).log_softmax(-1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_stock_model_gives_a_row_the_same_bits_in_every_batch(dtype):
    model, x = Small().to(dtype), torch.randn(9, 37, 96).to(dtype)
    with torch.inference_mode(), invariant() as audit:
        whole = model(x)
        for rows in ([0], [3, 1], [8, 7, 6, 5, 4], list(range(9))):
            assert count_unequal(model(x[rows]), whole[rows]) == 0
        prefix = model(x[:2, :11])
        assert count_unequal(prefix, whole[:2, :11]) == 0
    assert {"aten.addmm.default", "aten._log_softmax.default"} <= audit.replaced.keys()
    assert not audit.unproven
    stock = model(x).detach()
    assert torch.allclose(stock.float(), whole.float(), atol=0.1 if dtype is torch.bfloat16 else 1e-4)


def test_the_stock_model_differs_without_the_mode():
    model, x = Small(), torch.randn(9, 37, 96)
    with torch.inference_mode():
        whole = model(x)
        assert (
            sum(count_unequal(model(x[:2, :n]), whole[:2, :n]) for n in (1, 7, 11, 20)) > 0
        )  # else the test above proves nothing


def test_an_unproven_reduction_raises_and_is_only_noted_when_not_strict():
    x = torch.randn(4, 5, 6)
    with invariant(), pytest.raises(UnprovenReduction, match=r"aten\.sum\.dim_IntList.*4, 5, 6"):
        x.sum(1)
    with invariant(), pytest.raises(UnprovenReduction, match="logsumexp"):
        torch.logsumexp(x, -1)
    with invariant(), pytest.raises(UnprovenReduction, match="layer_norm"):
        F.layer_norm(x, (6,))
    with invariant(strict=False) as audit:
        x.sum(1)
    assert audit.unproven == {"aten.sum.dim_IntList": 1}
    with invariant() as audit:
        assert int(torch.arange(5).sum()) == 10 and x.amax() == x.max()
    assert not audit.unproven and audit.proven


def test_contexts_nest_and_an_exception_restores_everything():
    x, w = torch.randn(5, 64), torch.randn(32, 64)
    plain = F.linear(x, w)
    with invariant() as outer:
        with invariant() as inner:
            F.linear(x, w)
        before = dict(outer.replaced)
        F.linear(x, w)
        assert sum(outer.replaced.values()) == sum(before.values()) + 1 and sum(inner.replaced.values()) == 1
        with pytest.raises(KeyError), invariant():
            raise KeyError("inside")
        F.linear(x, w)
        assert sum(outer.replaced.values()) == sum(before.values()) + 2
    assert torch._C._len_torch_dispatch_stack() == 0
    assert count_unequal(F.linear(x, w), plain) == 0
    x.sum(0)  # the auditor is gone


def test_other_threads_are_not_touched():
    seen, ready, done = [], threading.Event(), threading.Event()

    def other():
        ready.wait(10)
        torch.randn(3, 4).sum(0)  # would raise under the auditor
        seen.append(torch._C._len_torch_dispatch_stack())
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with invariant():
        ready.set()
        assert done.wait(10)
    thread.join(10)
    assert seen == [0]


def test_replacements_agree_with_float64():
    x, w, b = torch.randn(7, 50), torch.randn(33, 50), torch.randn(33)
    a, c = torch.randn(3, 5, 20), torch.randn(3, 20, 6)
    with invariant():
        results = [
            (F.linear(x, w, b), F.linear(x.double(), w.double(), b.double())),
            (torch.bmm(a, c), (a.double()[..., None] * c.double()[:, None]).numpy().sum(2)),
            (x.mean(-1), x.numpy().astype("float64").mean(-1)),
            (x.softmax(-1).sum(-1), torch.ones(7)),
        ]
    for got, want in results:
        assert torch.allclose(got.double(), torch.as_tensor(want).double(), atol=1e-4)
