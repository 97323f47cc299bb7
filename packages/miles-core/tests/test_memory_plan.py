"""The plan's formulas against the module on the meta device, against what autograd keeps, and against arithmetic by hand."""

from __future__ import annotations

import random
import shlex
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.cli.app import main
from miles_core.config.load import load_config
from miles_core.memory.activations import kept_per_token
from miles_core.memory.check import require_room
from miles_core.memory.fake import FakeDevice
from miles_core.memory.jobs import job_of_run, job_of_shape, with_settings
from miles_core.memory.knobs import knobs, lighter, remedies
from miles_core.memory.parameters import count_draft, count_parameters, count_rank, engine_ranks
from miles_core.memory.plan import FRAGMENTATION, Job, make_plan
from miles_core.memory.shapes import GIB, SHAPES, find_device, find_shape
from miles_core.memory.show import plan_text, reasons_text, verdict
from miles_core.trainer.batch import TrainBatch
from miles_core.trainer.config import OptimizerConfig, TrainerConfig
from miles_core.trainer.fsdp import FsdpTrainer
from miles_core.trainer.testing import random_samples
from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.config import DecoderConfig, Family, RopeConfig
from miles_kernels.nn.decoder import Decoder, PackedKV
from miles_kernels.nn.parallel import local_config
from miles_kernels.ops.attention import packed_plan

MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
BIASED = DecoderConfig(
    family="llama", vocab_size=77, hidden_size=24, intermediate_size=40, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=6, attention_bias=True, mlp_bias=True,
)  # fmt: skip
MIXED = DecoderConfig(
    family="qwen3_moe", vocab_size=77, hidden_size=24, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=6, decoder_sparse_step=2, mlp_only_layers=(3,), **MOE,
)  # fmt: skip
GLM = {
    **MOE, "shared_intermediate_size": 128, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "attention_bias": True,
    "use_qk_norm": True, "norm_topk_prob": True, "rope": RopeConfig(partial_rotary_factor=0.5),
}  # fmt: skip


@pytest.mark.parametrize("shape", [*SHAPES.values(), BIASED, MIXED], ids=[*SHAPES, "biases", "mixed layers"])
def test_weights_are_counted_exactly(shape: DecoderConfig) -> None:
    module = Decoder(shape, device="meta")
    assert count_parameters(shape).total == sum(weight.numel() for weight in module.parameters())
    largest = max(sum(weight.numel() for weight in layer.parameters()) for layer in module.layers)
    assert count_parameters(shape).largest_layer == largest


@pytest.mark.parametrize("shape", [*map(find_shape, ("qwen3-0.6b", "qwen3-8b", "glm-4.5-air")), BIASED, MIXED])
def test_weights_of_drafts_are_counted_exactly(shape: DecoderConfig) -> None:
    from miles_spec.models import Eagle3Draft, MtpConfig, MtpDraft
    from miles_spec.models.config import Eagle3Config

    for kind, module in (
        ("mtp", MtpDraft(MtpConfig.of(shape), device="meta")), ("eagle3", Eagle3Draft(Eagle3Config.of(shape), device="meta")),
    ):  # fmt: skip
        assert count_draft(shape, kind) == sum(weight.numel() for weight in module.parameters()), kind
    job = Job(shape=shape, device=find_device("h200"), sleep=True)
    bare, drafting = make_plan(job), make_plan(replace(job, draft="mtp"))
    held = {item.name: item.num_bytes for phase in drafting.phases[:2] for item in phase.items}
    count = count_draft(shape, "mtp")
    assert held["engine's draft"] == 2 * count and held["draft"] == 14 * count
    assert {i.name: i.num_bytes for i in drafting.host}["sleeping trainer"] == (
        {i.name: i.num_bytes for i in bare.host}["sleeping trainer"] + 14 * count
    )
    with pytest.raises(ValueError, match="medusa"):
        count_draft(shape, "medusa")


