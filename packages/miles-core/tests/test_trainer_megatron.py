"""The `megatron` backend on megatron-core itself: the float64 oracle, the engine's bits, checkpoints across layouts."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("megatron.core", reason='needs "miles-core[megatron]"')

from miles_core.trainer.base import NonFiniteStep, Trainer
from miles_core.trainer.conformance import BFLOAT16, CASES, Case, Layout, Tolerance, check, expected, run
from miles_core.trainer.conformance.backends import fsdp, megatron
from miles_core.trainer.conformance.worker import perform
from miles_core.trainer.hashing import combined_hash
from miles_core.trainer.megatron import attention as megatron_attention
from miles_core.trainer.megatron.aligned import AlignedMLP
from miles_core.trainer.megatron.config import Cut
from miles_core.trainer.megatron.convert import hf_to_megatron, megatron_to_hf
from miles_core.trainer.megatron.model import MegatronModel
from miles_core.trainer.megatron.standins import on_device
from miles_core.trainer.megatron.stream import Stream, Work
from miles_kernels.nn.checkpoint import iter_tensors, random_decoder, save_decoder, write_model
from miles_kernels.nn.decoder import CORRECTION, Decoder
from miles_kernels.ops.attention import attention, packed_plan
from miles_kernels.ops.norm import rms_norm
from miles_kernels.ops.rope import apply_rope

MEGATRON = "miles_core.trainer.conformance.backends:megatron"
PLAIN = {"layers": "plain"}


def layout(name: str, num_processes: int = 2, megatron: dict[str, Any] | None = None, **options: Any) -> Layout:
    return Layout(name, num_processes, options | {"megatron": megatron or {}})


PLAN = ["dense dp2", "dense tp2-fused", "gspo cp2-fused", "untied tp2-plain", "moe cp2ep2", "moe tp2ep2", "moe ep2-plain"]
PLAN += ["idle pp2-plain", "glm tp2ep2"]
CHECKPOINTS = [("dense", "pp2", "tp2"), ("moe", "ep2", "pp2"), ("moe", "tp2", "ep2")]
"""(case, layout that saves, layout that loads)"""
FUSED = megatron_attention.fused_op
ALONE = layout("alone", 1)
LAYOUTS = {
    each.name: each
    for each in (
        layout("dp2"),
        layout("tp2", megatron={"tp": 2, "vocab_multiple": 8}),
        layout("pp2", megatron={"pp": 2}),
        layout("cp2", cp=2),
        layout("cp2-fused", cp=2, fused=True),
        layout("tp2-fused", megatron={"tp": 2}, fused=True),
        layout("ep2", ep=2),
        layout("cp2ep2", cp=2, ep=2),
        layout("tp2ep2", ep=2, megatron={"tp": 2}),
        layout("tp2-plain", megatron={"tp": 2, "vocab_multiple": 8, **PLAIN}),
        layout("pp2-plain", megatron={"pp": 2, **PLAIN}),
        layout("ep2-plain", ep=2, megatron=PLAIN),
    )
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def unequal(a: Tensor, b: Tensor) -> int:
    return int((a.view(torch.int32) != b.view(torch.int32)).sum())


@pytest.mark.parametrize("name", ["dense", "untied", "moe", "glm", "sft", "gspo", "idle"])
def test_one_process(name: str) -> None:
    """The oracle's loss, gradient norm, log-probabilities and update, and the `fsdp` backend's log-probabilities to the bit."""
    result = perform(megatron, CASES[name], layout("padded", 1, megatron={"vocab_multiple": 16}))
    assert check(result, expected(result.case), Tolerance()) == []
    assert unequal(result.logprob, perform(fsdp, CASES[name], Layout("alone")).logprob) == 0


@pytest.mark.parametrize("name", ["untied", "moe"])
def test_plain_layers_have_the_numbers_but_not_the_bits(name: str) -> None:
    result = perform(megatron, CASES[name], layout("plain", 1, megatron=PLAIN))
    assert check(result, expected(result.case), Tolerance()) == []
    assert unequal(result.logprob, perform(fsdp, CASES[name], Layout("alone")).logprob) > 0
    trainer = megatron(CASES[name].decoder(), CASES[name], {"megatron": PLAIN})
    assert trainer.contract.digest != CASES[name].decoder().contract.digest  # so that no engine is taken for its equal


def test_the_suite_notices_a_wrong_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a feed-forward layer whose gradient is a tenth too small."""
    forward = AlignedMLP.forward
    monkeypatch.setattr(AlignedMLP, "forward", lambda self, x, *a, **k: (_scaled_gradient(forward(self, x)[0]), None))
    result = perform(megatron, CASES["dense"], ALONE)
    assert any("gradient norm" in text for text in check(result, expected(result.case), Tolerance()))


