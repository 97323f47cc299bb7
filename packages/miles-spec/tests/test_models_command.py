"""`miles-spec inspect` and `export`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from miles_kernels.nn.checkpoint import iter_tensors, load_decoder, random_decoder, save_decoder, write_model
from miles_kernels.nn.config import DecoderConfig, RopeConfig
from miles_spec.cli import main
from miles_spec.models import Eagle3Config, Eagle3Draft, MtpConfig, MtpDraft
from miles_spec.models.config import to_json
from miles_spec.models.store import load_draft, save_draft

POLICY = DecoderConfig(
    family="qwen3", vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8,
)  # fmt: skip
GLM = dataclasses.replace(
    POLICY, family="glm4_moe", num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16, norm_topk_prob=True,
    shared_intermediate_size=16, first_k_dense_replace=1, attention_bias=True, rope=RopeConfig(partial_rotary_factor=0.5),
)  # fmt: skip
IDS = (1, 4, 5, 9, 17, 30, 31, 39)


def test_inspect_describes_and_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draft = Eagle3Draft.random(Eagle3Config.of(POLICY, draft_vocab_size=len(IDS)), draft_ids=IDS)
    save_draft(draft, tmp_path / "eagle")
    assert main(["inspect", str(tmp_path / "eagle")]) == 0
    said = capsys.readouterr().out
    assert (
        "8 of 40 tokens (20.0%)" in said
        and "before layers 2, 3, 4" in said
        and "midlayer.hidden_norm.weight  [32]  float32" in said
    )
    state = {name: tensor for name, tensor in draft.named_state() if name != "fc.weight"}
    write_model(tmp_path / "broken", state | {"midlayer.extra": torch.zeros(2)}, to_json(draft.config))
    assert main(["inspect", str(tmp_path / "broken")]) == 2
    said = capsys.readouterr().err
    assert "missing fc.weight" in said and "unexpected midlayer.extra" in said and "broken" in said


def test_export_to_another_layout_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draft = MtpDraft.random(MtpConfig.of(POLICY), 4)
    save_draft(draft, tmp_path / "a")
    assert main(["export", str(tmp_path / "a"), str(tmp_path / "b"), "--layout", "mimo"]) == 0
    assert "model.mtp_layers.0.input_proj.weight" in dict(iter_tensors(tmp_path / "b"))
    assert main(["export", str(tmp_path / "b"), str(tmp_path / "c"), "--layout", "deepseek"]) == 0
    back = load_draft(tmp_path / "c", POLICY)
    assert all(torch.equal(a, b) for a, b in zip(draft.parameters(), back.parameters(), strict=True))
    assert main(["export", str(tmp_path / "a"), str(tmp_path / "d"), "--dtype", "bfloat16"]) == 0
    assert {t.dtype for _, t in iter_tensors(tmp_path / "d")} == {torch.bfloat16}
    capsys.readouterr()
    assert main(["export", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "exists" in capsys.readouterr().err


def test_policy_and_draft_are_joined_as_models_with_mtp_layers_are_published(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, draft = random_decoder(GLM, 0, dtype=torch.bfloat16), MtpDraft.random(MtpConfig.of(GLM), 4)
    draft.block(0).router_bias.normal_(0, 0.2)
    save_draft(draft, tmp_path / "draft")
    for name, most in (("one", 10**9), ("shards", 20_000)):
        save_decoder(policy, tmp_path / name, max_shard_bytes=most)
        (tmp_path / name / "generation_config.json").write_text("{}")
        arguments = ["--policy", str(tmp_path / name), "--join", "--dtype", "bfloat16"]
        assert main(["export", str(tmp_path / "draft"), str(tmp_path / f"{name}-joined"), *arguments]) == 0
        joined = tmp_path / f"{name}-joined"
        assert not (joined / "model.safetensors").exists() and (joined / "generation_config.json").is_file()
        whole = load_decoder(joined, dtype=torch.bfloat16)
        assert all(torch.equal(a, b) for (_, a), (_, b) in zip(whole.hf_state(), policy.hf_state(), strict=True))
        back = load_draft(joined, GLM)
        for (_, a), (wanted, b) in zip(back.named_state(), draft.named_state(), strict=True):
            assert torch.equal(a, b if wanted.endswith("bias") and "gate" in wanted else b.bfloat16().float()), wanted
        capsys.readouterr()
        assert main(["export", str(tmp_path / "draft"), str(tmp_path / "x"), "--policy", str(joined), "--join"]) == 2
        assert "carries MTP layers already" in capsys.readouterr().err
    other = dataclasses.replace(draft.config, layout="mimo")
    save_draft(MtpDraft.random(other, 4), tmp_path / "mimo")
    assert main(["export", str(tmp_path / "mimo"), str(tmp_path / "x"), "--policy", str(tmp_path / "one"), "--join"]) == 2
    assert "look for MTP layers of layout 'glm'" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "draft"), str(tmp_path / "x"), "--join"]) == 2
    assert "name that with --policy" in capsys.readouterr().err
