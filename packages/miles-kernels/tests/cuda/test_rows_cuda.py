"""Norm, rotation, SwiGLU, router, embedding on a GPU against float64 or naive oracles; opcheck; compiled equals eager."""

import pytest
import torch

from miles_kernels.ops.rope import RopeTable
from miles_kernels.testing import count_unequal

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def _gpu():
    pytest.importorskip("triton")
    torch.manual_seed(int.from_bytes(__name__.encode()[:2], "big"))


def randn(*shape, dtype=torch.bfloat16):
    return torch.randn(shape, device="cuda", dtype=torch.float32).to(dtype)


def relative(got, want):
    return float((got.double() - want.double()).norm() / want.double().norm())


def oracle_norm(x, weight, eps):
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + eps).sqrt() * weight.double()


@pytest.mark.parametrize("shape", [(37, 4096), (5, 1000), (300, 128), (11, 7168)])
def test_rms_norm_and_its_gradient_match_float64(shape):
    from miles_kernels.cuda.norm import rms_norm

    x, w = randn(*shape).requires_grad_(), randn(shape[1]).requires_grad_()
    out = rms_norm(x, w, 1e-6)
    cotangent = randn(*shape)
    grads = torch.autograd.grad(out, (x, w), cotangent)
    x64, w64 = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    want = oracle_norm(x64, w64, 1e-6)
    wants = torch.autograd.grad(want, (x64, w64), cotangent.double())
    assert relative(out, want) < 5e-3
    assert all(relative(a, b) < 1e-2 for a, b in zip(grads, wants, strict=True))
    assert relative(out + 0.01 * want.abs().mean(), want) > 5e-3  # negative control


def test_add_norm_is_add_then_norm_bitwise_and_its_gradient_matches():
    from miles_kernels.cuda.norm import add_rms_norm, rms_norm

    x, r, w = randn(65, 1024).requires_grad_(), randn(65, 1024).requires_grad_(), randn(1024).requires_grad_()
    out, total = add_rms_norm(x, r, w, 1e-6)
    assert count_unequal(total.detach(), (x + r).detach()) == 0
    assert count_unequal(out.detach(), rms_norm((x + r).detach(), w.detach(), 1e-6)) == 0
    g, extra = randn(65, 1024), randn(65, 1024)
    got = torch.autograd.grad((out, total), (x, r, w), (g, extra))
    s64, w64 = (x + r).detach().double().requires_grad_(), w.detach().double().requires_grad_()
    want = torch.autograd.grad((oracle_norm(s64, w64, 1e-6), s64 * 1.0), (s64, w64), (g.double(), extra.double()))
    assert relative(got[0], want[0]) < 1e-2 and relative(got[1], want[0]) < 1e-2 and relative(got[2], want[1]) < 1e-2


@pytest.mark.parametrize("heads", [8, 12])
def test_head_norm_and_its_gradient(heads):
    from miles_kernels.cuda.norm import rms_norm

    x, w = randn(200, heads, 128).requires_grad_(), randn(heads, 128).requires_grad_()
    cotangent = randn(200, heads, 128)
    out = rms_norm(x, w, 1e-6)
    got = torch.autograd.grad(out, (x, w), cotangent)
    x64, w64 = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    want = oracle_norm(x64, w64, 1e-6)
    wants = torch.autograd.grad(want, (x64, w64), cotangent.double())
    assert relative(out, want) < 5e-3
    assert all(relative(a, b) < 1e-2 for a, b in zip(got, wants, strict=True))


def test_rope_turns_like_complex_numbers_and_back():
    from miles_kernels.cuda.rope import apply_rope

    table = RopeTable(128, 10_000.0, device="cuda")
    cos, sin = table.rows(torch.randint(4096, (77,), device="cuda"))
    x = randn(77, 10, 128)
    out = apply_rope(x, cos, sin)
    pairs = torch.complex(x[..., :64].double(), x[..., 64:].double())
    turned = pairs * torch.complex(cos[..., :64].double(), sin[..., 64:].double())
    assert relative(out, torch.cat((turned.real, turned.imag), -1)) < 5e-3
    assert relative(apply_rope(out, cos, -sin), x) < 1e-2
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(apply_rope(leaf, cos, sin), leaf, out)
    assert relative(grad, x) < 1e-2


