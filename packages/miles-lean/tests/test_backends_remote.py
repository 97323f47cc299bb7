"""Backends without a Lean of their own: the REPL's JSON, HTTP servers, recordings."""

from __future__ import annotations

import asyncio
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from lean_doubles import ScriptedBackend, scripted_judge

from miles_lean.backends.discover import find_backend
from miles_lean.backends.http import HttpBackend
from miles_lean.backends.repl import ReplBackend
from miles_lean.backends.replay import RecordingBackend, ReplayBackend
from miles_lean.reward import Verifier
from miles_lean.reward.connect import LazyJudge, connect
from miles_lean.server.app import make_app
from miles_lean.server.service import Limits, Service
from miles_lean.statement import Statement

FAKE = [sys.executable, str(Path(__file__).with_name("fake_repl.py"))]


@pytest.fixture
def repl() -> Iterator[ReplBackend]:
    backend = ReplBackend(FAKE, size=1, version="4.30.0")
    yield backend
    backend.close()


def pid_of(backend: ReplBackend) -> int:
    process = backend._all[0]._process
    assert process is not None
    return process.pid


def test_repl_answers_and_headers_are_reused(repl: ReplBackend) -> None:
    source = "import Mathlib\nopen Nat\n\ntheorem a : 1 = 1 := by\n  wrong"
    first = repl.elaborate(source, deadline=10)
    assert first.outcome == "rejected" and (first.messages[0].line, first.messages[0].column) == (5, 2)
    assert "environment 0" in first.messages[0].text
    again = repl.elaborate(source, deadline=10)
    assert "environment 0" in again.messages[0].text, "the header's environment must be used again"
    other = repl.elaborate("import Aesop\ntheorem a : 1 = 1 := wrong", deadline=10)
    assert "environment 3" in other.messages[0].text and other.messages[0].line == 2
    assert repl.elaborate("theorem a : 1 = 1 := rfl", deadline=10).outcome == "ok"


def test_what_a_program_prints_does_not_shift_answers(repl: ReplBackend) -> None:
    assert repl.elaborate("#noise\n", deadline=10).outcome == "ok"
    assert repl.elaborate("wrong", deadline=10).outcome == "rejected"
    assert repl.elaborate("#noise wrong", deadline=10).outcome == "rejected"
    assert repl.elaborate("fine", deadline=10).outcome == "ok"


def test_repl_death_and_hang_are_told_apart_and_survived(repl: ReplBackend) -> None:
    assert repl.elaborate("fine", deadline=10).outcome == "ok"
    dead = repl.elaborate("#die", deadline=10)
    assert dead.outcome == "crash" and "exit code 3" in dead.detail
    assert repl.elaborate("fine", deadline=10).outcome == "ok"
    pid, started = pid_of(repl), time.monotonic()
    assert repl.elaborate("#hang", deadline=0.3).outcome == "timeout"
    assert time.monotonic() - started < 0.3 + 5.0  # it hangs for ever
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert repl.elaborate("fine", deadline=10).outcome == "ok"
    absent = ReplBackend(["/nowhere/repl"], size=1)
    assert absent.elaborate("fine", deadline=1).outcome == "infra"


def test_a_recording_repeats_answers_and_guesses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    recorder = RecordingBackend(ScriptedBackend(), path)
    recorded = [recorder.elaborate(source, deadline=1) for source in ("fine", "bad", "infra")]
    recorder.close()
    replay = ReplayBackend(path)
    assert [replay.elaborate(source, deadline=1) for source in ("fine", "bad")] == recorded[:2]
    assert replay.elaborate("infra", deadline=1).outcome == "infra"
    assert (
        "never asked" in replay.elaborate("new", deadline=1).detail or "no answer" in replay.elaborate("new", deadline=1).detail
    )
    assert replay.capabilities.identity == "scripted-1" and not replay.capabilities.can_replay
    with pytest.raises(FileExistsError):
        RecordingBackend(ScriptedBackend(), path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="no recording"):
        ReplayBackend(path)