def _scaled_gradient(x: Tensor) -> Tensor:
    return x.detach() + 0.9 * (x - x.detach())


def saving(decoder: Decoder, case: Case, options: dict[str, Any]) -> Trainer:
    """A trainer that starts from a checkpoint ("load"), leaves one behind when it exports ("save"), or takes a GPU's way."""
    megatron_attention.fused_op = (lambda x: fused_on_cpu) if options.pop("fused", False) else FUSED
    save, load = options.pop("save", None), options.pop("load", None)
    trainer = megatron(decoder, case, options)
    if load is not None:
        trainer.load(Path(load))
    if save is not None:
        export = trainer.export_weights

        def export_and_save() -> Iterator[tuple[str, Tensor]]:
            trainer.save(Path(save))
            return export()

        trainer.export_weights = export_and_save  # type: ignore[method-assign]
    return trainer


def test_two_processes_in_every_layout_and_checkpoints_between_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle; the bits of one process wherever layers are aligned; and a checkpoint of one layout read by another."""
    plan = [(CASES[name], LAYOUTS[where]) for name, where in map(str.split, PLAN)]
    for name, where, other in CHECKPOINTS:
        first, second, place = LAYOUTS[where], LAYOUTS[other], str(tmp_path / where)
        plan.append((CASES[name], replace(first, options=first.options | {"save": place})))
        plan.append((CASES[name], replace(second, options=second.options | {"load": place})))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
    wrong, results = [], run(f"{Path(__file__).stem}:saving", plan, tmp_path / "runs")
    logs = [log.read_text() for log in (tmp_path / "runs").rglob("*.log")]
    assert len(logs) == 2 and not any("still held" in text for text in logs), logs  # each has left its groups
    alone = {name: perform(megatron, CASES[name], ALONE) for name in {result.case.name for result in results}}
    for result in results:
        if "load" not in result.layout.options:
            wrong += check(result, expected(result.case), Tolerance())
            if "plain" not in result.layout.name and unequal(result.logprob, alone[result.case.name].logprob):
                wrong.append(f"{result.case.name} on {result.layout.name}: other bits than with one process")
    assert wrong == []
    for name, where, other in CHECKPOINTS:
        there = next(r for r in results if (r.case.name, r.layout.name) == (name, other) and "load" in r.layout.options)
        here = perform(saving, CASES[name], layout("alone", 1, load=str(tmp_path / where)))  # saved on two, loaded on one
        assert here.refusals == there.refusals[:0] == () and not any(there.refusals)
        assert unequal(here.logprob, there.logprob) == 0
        assert here.metrics["train/loss"] == pytest.approx(there.metrics["train/loss"], abs=1e-6)
        assert unequal(here.logprob, alone[name].logprob) > 0  # it did load something


def fused_on_cpu(qkv: Tensor, norms: Tensor | None, cos: Tensor, sin: Tensor, plan: Any, sizes: Any) -> Tensor:
    """The interface of `miles_kernels.cuda.qkv.attention_of` out of the CPU's ops, in the decoder's order."""
    heads, kv_heads, scale, window, eps = sizes
    parts = qkv.view(len(qkv), heads + 2 * kv_heads, -1)
    qk, v = parts.split((heads + kv_heads, kv_heads), dim=1)
    if norms is not None:
        qk = rms_norm(qk, norms.index_select(0, torch.tensor([0] * heads + [1] * kv_heads)), eps)
    q, k = apply_rope(qk, cos, sin).split((heads, kv_heads), dim=1)
    return attention(q, k.transpose(0, 1), v.transpose(0, 1), plan, scale=scale, window=window)


@pytest.mark.parametrize("name", ["dense", "untied", "glm"])
def test_the_way_of_a_gpu_in_one_process(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Order of heads, norms and rotation on the fused way, and their gradients."""
    monkeypatch.setattr(megatron_attention, "fused_op", lambda x: fused_on_cpu)
    result = perform(megatron, CASES[name], ALONE)
    assert check(result, expected(result.case), Tolerance()) == []
    assert unequal(result.logprob, perform(fsdp, CASES[name], Layout("alone")).logprob) == 0


