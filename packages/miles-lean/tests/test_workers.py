"""Workers: deadlines, deaths, floods, memory, replacement. A crash is not a rejection, and neither is a failing machine."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from miles_lean.backends.base import CompileResult
from miles_lean.backends.embedded import EmbeddedBackend
from miles_lean.workers.forked import ForkedWorker
from miles_lean.workers.lsp import LspWorker, WorkerLost, _content_length, header_of
from miles_lean.workers.outcome import judge_exit, parse_messages
from miles_lean.workers.pool import Pool
from miles_lean.workers.process import MAX_OUTPUT, Finished, rss_bytes, run_process

GOOD = "example : 2 + 2 = 4 := rfl"
HANG = "theorem hang (p : Prop) (h : p) : p := by repeat (have h2 := h)"
Check = Callable[[str, float], CompileResult]


@pytest.fixture(scope="module")
def backend() -> Iterator[EmbeddedBackend]:
    found = EmbeddedBackend()
    assert found.built.folder.is_dir()
    yield found
    found.close()


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def group(leader: int) -> list[int]:
    """Processes of a process group that are alive."""
    members = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[2]) == leader and fields[0] != "Z":
                members.append(int(entry.name))
    return members


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


# ---------------------------------------------------------------- one process


def sh(script: str, deadline: float = 20.0, **options: int) -> Finished:
    return run_process(["/bin/sh", "-c", script], cwd=Path("/"), env={"PATH": os.environ["PATH"]}, deadline=deadline, **options)


def test_a_process_ends_by_itself_or_with_all_its_children() -> None:
    done = sh("echo out; echo err >&2; exit 7")
    assert (done.rc, done.stdout, done.stderr, done.ended) == (7, "out\n", "err\n", "exit")
    started = time.monotonic()
    late = sh("sleep 600 & echo $!; wait", deadline=0.4)
    assert late.ended == "timeout" and late.rc is None and time.monotonic() - started < 0.4 + 10.0
    until(lambda: not alive(int(late.stdout)))
    left_behind = sh("sleep 600 & echo $!")
    assert left_behind.ended == "exit"
    until(lambda: not alive(int(left_behind.stdout)))


def test_a_flood_is_read_and_dropped() -> None:
    done = sh(f"head -c {3 * MAX_OUTPUT} /dev/zero; echo end >&2; exit 1")
    assert done.rc == 1 and len(done.stdout) == MAX_OUTPUT and done.dropped == 2 * MAX_OUTPUT and done.stderr == "end\n"


def test_memory_and_programs_that_do_not_start() -> None:
    eater = [sys.executable, "-c", "x = bytearray(400 << 20); x[::4096] = bytes(len(x[::4096])); import time; time.sleep(60)"]
    done = run_process(eater, cwd=Path("/"), env={}, deadline=30.0, max_rss=200 << 20)
    assert done.ended == "memory" and judge_exit(done).outcome == "crash"
    missing = run_process(["/no/such/lean"], cwd=Path("/"), env={}, deadline=1.0)
    assert missing.ended == "failed" and judge_exit(missing).outcome == "infra" and "/no/such/lean" in missing.stderr


ERROR = '{"severity":"error","pos":{"line":1,"column":0},"endPos":null,"data":"no"}\n'


@pytest.mark.parametrize(
    ("rc", "stdout", "stderr", "outcome"),
    [
        (0, "", "", "ok"),
        (1, ERROR, "", "rejected"),
        (1, "", "", "infra"),
        (1, ERROR, "write failed: No space left on device", "infra"),
        (1, "", "uncaught exception: no space left on device (error code: 28)", "infra"),
        (134, "", "failed to create thread", "infra"),
        (134, "", "Stack overflow detected. Aborting.", "crash"),
        (139, "", "", "crash"),
        (-signal.SIGSEGV, "", "", "crash"),
        (-signal.SIGABRT, ERROR, "", "crash"),
        (-signal.SIGKILL, "", "", "infra"),
        (-signal.SIGTERM, ERROR, "", "infra"),
    ],
)
def test_what_an_exit_says(rc: int, stdout: str, stderr: str, outcome: str) -> None:
    assert judge_exit(Finished(rc, stdout, stderr, 0.1, "exit")).outcome == outcome


def test_a_missing_olean_is_no_success(tmp_path: Path) -> None:
    assert judge_exit(Finished(0, "", "", 0.1, "exit"), olean=tmp_path / "x.olean").outcome == "infra"


def test_programs_may_print_what_they_like() -> None:
    lines = f'hello\n{{"severity": "error"}}\n{{broken\n[1]\n{ERROR}'
    assert [message.text for message in parse_messages(lines)] == ["no"]


# ---------------------------------------------------------------- workers of Lean


@pytest.fixture(params=["server", "forked", "command line"])
def check(request: pytest.FixtureRequest, backend: EmbeddedBackend, tmp_path: Path) -> Iterator[Check]:
    """One check on each kind of worker."""
    if request.param == "server":
        worker = LspWorker(backend)
        yield worker.check
        worker.close()
    elif request.param == "forked":
        forked = ForkedWorker(backend.wheel.library, backend.environment())
        yield lambda source, deadline: forked.compile(source, out=tmp_path / "A.olean", deadline=deadline)
        forked.close()
    else:
        yield lambda source, deadline: backend.compile(source, out=tmp_path / "A.olean", deadline=deadline)


def test_a_hang_is_killed_at_the_deadline_and_the_next_check_works(check: Check) -> None:
    assert check(GOOD, 60.0).outcome == "ok"
    started = time.monotonic()
    result = check(HANG, 0.7)
    took = time.monotonic() - started
    assert result.outcome == "timeout" and 0.7 <= took < 2.5  # 1.0 on a machine that does nothing else; see docs/measured
    assert check(GOOD, 60.0).outcome == "ok"
    assert check("example : 2 + 2 = 5 := rfl", 60.0).outcome == "rejected"


def test_import_errors_are_rejections(check: Check) -> None:
    result = check("import Mathlib.Tactic\nexample : True := trivial", 60.0)
    assert result.outcome == "rejected" and "Mathlib" in result.messages[0].text
    assert check(GOOD, 60.0).outcome == "ok"


@pytest.mark.parametrize(("number", "outcome"), [(signal.SIGKILL, "infra"), (signal.SIGILL, "crash"), (signal.SIGABRT, "crash")])
def test_a_server_that_dies(backend: EmbeddedBackend, number: int, outcome: str) -> None:
    worker = LspWorker(backend)
    try:
        worker.start()
        pid = worker.pid
        assert pid is not None
        killer = threading.Timer(0.3, os.kill, (pid, number))
        killer.start()
        assert worker.check(HANG, 30.0).outcome == outcome
        killer.join()
        assert not group(pid) and worker.pid is None and worker.worn
        assert worker.check(GOOD, 60.0).outcome == "ok"
    finally:
        worker.close()


def test_a_forked_child_and_its_parent_die(backend: EmbeddedBackend, tmp_path: Path) -> None:
    worker = ForkedWorker(backend.wheel.library, backend.environment())
    try:
        worker.start()
        for number, outcome in ((signal.SIGABRT, "crash"), (signal.SIGKILL, "infra")):

            def kill_child(number: int = number) -> None:
                until(lambda: worker._child is not None)
                time.sleep(0.2)
                os.kill(worker._child or 0, number)

            killer = threading.Thread(target=kill_child)
            killer.start()
            assert worker.compile(HANG, out=tmp_path / "A.olean", deadline=30.0).outcome == outcome
            killer.join()
        pid = worker.pid
        assert pid is not None and worker.num_uses == 2
        os.kill(pid, signal.SIGKILL)
        until(lambda: not alive(pid))
        assert worker.compile(GOOD, out=tmp_path / "A.olean", deadline=60.0).outcome == "ok"
        assert worker.pid not in (None, pid)
    finally:
        worker.close()
    assert worker.pid is None


def test_a_forked_hook_runs_in_the_child_and_its_failure_is_infra(backend: EmbeddedBackend, tmp_path: Path) -> None:
    hook = tmp_path / "hook.py"
    hook.write_text("import os\ndef enter(value):\n    open(value, 'w').write(str(os.getpid()))\n")
    worker = ForkedWorker(backend.wheel.library, backend.environment(), hook=hook, hook_value=str(tmp_path / "seen"))
    try:
        assert worker.compile(GOOD, out=tmp_path / "A.olean", deadline=60.0).outcome == "ok"
        assert int((tmp_path / "seen").read_text()) != worker.pid
        worker.hook_value = str(tmp_path / "no" / "such" / "folder")
        failed = worker.compile(GOOD, out=tmp_path / "A.olean", deadline=60.0)
        assert failed.outcome == "infra" and "could not prepare" in failed.detail
    finally:
        worker.close()


def test_a_server_that_eats_memory_is_killed(backend: EmbeddedBackend) -> None:
    worker = LspWorker(backend, max_rss=1 << 20)
    try:
        result = worker.check(HANG, 30.0)
        assert result.outcome == "crash" and "MiB" in result.detail
    finally:
        worker.close()


def test_worn_workers(backend: EmbeddedBackend) -> None:
    worker = LspWorker(backend, max_uses=2)
    try:
        assert worker.worn
        worker.start()
        assert not worker.worn and rss_bytes(worker.pid or 0) > 20 << 20
        worker.check(GOOD, 60.0)
        worker.check(GOOD, 60.0)
        assert worker.worn
    finally:
        worker.close()


@pytest.mark.parametrize(
    ("source", "header"),
    [
        ("theorem x : a := b", ""),
        ("import A.B\nimport C\ntheorem", "import A.B\nimport C\n"),
        ("/- import D -/ prelude\nimport X.Y.Z\n\nx", "/- import D -/ prelude\nimport X.Y.Z\n"),
        ("-- import\ntheorem a : x", ""),
        ("theorem important : x", ""),
        ("module\npublic import A\nmeta import B\ndef x := 1", "module\npublic import A\nmeta import B\n"),
    ],
)
def test_headers(source: str, header: str) -> None:
    assert header_of(source) == header


def test_frames() -> None:
    assert _content_length(b"Content-Type: x\r\nContent-Length: 12") == 12
    for head in (b"Content-Length: -1", b"hello", b"Content-Length: 99999999999", b""):
        with pytest.raises(WorkerLost):
            _content_length(head)


# ---------------------------------------------------------------- the pool


def test_the_pool_retries_infra_replaces_the_dead_and_ends_all(backend: EmbeddedBackend, tmp_path: Path) -> None:
    async def story() -> list[int]:
        pool = Pool(backend, num_fast=1, num_isolated=1)
        async with pool:
            seen = pool.pids()
            assert len(seen) == 2
            os.kill(seen[0], signal.SIGKILL)
            assert (await pool.elaborate(GOOD, deadline=60.0)).outcome == "ok"
            made = await pool.compile("theorem t : 2 + 2 = 4 := rfl", out=tmp_path / "T.olean", deadline=60.0)
            assert made.outcome == "ok" and made.olean == tmp_path / "T.olean" and (tmp_path / "T.olean").stat().st_size > 1000
            task = asyncio.create_task(pool.elaborate(HANG, deadline=60.0))
            await asyncio.sleep(0.3)
            busy = await pool.elaborate(GOOD, deadline=60.0, wait=0.05)
            assert busy.outcome == "infra" and "no worker was free" in busy.detail
            seen += pool.pids()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert (await pool.elaborate(GOOD, deadline=60.0)).outcome == "ok"
            seen += pool.pids()
            assert pool.stats.outcomes["ok"] == 3 and pool.stats.num_checks == 3
        with pytest.raises(RuntimeError, match="closed"):
            await pool.elaborate(GOOD, deadline=1.0)
        return seen

    for pid in asyncio.run(story()):
        until(lambda pid=pid: not alive(pid))  # type: ignore[misc]


def test_a_pool_without_fast_workers_still_elaborates(backend: EmbeddedBackend) -> None:
    async def story() -> CompileResult:
        async with Pool(backend, num_fast=0, num_isolated=1) as pool:
            return await pool.elaborate("example : 2 + 2 = 5 := rfl", deadline=60.0)

    result = asyncio.run(story())
    assert result.outcome == "rejected" and result.olean is None
    with pytest.raises(ValueError, match="at least one"):
        Pool(backend, num_fast=0, num_isolated=0)


def test_memory_stays_bounded_over_many_checks(backend: EmbeddedBackend) -> None:
    """A tenth of the measured run (docs/measured): after the first hundred checks, no more than 24 MiB are added."""
    worker = LspWorker(backend)
    try:
        sizes = []
        for index in range(400):
            source = f"theorem t{index} (p q : Prop) (h : p ∧ q) : q ∧ p := by\n  exact ⟨h.2, h.1⟩"
            assert worker.check(source, 60.0).outcome == "ok"
            sizes.append(rss_bytes(worker.pid or 0))
        assert sizes[-1] - sizes[99] < 24 << 20
    finally:
        worker.close()
