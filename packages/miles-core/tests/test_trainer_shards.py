"""What is computed on shards: the update, rounding by chance, the vocabulary in slices, stretches of weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from miles_core.trainer import rounding, table
from miles_core.trainer.config import OptimizerConfig
from miles_core.trainer.model import WholeModel
from miles_core.trainer.optim import AdamW, Optimized
from miles_core.trainer.rounding import _kernel_rounds, round_by_chance
from miles_core.trainer.state import read_state, write_state
from miles_core.trainer.streamed import _reading
from miles_core.trainer.table import VocabTable
from miles_core.trainer.weights import Owned, load
from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.config import DecoderConfig
from miles_kernels.ops.embedding import embedding
from miles_kernels.ops.logprob import linear_logprob

TINY = DecoderConfig(
    family="qwen3",
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
)


@pytest.mark.parametrize("stochastic", [False, True])
def test_an_update_does_not_depend_on_the_cut(stochastic: bool) -> None:
    """Whole, and as three uneven stretches: the same bits after several updates."""
    dtype = torch.bfloat16 if stochastic else torch.float32
    start, cuts = torch.randn(37, 13).to(dtype), [(0, 1), (1, 21), (21, 37)]
    cfg = OptimizerConfig(lr=0.01, weight_decay=0.1)
    whole = torch.nn.Parameter(start.clone())
    parts = [torch.nn.Parameter(start[a:b].clone()) for a, b in cuts]
    one = AdamW([Optimized("w", whole)], cfg, stochastic=stochastic)
    many = [AdamW([Optimized("w", p, first=a * 13)], cfg, stochastic=stochastic) for p, (a, _) in zip(parts, cuts, strict=True)]
    for _ in range(8):
        gradient = torch.randn(37, 13)
        one.step([gradient])
        for optimizer, (a, b) in zip(many, cuts, strict=True):
            optimizer.step([gradient[a:b].clone()])
    assert torch.equal(whole, torch.cat(list(parts)))
    assert torch.equal(one.exp_avg_sq[0], torch.cat([optimizer.exp_avg_sq[0] for optimizer in many]))
    assert not torch.equal(whole, start)


def test_rounding_by_chance_is_right_on_average_and_keeps_what_is_exact() -> None:
    low = torch.tensor(1.0)
    high = torch.tensor(1.0 + 2**-7)
    wide = (low + 0.3 * (high - low)).expand(200_000).contiguous()
    rounded = round_by_chance(wide, key=5).float()
    assert set(rounded.unique().tolist()) == {float(low), float(high)}
    assert float((rounded == high).float().mean()) == pytest.approx(0.3, abs=0.01)
    exact = torch.randn(10_000).bfloat16()
    assert torch.equal(round_by_chance(exact.float(), key=1), exact)
    assert not torch.equal(round_by_chance(wide, key=6), round_by_chance(wide, key=5))


def test_weights_are_widened_in_groups_without_a_trace() -> None:
    """Those that fit beside the largest go together; the numbers are those of weights alone."""
    start = [torch.randn(size).bfloat16() for size in ((9, 8), (3, 8), (4, 8), (2, 8), (5,), (7, 8))]
    gradients = [torch.randn(w.shape) for w in start]

    def updated(chosen: list[int]) -> list[torch.Tensor]:
        held = [start[i].clone() for i in chosen]
        optimizer = AdamW([(f"w{i}", w) for i, w in zip(chosen, held, strict=True)], OptimizerConfig(lr=0.1), stochastic=True)
        assert max(len(group) for group in optimizer._rounds(range(len(held)))) == min(3, len(held))
        optimizer.step([gradients[i] for i in chosen])
        return held

    together = updated(list(range(6)))
    assert all(torch.equal(updated([i])[0], together[i]) for i in range(6))
    assert not any(torch.equal(w, before) for w, before in zip(together, start, strict=True))


@pytest.mark.parametrize("broken", [None, RuntimeError("no compiler"), "other bits"])
def test_a_rounding_kernel_serves_only_with_the_bits_of_the_operations(broken: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def kernel(wide: torch.Tensor, key: int, first: int, out: torch.Tensor) -> None:
        if isinstance(broken, Exception):
            raise broken
        rounding._round_plainly(wide, key, first + (broken is not None), out)

    monkeypatch.setattr(rounding, "_round_on_cuda", kernel)
    assert _kernel_rounds.__wrapped__(torch.device("cpu")) is (broken is None)


@pytest.mark.gpu
def test_rounding_on_a_gpu_has_the_bits_of_the_cpu() -> None:
    assert _kernel_rounds(torch.device("cuda", 0))
    for key, first, count in ((5, 0, 100_003), (3 << 32 | 1, 1, 1), (2**64 - 9, 2**33 + 7, 4097)):
        wide = torch.randn(count) * torch.randn(count).exp()
        assert torch.equal(round_by_chance(wide.cuda(), key, first).cpu(), round_by_chance(wide, key, first))
    assert not torch.equal(round_by_chance(wide.cuda(), key + 1, first).cpu(), round_by_chance(wide, key, first))


def test_rounding_to_nearest_would_lose_small_updates() -> None:
    """Why rounding by chance: 200 updates far below half a bfloat16 step arrive on average, and not at all to nearest."""
    weight = torch.ones(20_000, dtype=torch.bfloat16)
    near = weight.clone()
    for update in range(200):
        weight = round_by_chance(weight.float() + 1e-4, key=update)
        near = (near.float() + 1e-4).bfloat16()
    assert float(weight.float().mean()) == pytest.approx(1.02, abs=2e-3)
    assert float(near.float().mean()) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_vocabulary_in_slices_gives_the_bits_of_the_whole(dtype: torch.dtype, temperature: float) -> None:
    """More than two chunks of 4,096 rows: log-probability, entropy and every gradient."""
    vocab, width, rows = 9000, 32, 7
    whole = (torch.randn(vocab, width) * 0.3).to(dtype).requires_grad_()
    table = VocabTable(whole, dtype, dtype, None, None)
    targets = torch.randint(0, vocab, (rows,))
    ours, theirs = (torch.randn(rows, width, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_() for _ in "ab")
    expected = linear_logprob(theirs, whole, targets, temperature)
    found = table.logprob(ours, targets, temperature)
    assert torch.equal(found.logprob, expected.logprob)
    assert expected.entropy is not None and found.entropy is not None and torch.equal(found.entropy, expected.entropy)
    with torch.no_grad():
        assert torch.equal(table.logprob(ours, targets, temperature).logprob, expected.logprob)
    share = torch.rand(rows)
    for out in (expected, found):
        ((out.logprob * share).sum() + 0.1 * (out.entropy * share).sum()).backward()
    assert torch.equal(ours.grad, theirs.grad)
    assert torch.equal(table.weight.grad, whole.grad)


def test_slices_of_any_size_travel_once_and_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.randn(1000, 4)
    slices = table._TableSlices(VocabTable(whole, torch.float32, torch.float32, None, None))
    sent: list[int] = []

    class Arrived:
        def wait(self) -> None: ...

    def broadcast(part: torch.Tensor, *_: object, async_op: bool) -> Arrived:
        sent.append(len(part))
        return Arrived()

    monkeypatch.setattr(table, "size_of", lambda group: 2)
    monkeypatch.setattr(table, "broadcast", broadcast)
    cuts = [0, *sorted(torch.randperm(999)[:5].add(1).tolist()), 1000]
    spans = list(zip(cuts, cuts[1:], strict=False))
    for number, ((start, stop), part) in enumerate(_reading(slices, spans)):
        assert torch.equal(part, whole[start:stop])
        assert len(sent) == min(number + 2, len(spans))  # the next one is on its way
    assert sent == [stop - start for start, stop in spans]
    slices.read(0, 10, (10, 20))
    with pytest.raises(AssertionError, match="announced"):
        slices.read(10, 30)


def test_rows_of_a_table_are_those_of_the_embedding() -> None:
    whole = torch.randn(50, 8, requires_grad=True)
    table = VocabTable(whole, torch.float32, torch.float32, None, None)
    ids = torch.tensor([3, 3, 49, 0])
    for out in (table.rows(ids), embedding(ids, whole)):
        (out * torch.arange(32.0).view(4, 8)).sum().backward()
    assert torch.equal(table.rows(ids), whole[ids]) and torch.equal(table.weight.grad, whole.grad)


def test_stretches_are_read_and_written_where_they_lie() -> None:
    model = WholeModel(random_decoder(TINY, 0))
    weights = model.weights()
    for piece, (name, tensor) in zip(model.slices, model.decoder.hf_state(), strict=True):
        assert piece.name == name
        assert torch.equal(weights[piece.owner].read(piece.offset, piece.shape, torch.float32), tensor)
    other = dict(random_decoder(TINY, 1).hf_state())
    load(model.slices, weights, other.items(), "qwen3")
    assert all(torch.equal(tensor, other[name]) for name, tensor in model.decoder.hf_state())


def test_a_stretch_takes_only_what_lies_in_it() -> None:
    local = torch.zeros(2, 4)
    owned = Owned("w", (5, 4), local, ((4, 12),), None)
    owned.write(0, torch.arange(20.0).view(5, 4))
    assert torch.equal(local, torch.arange(4.0, 12.0).view(2, 4))
    owned.write(12, torch.full((8,), -1.0))
    assert torch.equal(local, torch.arange(4.0, 12.0).view(2, 4))


def test_weights_that_do_not_fit_are_named() -> None:
    model = WholeModel(random_decoder(TINY, 0))
    tensors = dict(model.decoder.hf_state())
    tensors.pop("model.norm.weight")
    tensors["strange"] = torch.zeros(1)
    tensors["lm_head.weight"] = torch.zeros(3)
    with pytest.raises(
        ValueError, match=r"missing model.norm.weight; .*misshaped lm_head.weight: \[3\] instead.*; unexpected strange"
    ):
        load(model.slices, model.weights(), tensors.items(), "qwen3")


def test_state_goes_into_files_of_bounded_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miles_core.trainer.state.MAX_FILE_BYTES", 8000)
    model, other = WholeModel(random_decoder(TINY, 0)), WholeModel(random_decoder(TINY, 1))
    one, two = (AdamW(each.optimized(), OptimizerConfig(lr=0.1)) for each in (model, other))
    one.step([torch.randn_like(weight) for weight in one.held])
    write_state(tmp_path, model, one, {"schema": 1}, writer=True)
    assert len(list(tmp_path.glob("optimizer-*-of-*.safetensors"))) > 2
    assert len(list((tmp_path / "model").glob("model-*-of-*.safetensors"))) > 1
    read_state(tmp_path, other, two)
    assert all(torch.equal(a, b) for a, b in zip(one.state().values(), two.state().values(), strict=True))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(model.export(), other.export(), strict=True))
    next(iter(tmp_path.glob("optimizer-00001-*"))).unlink()
    with pytest.raises(ValueError, match="is missing"):
        read_state(tmp_path, other, two)