def _kept(shape: DecoderConfig, tokens: int, recompute: bool) -> int:
    """Bytes autograd holds after a forward pass, weights aside, each storage once."""
    module = random_decoder(shape, seed=0)
    module.gradient_checkpointing = recompute
    own = {weight.untyped_storage().data_ptr() for weight in module.parameters()}
    held: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    plan, positions = packed_plan([tokens])
    ids = torch.randint(0, shape.vocab_size, (tokens,))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = module.logprob(module(ids, positions, PackedKV(plan)), ids, 1.0)
    assert out.logprob.requires_grad
    return sum(held.values())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family, moe", [("qwen3", {}), ("qwen3_moe", MOE), ("glm4_moe", GLM)], ids=["dense", "moe", "glm"])
def test_kept_activations_are_what_autograd_holds(family: Family, moe: dict[str, Any], recompute: bool) -> None:
    shape = DecoderConfig(
        family=family, vocab_size=64, hidden_size=96, intermediate_size=224, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, **moe,
    )  # fmt: skip
    counted = (_kept(shape, 384, recompute) - _kept(shape, 128, recompute)) / 256
    assert kept_per_token(shape, 4, recompute=recompute) == pytest.approx(counted, rel=0.05)
    # the control: a formula that forgets a matrix of the feed-forward would be seen
    assert kept_per_token(replace(shape, intermediate_size=160), 4, recompute=False) != pytest.approx(counted, rel=0.05) or moe


def _job(name: str = "qwen3-8b", **changes: object) -> Job:
    return replace(Job(shape=find_shape(name), device=find_device("h200"), kv_bytes=8 << 30), **changes)


def test_published_sizes_of_the_glm_models() -> None:
    """106 and 355 billion in their authors' words."""
    for name, stated in (("glm-4.5-air", 106e9), ("glm-4.5", 355e9)):
        assert count_parameters(find_shape(name)).total == pytest.approx(stated, rel=0.01)


def test_bytes_by_hand() -> None:
    plan = make_plan(_job(num_gpus=4, recompute=True))
    count = 8_190_735_360
    items = {item.name: item.num_bytes for item in next(phase for phase in plan.phases if phase.name == "backward").items}
    assert "weights" not in items and items["float32 masters"] == count and items["AdamW moments"] == count * 2
    assert items["engine weights"] == count * 2 and items["KV cache"] == 8 << 30
    assert "new gradient" not in items and items["gradient sums"] == count
    assert "activations" not in items  # gone, layer by layer, before the last gradient is there
    ahead = {item.name: item.num_bytes for phase in plan.phases if phase.name == "forward" for item in phase.items}
    assert ahead["activations"] == 16384 * (36 * 2 * 4096 * 2 + 2 * 4096 * 2 + 16)
    allocated = sum(size for name, size in items.items() if name not in ("CUDA context", "NCCL", "fragmentation"))
    assert items["fragmentation"] == int(FRAGMENTATION * allocated)
    assert plan.disk[0].num_bytes == count * 14
    alone = {item.name: item.num_bytes for phase in make_plan(_job()).phases if phase.name == "backward" for item in phase.items}
    assert alone["weights"] == count * 2 and alone["gradient sums"] == count * 4
    assert alone["new gradient"] == 151936 * 4096 * 2  # one at a time, the output projection's being the largest
    rounded = make_plan(_job(master="stochastic"))
    last = {item.name: item.num_bytes for phase in rounded.phases if phase.name == "optimizer" for item in phase.items}
    assert last["rounding by chance"] == 151936 * 4096 * 4 and "float32 masters" not in last


def test_what_every_setting_saves() -> None:
    def worst(**changes: object) -> int:
        return make_plan(_job(**changes)).worst.num_bytes

    base = worst()
    for smaller in (
        {"recompute": True}, {"master": "stochastic"}, {"kv_bytes": 1 << 30}, {"microbatch_tokens": 4096}, {"num_gpus": 4},
        {"rolls_out": False}, {"cp": 2, "num_gpus": 2},
    ):  # fmt: skip
        assert worst(**smaller) < base, smaller
    assert worst(reference=True) > base
    assert {phase.name for phase in make_plan(_job(trains=False)).phases} == {"rollout"}
    assert {phase.name for phase in make_plan(_job(rolls_out=False)).phases} == {"forward", "backward", "optimizer"}


