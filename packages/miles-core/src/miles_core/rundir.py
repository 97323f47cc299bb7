"""The run directory: what lies where, who may write, and how it goes back to an earlier step.

runs/NAME/config.toml  metrics.jsonl  samples/step_000001.jsonl  samples/eval_000000.jsonl  checkpoints/step_000010/  report.html
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from pathlib import Path
from types import TracebackType

from miles_core.config.dump import config_toml
from miles_core.config.schema import RunConfig
from miles_core.metrics import MetricsFile

_SAMPLES = re.compile(r"(?:step|eval)_(\d+)\.jsonl(?:\.partial)?")


class RunDir:
    """Paths of one run. Nothing is written by looking."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.config = root / "config.toml"
        self.metrics = MetricsFile(root / "metrics.jsonl")
        self.samples = root / "samples"
        self.profile = root / "profile"
        self.report = root / "report.html"

    @classmethod
    def of(cls, config: RunConfig) -> RunDir:
        """The directory that `run.dir` and `run.name` name."""
        assert config.run.name is not None
        return cls(Path(config.run.dir) / config.run.name)

    def create(self, config: RunConfig, *, resumable: bool = True) -> None:
        """Make the directory with its config.toml, both or none. Raises FileExistsError when it is there already."""
        self.check_new(resumable=resumable)
        partial = self.root.with_name(f".{self.root.name}.partial-{os.getpid()}")
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "samples").mkdir(parents=True)
        (partial / "config.toml").write_text(config_toml(config), encoding="utf-8")
        if self.root.exists():
            self.root.rmdir()  # empty, says check_new
        partial.rename(self.root)

    def check_new(self, *, resumable: bool = True) -> None:
        """Raise FileExistsError saying what to do when there is a run of this name; `resumable`: its kind can go on."""
        if self.root.exists() and (not self.root.is_dir() or any(self.root.iterdir())):
            resume = "go on with it by --resume, " if resumable else ""
            raise FileExistsError(f"{self.root} exists: {resume}choose another --name, or remove the folder")

    def check_resumable(self) -> None:
        """Raise FileNotFoundError when there is nothing to resume."""
        if not self.config.is_file():
            raise FileNotFoundError(
                f"{self.root}: no run to resume (no config.toml); leave --resume out to start it, or correct --name"
            )

    def write_config(self, config: RunConfig) -> None:
        """Replace config.toml."""
        partial = self.config.with_name("config.toml.partial")
        partial.write_text(config_toml(config), encoding="utf-8")
        partial.replace(self.config)

    def step_samples(self, step: int) -> Path:
        """Samples that step trained on."""
        return self.samples / f"step_{step:06d}.jsonl"

    def eval_samples(self, step: int) -> Path:
        """Samples of the evaluation after that step."""
        return self.samples / f"eval_{step:06d}.jsonl"

    def recorded_steps(self) -> list[int]:
        """Steps with recorded training samples, ascending."""
        names = (_SAMPLES.fullmatch(path.name) for path in self.samples.glob("step_*.jsonl"))
        return sorted(int(match[1]) for match in names if match)

    def rewind(self, step: int) -> None:
        """Forget everything after `step`: metrics, samples, the report."""
        self.metrics.truncate(step)
        self.samples.mkdir(exist_ok=True)
        for path in self.samples.iterdir():
            match = _SAMPLES.fullmatch(path.name)
            if match and (int(match[1]) > step or path.name.endswith(".partial")):
                path.unlink()
        self.report.unlink(missing_ok=True)


class RunLock:
    """Holds `RUN/.lock` while a process writes there; it falls with the process, however that ends."""

    def __init__(self, run_dir: RunDir) -> None:
        self._path = run_dir.root / ".lock"
        self._handle: int | None = None

    def __enter__(self) -> RunLock:
        handle = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise FileExistsError(
                f"{self._path.parent}: another process is training this run; wait for it, or choose another --name"
            ) from None
        self._handle = handle
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
