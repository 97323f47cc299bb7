"""Build the five wheels, install each one alone in a bare environment, and look at what importing it drags in.

    tools/leak.py [--keep DIR] [NAME ...]

For each package: its wheel, the wheels of ours it needs, and its locked dependencies (hash-checked) go into a new
environment without any workspace in sight. Then every module that its bare install promises is imported, and
`sys.modules` is searched for what must not be there. torch, where a package needs it, is linked from `.venv`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
UV = ROOT / ".venv" / "bin" / "uv"
TORCH_FREE = ("torch", "transformers", "ray", "sglang")
WIRE_IMPORT_S = 0.15
KERNELS_IMPORT_S = 0.2
"""Of miles-kernels with its decoder and ops, beyond torch's own import; processor time, so that a busy machine does not count."""
HELP_S = 0.5


@dataclass(frozen=True)
class Install:
    """One bare environment: a package, its extras, and what importing it must not bring along."""

    package: str
    command: str
    extras: tuple[str, ...] = ()
    skip: str = ""
    """Modules (regular expression) that need an extra which is not installed here."""
    forbidden: tuple[str, ...] = ("transformers", "ray", "sglang", "triton", "matplotlib", "pyarrow")

    @property
    def title(self) -> str:
        return self.package + (f"[{','.join(self.extras)}]" if self.extras else "")


INSTALLS = (
    Install("miles-lean", "miles-lean", skip=r"\.server\.app\b", forbidden=(*TORCH_FREE, "miles_core", "miles_kernels")),
    Install(
        "miles-rollout",
        "miles-rollout",
        skip=r"\.(engines|server|router|weights)\b",
        forbidden=(*TORCH_FREE, "miles_kernels", "starlette"),
    ),
    Install(
        "miles-rollout", "miles-rollout", ("server",), skip=r"\.(engines|weights)\b", forbidden=(*TORCH_FREE, "miles_kernels")
    ),
    Install("miles-kernels", "miles-kernels", skip=r"_kernels$|\.verify\.plugin$"),
    Install("miles-spec", "miles-spec"),
    Install("miles-core", "miles", skip=r"\.trainer\.megatron\.(?!config$)"),
)

_IMPORT_ALL = """
import importlib, json, pkgutil, re, sys
name, skip = sys.argv[1], sys.argv[2]
root = importlib.import_module(name)
names = [name]
for info in pkgutil.walk_packages(root.__path__, name + "."):
    if not info.name.endswith("__main__") and not (skip and re.search(skip, info.name)):
        importlib.import_module(info.name)
        names.append(info.name)
print(json.dumps({"imported": names, "modules": sorted(module.partition(".")[0] for module in sys.modules)}))
"""


_TIME_KERNELS = """
import time
import torch
started = time.process_time()
import miles_kernels, miles_kernels.ops.attention, miles_kernels.ops.moe, miles_kernels.ops.sample, miles_kernels.nn.decoder
print(time.process_time() - started)
"""
_TIME_WIRE = """
import sys, time
started = time.perf_counter()
import miles_rollout.wire
print(time.perf_counter() - started)
assert "torch" not in sys.modules
"""

_HELP = """
import sys
from miles_core.cli import main
sys.argv = ["miles", "--help"]
try:
    main()
except SystemExit:
    pass
assert "torch" not in sys.modules, "miles --help imports torch"
"""


def run(*command: str | Path, cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    """Standard output of a command; SystemExit with everything it said when it fails."""
    environ = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH")} | (env or {})
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=environ, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def build_wheels(folder: Path) -> dict[str, Path]:
    """Build all wheels, without network; by package name."""
    run(UV, "build", "--quiet", "--offline", "--all-packages", "--wheel", "--out-dir", folder)
    return {path.name.split("-")[0].replace("_", "-"): path for path in folder.glob("*.whl")}


def requirements(install: Install) -> str:
    """The locked requirements of a package with its extras, hashes included, our own packages left out."""
    extras = [part for extra in install.extras for part in ("--extra", extra)]
    base = ("export", "--quiet", "--frozen", "--no-dev", "--no-emit-workspace", "--no-annotate")
    return run(UV, *base, "--package", install.package, *extras)


def ours(wheels: dict[str, Path], package: str, extras: tuple[str, ...]) -> dict[str, Path]:
    """The wheel of a package and of ours it requires, transitively."""
    chosen = {package: wheels[package]}
    (found,) = metadata.distributions(name=package)
    for line in found.requires or []:
        extra = re.search(r"extra == ['\"](\w+)['\"]", line)
        match = re.match(r"(miles-\w+)(?:\[([\w,]+)\])?", line)
        if match and (extra is None or extra.group(1) in extras):
            inner = tuple((match.group(2) or "").split(","))
            nested = extras + inner if match.group(1) == package else inner
            if match.group(1) not in chosen or match.group(1) == package and set(nested) != set(extras):
                chosen |= ours(wheels, match.group(1), nested)
    return chosen


def link_torch(python: Path) -> None:
    """Make .venv's torch, and what belongs to its build, visible in a bare environment."""
    target = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip())
    source = Path(str(metadata.distribution("torch").locate_file("")))
    build = re.compile(r"(torch|torchgen|functorch|triton|nvidia|cuda)\b|(torch|triton|nvidia_\w+|cuda_\w+)-[\d.]+.*dist-info")
    for path in source.iterdir():
        if build.match(path.name) and not (target / path.name).exists():
            if path.name.endswith(".dist-info"):
                shutil.copytree(path, target / path.name)  # uv does not look through a link here
            else:
                (target / path.name).symlink_to(path)


