"""`miles-spec inspect` and `export`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from miles_kernels.nn.checkpoint import iter_tensors, write_model
from miles_kernels.nn.config import DecoderConfig
from miles_spec.cli import main
from miles_spec.models import Eagle3Config, Eagle3Draft, MtpConfig, MtpDraft
from miles_spec.models.config import to_json
from miles_spec.models.store import load_draft, save_draft

POLICY = DecoderConfig(
    family="qwen3", vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8,
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