@pytest.fixture
def address() -> Iterator[str]:
    """A real server on a free port, around a scripted Lean."""
    import uvicorn

    ready, stop, found = threading.Event(), threading.Event(), []

    async def main() -> None:
        service = Service(Verifier(ScriptedBackend(), scripted_judge, retry_s=0.001), Limits(slots=1, queue_size=1))
        server = uvicorn.Server(uvicorn.Config(make_app(service), port=0, log_level="error", lifespan="off"))
        task = asyncio.create_task(server._serve())
        while not server.started:
            await asyncio.sleep(0.005)
        found.append(f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}")
        ready.set()
        await asyncio.to_thread(stop.wait, 60)
        server.should_exit = True
        await task
        await service.close()

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    assert ready.wait(20)
    yield found[0]
    stop.set()
    thread.join(20)


def test_http_backend_speaks_to_our_server(address: str) -> None:
    backend = HttpBackend(address)
    assert backend.capabilities.identity == "scripted-1" and not backend.is_kimina
    bad = backend.elaborate("bad", deadline=5)
    assert bad.outcome == "rejected" and bad.messages[0].end_column == 5
    assert [backend.elaborate(word, deadline=5).outcome for word in ("fine", "hang", "crash", "infra")] == [
        "ok", "timeout", "crash", "infra"
    ]  # fmt: skip

    async def main() -> list[str]:
        async with connect(address, retries=0) as verifier:
            statement = Statement.parse("theorem t : 1 = 1 := by sorry\n-- after\n")
            outcomes = await asyncio.gather(*(verifier.verify(statement, proof) for proof in ("rfl", "bad", "cheat", "infra")))
            return [outcome.category for outcome in outcomes]

    assert asyncio.run(main()) == ["proved", "lean_error", "judge", "infra"]


def test_http_backend_speaks_to_a_kimina_server_and_refuses_to_judge_there(address: str) -> None:
    backend = HttpBackend(address, kimina=True)
    outcomes = [backend.elaborate(word, deadline=5).outcome for word in ("fine", "bad", "hang", "crash", "infra")]
    assert outcomes == ["ok", "rejected", "timeout", "crash", "infra"]
    judged = backend.judge("theorem t : 1 = 1 := by\n  sorry", "theorem t : 1 = 1 := by\n  rfl", "t", 5)
    assert judged.infra and not judged.accepted


def test_no_server_is_an_infrastructure_failure() -> None:
    backend = HttpBackend("http://127.0.0.1:9", kimina=False, grace_s=0.0)
    assert backend.elaborate("fine", deadline=0.3).outcome == "infra"
    with pytest.raises(ValueError, match="no server address"):
        HttpBackend("127.0.0.1:8000")
    with pytest.raises(ValueError, match="no backend is called 'coq'; known: embedded"):
        find_backend("coq")


def test_backends_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("MILES_LEAN_REPL", raising=False)
    with pytest.raises(RuntimeError, match="leanprover-community/repl"):
        find_backend("repl")
    (tmp_path / "repl").write_text("#!/bin/sh\n")
    (tmp_path / "repl").chmod(0o755)
    assert find_backend("repl").command() == [str(tmp_path / "repl")]
    assert find_backend(f"repl:{tmp_path}").command() == ["lake", "env", str(tmp_path / "repl")]
    monkeypatch.setenv("MILES_LEAN_REPL", "wrap 'a b' repl")
    assert find_backend("repl").command() == ["wrap", "a b", "repl"]
    assert isinstance(find_backend("http://127.0.0.1:9"), HttpBackend)
    recording = RecordingBackend(ScriptedBackend(), tmp_path / "answers.jsonl")
    recording.elaborate("fine", deadline=5)
    recording.close()
    found = find_backend(f"replay:{tmp_path / 'answers.jsonl'}")
    assert found.elaborate("fine", deadline=5).outcome == "ok" and found.elaborate("other", deadline=5).outcome == "infra"
    verdict = LazyJudge(found, 1)("theorem t : True := by sorry", "theorem t : True := trivial", "t", 5.0)
    assert verdict.infra and "writes no .olean files" in verdict.reason
    for name in ("replay", "embedded:x", ""):
        monkeypatch.setenv("MILES_LEAN_BACKEND", "none")
        with pytest.raises((ValueError, RuntimeError)):
            find_backend(name)