def test_state_that_is_elsewhere_is_counted_there() -> None:
    count = count_parameters(find_shape("qwen3-8b")).total
    here = make_plan(_job(rolls_out=True, kv_bytes=12 << 30))
    away = make_plan(_job(rolls_out=True, kv_bytes=12 << 30, optimizer="host", sleep=True))
    on_disk = make_plan(_job(rolls_out=True, optimizer="disk"))
    phases = {phase.name: {item.name: item.num_bytes for item in phase.items} for phase in away.phases}
    assert all("AdamW moments" not in items and "float32 masters" not in items for items in phases.values())
    assert "weights" not in phases["rollout"] and phases["rollout"]["KV cache"] == 12 << 30
    assert not {"KV cache", "engine weights"} & {*phases["forward"], *phases["backward"], *phases["optimizer"]}
    assert phases["publish"]["engine weights"] == phases["publish"]["weights"] == count * 2
    assert phases["optimizer"]["stages of the update"] == 9 * (128 << 20)
    assert {item.name: item.num_bytes for item in away.host}["optimizer state"] == 12 * count
    assert {item.name: item.num_bytes for item in on_disk.disk}["optimizer state"] == 12 * count
    assert here.worst.num_bytes - away.worst.num_bytes > 12 * count
    behind = make_plan(_job(saves_behind=True))
    assert {item.name: item.num_bytes for item in behind.host}["checkpoint on its way"] == behind.disk[0].num_bytes == 14 * count
    asleep = make_plan(_job(rolls_out=True, sleep=True))
    assert {item.name: item.num_bytes for item in asleep.host}["sleeping trainer"] == 12 * count  # weights are rounded again


def test_a_run_that_does_not_fit_is_told_what_would() -> None:
    plan = make_plan(_job(num_gpus=4, microbatch_tokens=32768))
    assert not plan.fits and plan.room_bytes < 0
    found = remedies(plan)
    assert any(remedy.fits for remedy in found)
    assert [remedy for remedy in found if remedy.fits] == [found[-1]], "the cheapest that fits ends the list"
    lines = "\n".join(verdict(plan))
    assert lines.startswith("does not fit: forward needs ") and f"with {found[-1].words}" in lines
    assert make_plan(_job(num_gpus=4, microbatch_tokens=8192)).fits


def test_no_setting_helps_an_engine_that_is_too_large() -> None:
    """GLM-4.5-Air's width does not divide, so one GPU would have to hold it twice."""
    plan = make_plan(_job("glm-4.5-air", num_gpus=64))
    text = "\n".join(verdict(plan))
    assert "No setting helps enough" in text and not any(remedy.fits for remedy in remedies(plan))
    assert "on 4,096 GPUs, publish still holds engine weights" in text and "and staged weights, 199.0 GiB" in text


def test_a_model_of_235_billion_weights_can_be_published_to_an_engine_over_eight_gpus() -> None:
    """None of which could hold the new version whole; with half of its four heads of keys and values each shared by two."""
    job = replace(_job("qwen3-235b-a22b", num_gpus=64), kv_bytes=4 << 30, recompute=True, optimizer="host", master="stochastic")
    assert not make_plan(job).fits
    plan = make_plan(replace(job, engine_gpus=8))
    assert plan.fits, verdict(plan)
    whole = 2 * count_parameters(job.shape).total
    publish = {item.name: item.num_bytes for item in plan.phases[-1].items}
    assert publish["staged weights"] == publish["engine weights"] < whole / 7 and whole > job.device.memory_bytes


@pytest.mark.parametrize("shape", [*SHAPES.values(), MIXED, BIASED], ids=[*SHAPES, "mixed layers", "biases"])
def test_what_a_divided_engine_holds_is_counted_exactly(shape: DecoderConfig) -> None:
    """Against the code that divides it; tables, norms and routers are whole on every GPU."""
    divides = []
    for ranks in (2, 4, 8):
        try:
            local = local_config(shape, ranks)
        except ValueError:
            continue
        divides.append(ranks)
        assert count_rank(shape, ranks) == sum(weight.numel() for weight in Decoder(local, device="meta").parameters())
    assert engine_ranks(shape) == divides
    assert count_rank(shape, 1) == count_parameters(shape).total


