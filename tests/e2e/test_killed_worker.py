"""A process of a cluster dies (SIGKILL) in mid-run: the driver names it and ends; resumed, it is the undisturbed run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CHAOS = Path(__file__).parents[2] / "tools" / "chaos_train.py"


def test_a_trainer_killed_between_steps_is_named_and_the_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """One run of tools/chaos_train.py, whose seed kills the trainer; by hand it does 20 at random times, see docs/measured."""
    words = [sys.executable, str(CHAOS), *"--runs 1 --steps 12 --after 2 --trainers 1 --plain --seed 1".split()]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "named trainer-" in done.stdout and "equal to the run left alone" in done.stdout, done.stdout