def test_swiglu_and_its_gradient_match_float64():
    from miles_kernels.cuda.act import swiglu

    x = randn(33, 3000).requires_grad_()
    g = randn(33, 1500)
    out = swiglu(x)
    (dx,) = torch.autograd.grad(out, x, g)
    x64 = x.detach().double().requires_grad_()
    gate, up = x64.chunk(2, -1)
    want = torch.nn.functional.silu(gate) * up
    assert relative(out, want) < 5e-3
    assert relative(dx, torch.autograd.grad(want, x64, g.double())[0]) < 1e-2


@pytest.mark.parametrize("normalize", [True, False])
def test_router_matches_a_stable_sort_and_autograd(normalize):
    from miles_kernels.cuda.router import route

    logits = torch.randint(-8, 8, (500, 100), device="cuda").float().div(4).requires_grad_()  # many ties
    ids, weights = route(logits, 6, normalize=normalize)
    want_ids = torch.sort(logits.detach(), dim=1, descending=True, stable=True).indices[:, :6]
    assert count_unequal(ids, want_ids) == 0
    p = logits.detach().double().requires_grad_()
    want = p.softmax(-1).gather(1, want_ids)
    want = want / want.sum(-1, keepdim=True) if normalize else want
    g = torch.randn_like(weights)
    (got,) = torch.autograd.grad(weights, logits, g)
    assert relative(weights, want) < 1e-6
    assert relative(got, torch.autograd.grad(want, p, g.double())[0]) < 1e-5


def test_embedding_gradient_is_the_sum_in_token_order():
    from miles_kernels.cuda.embedding import embedding

    weight = randn(50, 300).requires_grad_()
    ids = torch.randint(20, (400,), device="cuda")
    out = embedding(ids, weight)
    assert count_unequal(out, weight.detach()[ids]) == 0
    g = randn(400, 300)
    grads = [torch.autograd.grad(embedding(ids, weight), weight, g)[0] for _ in range(3)]
    want = torch.zeros(50, 300, dtype=torch.float32, device="cuda")
    for row, token in enumerate(ids.tolist()):  # the order that is promised
        want[token] += g[row].float()
    assert count_unequal(grads[0], want.to(torch.bfloat16)) == 0
    assert all(count_unequal(grads[0], other) == 0 for other in grads[1:])


def ops():
    from miles_kernels.cuda import act, attention_op, embedding, norm, rope, router  # noqa: F401
    from miles_kernels.cuda.attention import KVBatch

    b = KVBatch.packed([30, 50])
    q, k, v = (randn(80, h, 64).requires_grad_() for h in (4, 2, 2))
    x, w = randn(20, 256).requires_grad_(), randn(256).requires_grad_()
    cos, sin = (randn(20, 64, dtype=torch.float32) for _ in range(2))
    space = torch.ops.miles_cuda
    return {
        "rms_norm": (space.rms_norm, (x, w, 1e-6)),
        "add_rms_norm": (space.add_rms_norm, (x, randn(20, 256).requires_grad_(), w, 1e-6)),
        "rope": (space.rope, (randn(20, 3, 64).requires_grad_(), cos, sin, False)),
        "swiglu": (space.swiglu, (x,)),
        "route": (space.route, (randn(20, 16, dtype=torch.float32), 4, True)),
        "embedding": (space.embedding, (torch.randint(9, (20,), device="cuda"), randn(9, 64).requires_grad_())),
        "attention": (space.attention, (q, k, v, b.cu_q, b.kv_len, b.kv_start, None, 0, 50, 50, 0.125, None)),
    }


@pytest.mark.parametrize("name", ["rms_norm", "add_rms_norm", "rope", "swiglu", "route", "embedding", "attention"])
def test_opcheck(name):
    op, args = ops()[name]
    assert set(torch.library.opcheck(op.default, args).values()) == {"SUCCESS"}


def test_compiled_equals_eager_bitwise_or_is_refused():
    from miles_kernels.cuda.act import swiglu
    from miles_kernels.cuda.norm import rms_norm
    from miles_kernels.mode import CompiledDiffers, compile_aligned

    x, w = randn(50, 512), randn(512)

    def block(x):
        return swiglu(rms_norm(x, w, 1e-6) * 1.5 + x) - 0.25

    with torch.no_grad():
        assert count_unequal(compile_aligned(block)(x), block(x)) == 0
        loose = compile_aligned(block, options={"emulate_precision_casts": False})  # rounds less often than eager
        with pytest.raises(CompiledDiffers, match="elements"):
            loose(x)