def test_a_divided_engine_stages_on_every_gpu_its_part() -> None:
    shape = find_shape("qwen3-32b")
    plan = make_plan(_job("qwen3-32b", num_gpus=8, engine_gpus=4))
    publish = {item.name: item.num_bytes for item in plan.phases[-1].items}
    part = 2 * count_rank(shape, 4)
    assert (publish["engine weights"], publish["staged weights"]) == (part, part)
    table = 2 * shape.vocab_size * shape.hidden_size
    assert table <= publish["bucket of whole tensors"] == table + (512 << 20), "the largest tensor travels alone"
    config = load_config("quickstart", ["--engine.tensor_parallel", "2", "--engine.max_context", "3000"])
    job = job_of_run(config, find_shape("qwen3-0.6b"), "train", find_device("h200"), 2)
    assert (job.engine_gpus, job.longest_tokens, job.backend) == (2, 3000, "fsdp")
    assert "over 1 GPU(s); one over 8 would not start" in plan_text(make_plan(_job("glm-4.5-air", engine_gpus=8)))
    assert "what megatron holds besides is not in it" in plan_text(make_plan(_job(backend="megatron")))


def test_advice_that_is_followed_helps() -> None:
    """Of many plans that do not fit, on the command line: what it says fits does, and takes nothing that is not needed."""
    rng, advised, refused = random.Random(), 0, 0
    while advised < 40:
        name, gpu = rng.choice(list(SHAPES)), rng.choice(["l40s", "h100", "h200"])
        count, tokens = rng.choice([1, 1, 2, 3, 8, 64]), rng.choice([3000, 4096, 16384, 100_000])
        job = job_of_shape(name, gpu=gpu, num_gpus=count, tokens=tokens)
        job = replace(
            job, kv_bytes=rng.choice([1, 16, 200]) << 30, reference=rng.random() < 0.5, draft=rng.choice(["none", "mtp"])
        )
        plan = make_plan(job)
        if plan.fits:
            continue
        found = remedies(plan)
        helps = [remedy for remedy in found if remedy.fits]
        assert helps in ([], [found[-1]]), (job, found)
        if not helps:
            refused += 1
            assert refused < 4000 and not any(make_plan(replace(levels[-1].change(job))).fits for levels in knobs(job))
            continue
        advised += 1
        flags = [word for flag in helps[0].flags for word in flag.split(" ")]
        more = job
        if flags[0] == "--gpus":
            more, flags = replace(job, num_gpus=int(flags[1]), shard=None), flags[2:]
        followed = with_settings(more, flags)
        assert make_plan(followed).fits and followed.microbatch_tokens >= min(tokens, followed.longest_tokens), (job, helps)
        for number in range(0, len(flags), 2):
            without = with_settings(more, flags[:number] + flags[number + 2 :])
            assert not make_plan(without).fits, f"{flags[number]} is not needed: {job}, {helps}"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--memory.slep", "true"], "near it: --memory.sleep"),
        (["--engine.kv_memory_bytes", "-3"], "must be a number of bytes"),
        (["--trainer.recompute", "1"], "must be true or false"),
        (["--engine.tensor_parallel", "3"], "must be 1, 2, 4 or 8"),
        (["--optimizer.lr", "1"], "is planned with --engine.kv_memory_bytes"),
        (["--memory.sleep", "true"], "plan it with --gpus 1"),
    ],
)
def test_settings_of_a_shape_are_checked(flags: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        with_settings(_job(num_gpus=2), flags)


def test_the_table_adds_up() -> None:
    plan = make_plan(_job(num_gpus=8))
    text = plan_text(plan)
    for phase in plan.phases:
        assert f"{phase.num_bytes / GIB:.2f}" in text
    assert text.splitlines()[-1].startswith("fits: ")
    reasons = reasons_text(plan)
    assert all(item.why in reasons for item in plan.worst.items)


@pytest.mark.parametrize(("job", "words"), [({"num_gpus": 6, "shard": 4}, "does not divide 6"), ({"num_gpus": 0}, "0 GPU")])
def test_layouts_that_are_none(job: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_plan(_job(**job))


def test_unknown_names_are_answered_with_near_ones() -> None:
    with pytest.raises(ValueError, match="near it: qwen3-8b"):
        find_shape("qwen3-9b")
    with pytest.raises(ValueError, match="known: a100-40"):
        find_device("tpu")


def test_a_run_that_cannot_fit_is_refused_before_it_loads() -> None:
    config = load_config("quickstart", ["--engine.kv_memory_bytes", str(200 << 30)])
    shape = find_shape("qwen3-0.6b")
    with pytest.raises(ValueError, match="(?s)does not fit: .* GiB more than h200 has.*engine.kv_memory_bytes = .*miles plan"):
        require_room(config, shape, "train", find_device("h200"))
    require_room(config, shape, "train")  # model.device is the CPU, whose memory is the operating system's business
    small = load_config("quickstart", ["--trainer.max_tokens_per_microbatch", "4096"])
    require_room(small, shape, "train", find_device("h200"))


def _said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of `miles plan`."""
    code = 0
    try:
        main(["plan", *arguments])
    except SystemExit as ended:
        code = int(ended.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


def _advice(out: str) -> list[str]:
    (line,) = [line for line in out.splitlines() if line.startswith("try: miles plan ")]
    return shlex.split(line.removeprefix("try: miles plan "))


def test_the_command_on_a_laptop() -> None:
    code = "import sys; from miles_core.cli.app import main\ntry:\n main(sys.argv[1:])\nfinally:\n print('torch' in sys.modules)"
    arguments = ("plan", "qwen3-235b-a22b", "--gpus", "64", "--engine-gpus", "8", "--why")
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "does not fit: forward" in done.stdout
    assert done.stdout.splitlines()[-1] == "False", "a plan of a shape needs no torch"


def test_the_command_for_a_shape(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _said(capsys, "qwen3-0.6b", "--recompute")
    assert code == 0 and "fits: " in out
    code, out, _ = _said(capsys, "qwen3-8b", "--gpu", "h100", "--memory.sleep", "true")
    assert code == 1
    code, followed, _ = _said(capsys, *_advice(out))
    assert code == 0 and "fits: " in followed, out
    assert _said(capsys, "qwen3-8b", "--memory.slep", "true")[0] == 2
    code, out, _ = _said(capsys, "qwen3-32b", "--gpu", "h100", "--memory.sleep", "true")
    assert code == 1 and "engine.tensor_parallel = " in out, "on more GPUs an engine can be divided"
    code, followed, _ = _said(capsys, *_advice(out))
    assert code == 0 and "fits: " in followed, out


def test_the_command_for_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _said(capsys, "quickstart", "--engine.kv_memory_bytes", str(200 << 30))
    assert code == 1 and "with engine.kv_memory_bytes = " in out
    advice = _advice(out)
    assert advice.count("--engine.kv_memory_bytes") == 1, "the setting that does not fit is said again"
    code, out, _ = _said(capsys, *advice)
    assert code == 0 and "fits: " in out, advice
    code, out, _ = _said(capsys, "quickstart", "--gpus", "4", "--trainer.replicate", "2")
    assert code == 0 and "trainer cut over 2;" in out, "a layout is that of the GPUs planned with"
    code, _, err = _said(capsys, "quickstart", "--gpus", "5", "--trainer.replicate", "2")
    assert code == 2 and "does not divide the 5 process(es)" in err


@pytest.mark.parametrize("tied", [False, True], ids=["projection of its own", "tied"])
def test_when_the_projection_s_gradient_is_there(tied: bool) -> None:
    """While the last layer works backward: gone into its sum, or, tied, waiting for the embedding's part. So the plan says."""
    shape = DecoderConfig(
        family="qwen3", vocab_size=509, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, tie_word_embeddings=tied,
    )  # fmt: skip
    decoder = random_decoder(shape, 0, dtype=torch.bfloat16)
    config = TrainerConfig(max_tokens_per_microbatch=16, recompute=True)
    trainer = FsdpTrainer(decoder, AlgorithmConfig(), config, OptimizerConfig(lr=1e-3))
    batch = TrainBatch.from_groups(random_samples(1, num_groups=2), AlgorithmConfig())
    last, plain, seen = decoder.layers[-1], decoder.layers[-1].forward, []

    def watched(*args: Any, **more: Any) -> Any:
        out = plain(*args, **more)
        given = out[0] if isinstance(out, tuple) else out
        if given.requires_grad:
            given.register_hook(lambda _: seen.append([size for _, size in device._live.values()]))
        return out

    last.forward = watched  # type: ignore[method-assign]
    with FakeDevice() as device:
        trainer.step(batch)
    table = 509 * 32
    whole = [(sizes.count(2 * table), sizes.count(4 * table)) for sizes in seen]
    assert len(whole) > 2 and set(whole[1:]) == {(1, 1) if tied else (0, 2)}, whole  # sums of one table, or of two


RECORDED = {
    ("qwen3-0.6b", True): 5.053, ("qwen3-4b", True): 27.314, ("qwen3-8b", True): 51.797,
    ("qwen3-0.6b", False): 24.830, ("qwen3-4b", False): 111.030,
}  # fmt: skip
"""Peaks of torch's allocator on an H200 in GiB, with turns or side by side (docs/measured/memory.md)."""


@pytest.mark.parametrize(("name", "turns"), RECORDED)
def test_the_forward_row_against_what_was_measured(name: str, turns: bool) -> None:
    """Four sequences of 8,192 tokens, one a micro-batch. No number in the formula comes from these runs."""
    shape = find_shape(name)
    kv = 4 * (8192 + 64) * 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * 2
    job = Job(
        shape=shape, device=find_device("h200"), recompute=turns, microbatch_tokens=8192, num_microbatches=4, kv_bytes=kv,
        batched_tokens=4096, max_running=4, optimizer="host" if turns else "device", sleep=turns,
    )  # fmt: skip
    items = next(phase for phase in make_plan(job).phases if phase.name == "forward").items
    planned = sum(item.num_bytes for item in items if item.name not in ("CUDA context", "NCCL", "fragmentation")) / 2**30
    assert 1.0 <= planned / RECORDED[name, turns] < 1.025


def test_what_a_run_may_be_taken_up_with() -> None:
    """After it has run out of memory: flags that save something there, and none that a run must keep."""
    plan = make_plan(_job(num_gpus=2, kv_bytes=16 << 30))
    for phase in ("forward and backward", "optimizer", "publish", "wake"):
        said = lighter(plan, phase)
        flags = [each.split(" (saves ")[0] for each in said]
        assert flags and not any("tensor_parallel" in flag or "trainer.master" in flag for flag in flags)
        names = {"forward and backward": ("forward", "backward"), "wake": (plan.worst.name,)}.get(phase, (phase,))
        for flag, line in zip(flags, said, strict=True):
            other = make_plan(with_settings(plan.job, flag.split(" ")))
            before, after = (max(p.num_bytes for p in each.phases if p.name in names) for each in (plan, other))
            if phase != "wake":
                assert line.endswith(f"(saves {(before - after) / 2**30:.3g} GiB)"), (phase, line)
    assert any("recompute" in each for each in lighter(plan, "forward and backward"))
    assert not any("recompute" in each for each in lighter(plan, "optimizer"))


def test_engines_on_devices_of_their_own_are_planned_apart() -> None:
    job = Job(shape=find_shape("qwen3-8b"), device=find_device("h200"), num_gpus=8, kv_bytes=8 << 30)
    together, apart = make_plan(job), make_plan(replace(job, apart=True))
    names = [phase.name for phase in apart.phases]
    assert names == ["rollout", "update", "forward", "backward", "optimizer", "publish"] and len(set(names)) == len(names)
    held = {phase.name: {item.name for item in phase.items} for phase in apart.phases}
    for name in names:
        engines = name in ("rollout", "update")
        assert ("engine weights" in held[name]) is engines and ("KV cache" in held[name]) is engines
        assert ("AdamW moments" in held[name]) is not engines
    assert "staged weights" in held["update"] and "staged weights" not in held["publish"]
    for phase in apart.phases:
        (same,) = [other for other in together.phases if other.name == phase.name] or [together.phases[-1]]
        assert phase.num_bytes < same.num_bytes
    assert "none holds both" in plan_text(apart) and "none holds both" not in plan_text(together)
    alone = make_plan(replace(job, apart=True, rolls_out=False))
    assert [phase.name for phase in alone.phases] == ["forward", "backward", "optimizer"]
