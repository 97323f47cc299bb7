"""The command line: settings split off, exit codes, what --help costs."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from miles_core.cli.app import main, split_settings


def test_settings_are_told_from_flags() -> None:
    plain, settings = split_settings([*"train --optimizer.lr 1e-4 quickstart --steps 3".split(), "--a.b=c d", "--x.y", "-1"])
    assert plain == ["train", "quickstart", "--steps", "3"]
    assert settings == ["--optimizer.lr", "1e-4", "--a.b=c d", "--x.y", "-1"]
    assert split_settings(["--a.b", "--c.d", "1"]) == ([], ["--a.b", "--c.d", "1"])
    assert split_settings(["eval", "--", "--a.b", "1"]) == (["eval", "--", "--a.b", "1"], [])
    assert split_settings(["./file.toml", "1.5"]) == (["./file.toml", "1.5"], [])


def run(*arguments: str) -> int:
    try:
        main(arguments)
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("recipes") == 0
    listed = capsys.readouterr().out
    assert "quickstart" in listed and "smollm2" in listed and "miles sft   quickstart-sft" in listed
    assert run("train", "nothing-like-this") == 2
    assert "no recipe" in capsys.readouterr().err
    assert run("recipes", "--optimizer.lr", "1") == 2
    assert "takes no settings" in capsys.readouterr().err
    assert run("train", "quickstart", "--nonsense") == 2
    assert run("train") == 2
    assert run("train", "quickstart", "--resume", "--replay", "x") == 2
    assert "no such run" in capsys.readouterr().err


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MILES_DEBUG", "1")
    with pytest.raises(ValueError, match='no recipe "nothing-like-this"'):
        main(["train", "nothing-like-this"])


def test_doctor_says_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("doctor") == 0
    said = capsys.readouterr().out
    for word in ("torch", "contract     mk1-", "numerics", "miles-kernels", "MKL_CBWR", "cache"):
        assert word in said


def test_models_are_found_without_the_engine() -> None:
    """Whoever only loads a model, as a trainer process does, does not import what generates."""
    program = "import sys, miles_core.models; print([name for name in sys.modules if name.endswith('.embedded.engine')])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_is_quick_and_imports_no_torch() -> None:
    program = "import sys; from miles_core.cli.app import main\ntry:\n main(['--help'])\nexcept SystemExit: pass\n"
    program += "assert 'torch' not in sys.modules"
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env={**os.environ}, check=False)
        seconds.append(time.perf_counter() - begin)
        assert done.returncode == 0, done.stderr
        assert "train" in done.stdout and "doctor" in done.stdout
    assert min(seconds) < 0.5
