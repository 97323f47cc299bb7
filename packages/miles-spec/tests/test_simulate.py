from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

import miles_spec
from miles_spec import AcceptStats, NgramDraft, Sampling, decode
from miles_spec.cli import main
from miles_spec.simulate import Recorded, read_recorded, replay, synthetic_target


def test_stats_add_up() -> None:
    one, two = AcceptStats(), AcceptStats()
    one.add(2, 3)
    two.add(0, 3)
    two.add(0, 0)
    one.merge([two])
    assert one.accept_length == pytest.approx(5 / 3) and one.accept_rate == pytest.approx(1 / 3)
    assert [one.rate_at(i) for i in range(4)] == [0.5, 0.5, 0.0, 0.0]
    assert one.as_metrics()["spec/num_proposed"] == 6.0
    assert AcceptStats().accept_length == 0.0
    with pytest.raises(ValueError, match="num_accepted=4"):
        one.add(4, 3)


def test_replay_counts_what_decoding_accepted() -> None:
    seed = random.getrandbits(30)
    target = synthetic_target(12, order=1, sharpness=5.0, seed=seed)
    prompt = [random.randrange(12) for _ in range(5)]
    result = decode(target, prompt, 80, Sampling(seed=seed), draft=NgramDraft(), num_draft=3)
    recorded = Recorded((*prompt, *result.token_ids), len(prompt))
    assert replay(recorded, NgramDraft(), 3) == result.stats
    assert result.stats.num_accepted > 0


def test_recorded_files(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    row = {"token_ids": [1, 2, 3, 4], "loss_mask": [False, False, True, True], "text": "no\u2028end\x85"}
    path.write_text("[1, 2, 3]\n\n" + json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_recorded(path) == [Recorded((1, 2, 3), 1), Recorded((1, 2, 3, 4), 2)]
    for text, message in [("[1, 2]\n{", ":2: not JSON"), ('["a", "b"]', ":1: expected an array"), ("\n", "holds no sequences")]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_recorded(path)


def test_simulate_synthetic(capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["simulate", "--num-sequences", "2", "--num-tokens", "40", "--vocab", "8", "--order", "1", "--sharpness", "9"]) == 0
    )
    out = capsys.readouterr().out
    assert out.count("tokens identical to plain sampling") == 2 and "accept_length" in out


def test_simulate_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "tokens.jsonl"
    path.write_text(json.dumps([1, 2, 3] * 20) + "\n")
    assert main(["simulate", str(path), "--draft", "ngram", "--num-draft", "6"]) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert float(line.split()[2]) > 4


def test_wrong_input_ends_with_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", str(tmp_path / "missing.jsonl")]) == 2
    assert main(["simulate", "--num-draft", "0"]) == 2
    assert main(["simulate", "--vocab", "1"]) == 2
    assert "--num-draft must be at least 1" in capsys.readouterr().err


def test_drafts_and_command_line_need_no_torch() -> None:
    code = "import sys, miles_spec.cli, miles_spec.simulate; miles_spec.NgramDraft; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_public_name_loads() -> None:
    assert all(getattr(miles_spec, name) is not None for name in miles_spec.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = miles_spec.nonsense