def check(install: Install, wheels: dict[str, Path], folder: Path) -> str:
    """Install and import one package; a line of findings, SystemExit when something is wrong."""
    started = time.monotonic()
    run(UV, "venv", "--quiet", "--no-config", "--python", sys.executable, folder)
    python = folder / "bin" / "python"
    env = {"VIRTUAL_ENV": str(folder)}
    locked = folder / "requirements.txt"
    locked.write_text(requirements(install))
    pip = (UV, "pip", "install", "--quiet", "--no-config", "--no-deps")
    if "==" in locked.read_text():
        run(*pip, "--require-hashes", "--no-build", "-r", locked, env=env, cwd=folder)
    chosen = ours(wheels, install.package, install.extras)
    run(*pip, *chosen.values(), env=env, cwd=folder)
    needs_torch = "miles-kernels" in chosen
    if needs_torch:
        link_torch(python)
        locked.write_text(run(UV, "export", "--quiet", "--frozen", "--only-group", "torch-deps", "--no-annotate"))
        run(*pip, "--require-hashes", "--no-build", "-r", locked, env=env, cwd=folder)
    run(UV, "pip", "check", "--no-config", env=env, cwd=folder)
    module = install.package.replace("-", "_")
    seen = json.loads(run(python, "-c", _IMPORT_ALL, module, install.skip, cwd=folder))
    if leaked := sorted(set(install.forbidden) & set(seen["modules"])):
        raise SystemExit(f"{install.title}: importing {', '.join(seen['imported'])} brings in {', '.join(leaked)}")
    run(folder / "bin" / install.command, "--help", cwd=folder)
    took = time.monotonic() - started
    return f"{install.title}: {len(chosen)} wheels, {len(seen['imported'])} modules imported, nothing leaked ({took:.1f} s)"


def start_up_times(tries: int = 5) -> str:
    """Import time of the wire types and wall time of `miles --help`, neither loading torch, and of the kernels beyond torch."""
    wire = min(float(run(sys.executable, "-c", _TIME_WIRE)) for _ in range(tries))
    kernels = min(float(run(sys.executable, "-c", _TIME_KERNELS)) for _ in range(2))
    help_s = []
    for _ in range(tries):
        started = time.perf_counter()
        run(ROOT / ".venv" / "bin" / "miles", "--help")
        help_s.append(time.perf_counter() - started)
    run(sys.executable, "-c", _HELP)
    line = (
        f"import miles_rollout.wire {wire:.3f} s (at most {WIRE_IMPORT_S}), miles --help {min(help_s):.2f} s (at most {HELP_S}), "
        f"import miles_kernels {kernels:.3f} s beyond torch (at most {KERNELS_IMPORT_S})"
    )
    if wire > WIRE_IMPORT_S or min(help_s) > HELP_S or kernels > KERNELS_IMPORT_S:
        raise SystemExit("too slow: " + line)
    return line


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="packages to check; all when none is named")
    parser.add_argument("--keep", type=Path, help="leave wheels and environments in this folder")
    options = parser.parse_args()
    folder = options.keep or Path(tempfile.mkdtemp(prefix="miles-wheels-"))
    try:
        wheels = build_wheels(folder / "wheels")
        print("wheels: " + ", ".join(path.name for path in sorted(wheels.values())), flush=True)
        for number, install in enumerate(INSTALLS):
            if not options.names or install.package in options.names:
                print(check(install, wheels, folder / f"env{number}"), flush=True)
        if not options.names:
            print(start_up_times())
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