def test_a_resumed_process_takes_the_same_next_step(tmp_path: Path) -> None:
    case = CASES["dense"]
    trainer, batch = megatron(case.decoder(), case, {}), case.batch()
    trainer.step(batch)
    trainer.save(tmp_path / "checkpoint")
    stats, weights = trainer.step(batch), {name: tensor.clone() for name, tensor in trainer.export_weights()}
    again = megatron(case.decoder(), case, {})
    again.load(tmp_path / "checkpoint")
    assert again.num_updates == 1 and again.step(batch) == stats
    assert all(torch.equal(tensor, weights[name]) for name, tensor in again.export_weights())
    kl = replace(case, algorithm=case.algorithm | {"kl_coef": 0.1})
    with pytest.raises(ValueError, match="reference is"):
        megatron(kl.decoder(), kl, {}).load(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / "megatron" / "metadata.json").unlink()
    with pytest.raises(ValueError, match="no megatron checkpoint"):
        again.load(tmp_path / "checkpoint")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_leaves_between_steps_comes_back(dtype: torch.dtype) -> None:
    case = replace(CASES["moe"], algorithm=CASES["moe"].algorithm | {"kl_coef": 0.1})
    made = [megatron(random_decoder(case.decoder().config, 3, dtype=dtype), case, {}) for _ in range(2)]
    stayed, moved = made
    for step in range(3):
        moved.offload()
        moved.offload(["weights"])
        left = moved.mover.regions["weights"].tensors()
        assert not any(weight.untyped_storage().nbytes() for weight in left)
        assert set(moved.mover.away) == {"masters", "moments", "weights", "gradients", "reference"}
        if step:
            assert torch.equal(moved.forward_logprobs(case.batch()), stayed.forward_logprobs(case.batch()))
        assert moved.step(case.batch()) == stayed.step(case.batch())
    moved.offload()
    kept = dict(stayed.export_weights())
    assert all(torch.equal(tensor, kept[name]) for name, tensor in moved.export_weights())
    with pytest.raises(ValueError, match="unknown memory tag 'optimizer'"):
        moved.offload(["optimizer"])


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    case = CASES["dense"]
    decoder = case.decoder()
    with torch.no_grad():
        decoder.norm[3] = torch.inf
    trainer = megatron(decoder, case, {})
    before = {name: tensor.clone() for name, tensor in trainer.export_weights()}
    with pytest.raises(NonFiniteStep, match="The weights are unchanged"):
        trainer.step(case.batch())
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.export_weights())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"megatron": {"tp": 3}}, "1 processes are no multiple"),
        ({"ep": 2}, "trainer.ep = 2 needs a mixture of experts"),
        ({"replicate": 2}, "only the fsdp backend knows this"),
    ],
)
def test_layouts_that_do_not_fit(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        megatron(CASES["dense"].decoder(), CASES["dense"], options)


def test_without_megatron_core_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron", None)
    monkeypatch.delitem(sys.modules, "miles_core.trainer.megatron.core")
    with pytest.raises(ImportError, match=r'trainer.backend = "megatron" needs megatron-core .* "miles-core\[megatron\]"'):
        importlib.import_module("miles_core.trainer.megatron.core")


def test_cut_names_every_size() -> None:
    with pytest.raises(
        ValueError, match=r"num_key_value_heads = 2 .* num_hidden_layers = 2 is no multiple of trainer.megatron.pp = 3"
    ):
        Cut(tp=4, pp=3).check(CASES["dense"].shape(), 12)
    with pytest.raises(ValueError, match='with a mixture of experts needs trainer.megatron.layers = "aligned"'):
        Cut(tp=2, layers="plain").check(CASES["moe"].shape(), 2)
    assert Cut(tp=2, ep=2).words(4) == (
        "megatron-core with aligned layers: 2 tensor parallel, 2 data parallel; experts over 2 processes"
    )


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe", "glm4_moe"])
def test_conversion_and_transformers_logits(family: str, tmp_path: Path) -> None:
    """A model directory to Megatron and back: the same bits; and transformers' logits, with a padded vocabulary."""
    source = CASES[{"qwen3_moe": "moe", "glm4_moe": "glm"}.get(family, "dense")].shape()
    config = replace(source, family=family, tie_word_embeddings=family == "llama", topk_group=1)
    decoder = random_decoder(config, 5)
    for name, view in decoder.hf_state():
        if name.endswith(CORRECTION):
            view.copy_(torch.linspace(-0.2, 0.2, len(view)))
    save_decoder(decoder, tmp_path / "hf")
    ledger = hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", vocab_multiple=64)
    assert ledger["vocab_rows"] == 64 and len(ledger["hf"]) == len(dict(decoder.hf_state()))
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    assert combined_hash(iter_tensors(tmp_path / "back")) == combined_hash(iter_tensors(tmp_path / "hf"))
    with pytest.raises(ValueError, match="not empty"):
        hf_to_megatron(tmp_path / "hf", tmp_path / "megatron")

    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    tokens = torch.randint(0, config.vocab_size, (21,), generator=torch.Generator().manual_seed(5))  # no experts scored alike
    with torch.no_grad():
        want = theirs(tokens[None]).logits[0]
    for layers in ("aligned", "plain"):
        model = MegatronModel(config, Cut(layers=layers, vocab_multiple=64), decoder.contract, torch.device("cpu"))
        model.load_hf(iter_tensors(tmp_path / "back"))
        assert (logits(model, tokens) - want).abs().max() < 1e-4
    ledger["megatron"]["decoder.final_layernorm.weight"]["xxh3"] = "0" * 16
    (tmp_path / "megatron" / "ledger.json").write_text(json.dumps(ledger))
    with pytest.raises(ValueError, match="decoder.final_layernorm.weight"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "never")


def test_a_bf16_glm_is_converted_with_its_corrections_in_float32_and_its_draft_left_out(tmp_path: Path) -> None:
    decoder = random_decoder(CASES["glm"].shape(), 5, dtype=torch.bfloat16)
    tensors = dict(decoder.hf_state()) | {"model.layers.3.eh_proj.weight": torch.zeros(2, dtype=torch.bfloat16)}
    config = decoder.config.to_hf(dtype="bfloat16") | {"num_nextn_predict_layers": 1}
    write_model(tmp_path / "hf", tensors, config)
    ledger = hf_to_megatron(tmp_path / "hf", tmp_path / "megatron", dtype=torch.bfloat16)
    assert ledger["left_out"] == ["model.layers.3.eh_proj.weight"]
    kept = {name for name, entry in ledger["megatron"].items() if entry["dtype"] == "float32"}
    assert kept == {f"decoder.layers.{layer}.mlp.router.expert_bias" for layer in (1, 2)}
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back")
    back = dict(iter_tensors(tmp_path / "back"))
    assert all(torch.equal(tensor, back[name]) and tensor.dtype is back[name].dtype for name, tensor in decoder.hf_state())


def test_a_router_that_plain_layers_do_not_know_is_refused_by_name() -> None:
    case = CASES["glm"]
    with pytest.raises(ValueError, match=r"does not know groups judged by their two best .*; use \"aligned\""):
        megatron(case.decoder(), case, {"megatron": PLAIN})
    raw = replace(case, model=case.model | {"topk_group": 1, "norm_topk_prob": False})
    with pytest.raises(ValueError, match="does not know norm_topk_prob = false"):
        megatron(raw.decoder(), raw, {"megatron": PLAIN})
    fits = replace(case, model=case.model | {"topk_group": 1})
    result = perform(megatron, fits, layout("plain", 1, megatron=PLAIN))
    assert check(result, expected(fits), Tolerance()) == []


def logits(model: MegatronModel, tokens: Tensor) -> Tensor:
    """[L, V] of one sequence."""
    cos, sin = model.rope.rows(torch.arange(len(tokens)))
    stream = Stream(qkv_format="thd", lengths=(len(tokens),), cos=cos, sin=sin, plan=packed_plan([len(tokens)], [-1])[0])
    none = torch.zeros(0, dtype=torch.int64)
    work = Work(micro=None, token_ids=tokens, stream=stream, rows=none, local=none)
    with torch.no_grad(), on_device(torch.device("cpu")):
        hidden = model.hidden(model.module, work).squeeze(1)
    head = "model.embed_tokens.weight" if model.config.tie_word_embeddings else "lm_head.weight"
    return hidden @ dict(model.export_hf())[head].T


@pytest.mark.gpu
def test_one_gpu() -> None:
    """bfloat16: the oracle for dense models, the `fsdp` backend's log-probabilities bit for bit for both."""
    for name in ("wide", "wide-moe"):
        case = CASES[name].on("cuda", "bfloat16")
        mine, plain = perform(megatron, case, ALONE), perform(megatron, case, layout("plain", 1, megatron=PLAIN))
        other = perform(fsdp, case, Layout("alone"))
        print(name, "aligned unequal", unequal(mine.logprob, other.logprob), "of", mine.logprob.numel(), mine.refusals)
        print(name, "plain unequal", unequal(plain.logprob, other.logprob), "max", (plain.logprob - other.logprob).abs().max())
        if name == "wide":
            assert check(mine, expected(case), BFLOAT16) + check(plain, expected(case), BFLOAT16) == []
        assert unequal(mine.logprob, other.logprob) == 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "layouts"),
    [
        ("wide", ("dp2", "tp2", "pp2", "cp2", "tp2-plain", "pp2-plain")),
        ("wide-moe", ("dp2", "tp2", "tp2ep2", "pp2", "cp2", "ep2", "cp2ep2", "ep2-plain")),
    ],
)
def test_two_gpus_in_every_layout(name: str, layouts: tuple[str, ...], tmp_path: Path) -> None:
    """bfloat16 over NCCL: the log-probabilities of one GPU bit for bit, and for dense models the oracle."""
    case = CASES[name].on("cuda", "bfloat16")
    mine = perform(megatron, case, ALONE)
    wrong = []
    for result in run(MEGATRON, [(case, LAYOUTS[each]) for each in layouts], tmp_path, deadline_s=180):
        where = f"{name} {result.layout.name}"
        if any(result.refusals):
            wrong.append(f"{where}: {result.refusals}")
            continue
        count = unequal(result.logprob, mine.logprob)
        largest = float((result.logprob - mine.logprob).abs().max())
        norms = result.metrics["train/grad_norm"], mine.metrics["train/grad_norm"]
        print(where, "unequal", count, "of", mine.logprob.numel(), "max", largest, "grad norms", *norms, flush=True)
        wrong += check(result, expected(case), BFLOAT16) if name == "wide" else []
        if "plain" not in where and (count or norms[0] != pytest.approx(norms[1], rel=5e-3)):
            wrong.append(f"{where}: {count} log-probabilities differ from one GPU's, gradient norms {norms}")
    assert wrong == []
