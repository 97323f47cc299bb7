"""`miles-spec bench`: every arm on the CPU, with a random model and with a directory, what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from engine_cases import SHAPE

from miles_kernels.nn.checkpoint import random_decoder, save_decoder
from miles_rollout.engines.embedded import speculate_bench
from miles_rollout.text import CharTokenizer
from miles_spec.bench import BenchSettings
from miles_spec.cli import main
from miles_spec.models import MtpDraft
from miles_spec.models.store import save_draft
from miles_spec.simulate_control import CostTable

SMALL = ["--rounds", "1", "--settle", "0", "--new-tokens", "6", "--num-draft", "2", "--prompt-tokens", "5"]


def test_a_random_model_with_every_length_and_the_controller(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "made"
    arguments = ["bench", "--layers", "1", "--hidden", "64", "--rows", "1", "2", "--temperatures", "1", "0", "--out", str(out)]
    assert main([*arguments, *SMALL]) == 0
    printed = capsys.readouterr().out
    assert "| k=0 | k=1 | k=2 | adaptive |" in printed and "tokens identical in all arms" in printed
    told = json.loads((out / "bench.json").read_text())
    assert [(cell["rows"], cell["temperature"]) for cell in told["cells"]] == [(1, 1.0), (1, 0.0), (2, 1.0), (2, 0.0)]
    for cell in told["cells"]:
        assert len(cell["fixed"]) == 3 and min(cell["plain"], cell["adaptive"], *cell["fixed"]) > 0
        assert 1 <= cell["accept_length"] <= 3 and cell["num_different"] == 0
    assert sorted(CostTable.read(out / "costs.jsonl").seconds) == [1, 2]
    texts = [each.text for each in ElementTree.parse(out / "bench.svg").iter() if each.text]
    assert {"adaptive", "tokens drafted", "rows 2, T 0", "tokens per second over plain decoding"} <= set(texts)
    assert (out / "bench.md").read_text().count("\n| ") == 1 + 4


@pytest.mark.parametrize("draft", ["ngram", "of its own"])
def test_a_model_directory_with_recorded_prompts(draft: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    policy = random_decoder(SHAPE, 0)
    save_decoder(policy, tmp_path / "model")
    CharTokenizer("abcdefghijklmnop").save(tmp_path / "model")
    if draft != "ngram":
        save_draft(MtpDraft.from_trunk(policy), tmp_path / "draft")
        draft = str(tmp_path / "draft")
    (tmp_path / "prompts.jsonl").write_text('{"token_ids": [5, 6, 5, 6, 7], "loss_mask": [false, false, false, false, true]}\n')
    arguments = ["bench", str(tmp_path / "model"), "--draft", draft, "--rows", "2", "--temperatures", "1"]
    assert main([*arguments, "--prompts", str(tmp_path / "prompts.jsonl"), *SMALL]) == 0
    assert "| 2 | 1 |" in capsys.readouterr().out


def test_other_tokens_are_noticed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """The control: an engine whose drafts change what is sampled."""
    plain = speculate_bench._decode

    def tampered(core, requests):
        seconds, tokens, steps, done = plain(core, requests)
        if core.speculator is not None and core.speculator.controller.choose(1) == 2:
            done = {name: (*ids[:-1], ids[-1] + 1) for name, ids in done.items()}
        return seconds, tokens, steps, done

    monkeypatch.setattr(speculate_bench, "_decode", tampered)
    assert main(["bench", "--layers", "1", "--hidden", "64", "--rows", "1", "--temperatures", "1", *SMALL]) == 1
    printed = capsys.readouterr().out
    assert "ARMS DIFFER" in printed and "arms gave other tokens than plain decoding" in printed


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows", "0"], "--rows must be numbers of at least 1, not [0]"),
        (["--catch-up", "never"], "draft_catch_up='never' must be one of whole, keys, captured"),
        (["--hidden", "100"], "--hidden must be a multiple of 64"),
        (["--draft", "none"], "--draft must be ngram, suffix, mtp or the directory of a draft model, not 'none'"),
        (["--temperatures", "-1"], "--temperatures must be numbers of at least 0, not [-1.0]"),
        (["--new-tokens", "1"], "--new-tokens must be at least 2"),
        (["/no/such/folder"], "/no/such/folder: not a directory"),
    ],
)
def test_what_is_refused(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_a_draft_without_its_policy_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="belongs to a policy: name its MODEL directory"):
        BenchSettings(draft=str(tmp_path)).validate()
