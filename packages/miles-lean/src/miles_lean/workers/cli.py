"""One `lean` process per check: the slowest way, and the one that needs nothing but the command line."""

from __future__ import annotations

import tempfile
from pathlib import Path

from miles_lean.backends.base import Backend, CompileResult
from miles_lean.workers.outcome import judge_exit
from miles_lean.workers.process import run_process

STACK_KB = 8192
"""Stack of each Lean thread; the default, said aloud, because memory limits depend on it."""


def compile_arguments(source: str, out: str = "") -> list[str]:
    """Arguments for one file: JSON messages, one thread, its .olean when asked for."""
    return ["--json", "-j1", f"-s{STACK_KB}", *(["-o", out] if out else []), source]


def compile_file(backend: Backend, source: str, *, out: Path, deadline: float) -> CompileResult:
    """Write the source beside `out` and compile it there. See Backend.compile."""
    if out.suffix != ".olean":
        raise ValueError(f"{out}: the compiled module's name must end in .olean")
    path = out.with_suffix(".lean")
    try:
        path.write_text(source, encoding="utf-8", errors="surrogatepass")
        out.unlink(missing_ok=True)
    except OSError as error:
        return CompileResult(outcome="infra", rc=None, messages=(), seconds=0.0, detail=f"{path}: {error}")
    command = backend.command(compile_arguments(path.name, out.name))
    done = run_process(command, cwd=out.parent, env=backend.environment(), deadline=deadline)
    return judge_exit(done, olean=out)


def elaborate_text(backend: Backend, source: str, *, deadline: float) -> CompileResult:
    """Elaborate a source in a process of its own and keep nothing."""
    with tempfile.TemporaryDirectory(prefix="miles-lean-") as folder:
        path = Path(folder) / "Check.lean"
        try:
            path.write_text(source, encoding="utf-8", errors="surrogatepass")
        except OSError as error:
            return CompileResult(outcome="infra", rc=None, messages=(), seconds=0.0, detail=f"{path}: {error}")
        command = backend.command(compile_arguments(path.name))
        return judge_exit(run_process(command, cwd=path.parent, env=backend.environment(), deadline=deadline))
