"""How the processes of a tensor-parallel engine end: in order, in time, by name, and never later than whoever started them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine_cases import ask
from test_engine_parallel import WIDE, of_one

from miles_rollout.engines.embedded import peers
from miles_rollout.engines.embedded.config import EmbeddedConfig
from miles_rollout.engines.embedded.lead import LeadingCore
from miles_rollout.engines.embedded.peers import Peers
from miles_rollout.engines.embedded.ranks import Call, Start
from miles_rollout.engines.embedded.replay import StepGraphs
from miles_rollout.engines.embedded.reply import EngineFailure

PATIENCE_S = 60.0
HOLDS_THE_LOCK = """
import ctypes, os, sys, threading
from miles_rollout.child import end_with_parent
if sys.argv[1] == "kernel":
    end_with_parent()
else:
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
sys.setswitchinterval(1e6)
keeps_the_lock = ctypes.PyDLL(None)  # from "ready" on no other thread of this process runs any more
keeps_the_lock.write(1, b"ready\\n", 6)
keeps_the_lock.sleep(600)
"""
STARTS_TWO = """
import os, signal, subprocess, sys
kinds = ("kernel", "thread")
pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
children = [subprocess.Popen([sys.executable, "-c", sys.argv[1], kind], **pipes) for kind in kinds]
assert [child.stdout.readline() for child in children] == ["ready\\n"] * 2
print(*(child.pid for child in children), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
LEADS = """
import sys
sys.path.insert(0, sys.argv[1])
import subprocess
from engine_cases import ask
from test_engine_parallel import WIDE, of_one
from miles_rollout.engines.embedded.ranks import Add, Call
if __name__ == "__main__":
    core = of_one(WIDE, tensor_parallel=2)._core
    core.peers.tell(Add(ask("a", max_new_tokens=30), 0, (2,), False))
    core.peers.tell(Call("step"))  # and no step here: the other rank waits for a sum
    other = subprocess.Popen(["sleep", "600"], stdin=subprocess.PIPE, start_new_session=True)
    print(core.peers._processes[0].pid, other.pid, flush=True)
    sys.stdin.read()
"""


def runs(pid: int) -> bool:
    """Whether that process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def eventually(holds: Callable[[], bool]) -> bool:
    until = time.monotonic() + PATIENCE_S
    while not holds() and time.monotonic() < until:
        time.sleep(0.02)
    return holds()


@contextlib.contextmanager
def ended_at_last(pids: list[int]) -> Any:
    try:
        yield
    finally:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


class HeldGroup:
    """As NCCL's: cut off, it waits for the graphs that hold it."""

    def __init__(self) -> None:
        self.graphs_are_gone = threading.Event()
        self.is_cut_off = False

    def abort(self) -> None:
        assert self.graphs_are_gone.wait(PATIENCE_S)
        self.is_cut_off = True


def test_graphs_go_before_the_group_they_hold():
    group, end = HeldGroup(), Peers([], None)
    end.group = group
    end.close(group.graphs_are_gone.set)
    assert group.is_cut_off and end.group is None
    end.close()


def test_a_group_that_is_not_let_go_is_named_and_not_waited_for(monkeypatch, caplog):
    """The control: what happens to whoever leaves the graphs to Python."""
    monkeypatch.setattr(peers, "END_S", 0.1)
    group, end = HeldGroup(), Peers([], None)
    end.group = group
    with caplog.at_level(logging.ERROR):
        end.close()
    assert not group.is_cut_off and "the process group of the tensor-parallel engine to be cut off" in caplog.text
    group.graphs_are_gone.set()


def test_graphs_end_also_for_whoever_holds_them():
    class Graph:
        resets = 0

        def reset(self) -> None:
            self.resets += 1

    graphs, held = StepGraphs.__new__(StepGraphs), Graph()
    graphs._captured = {(1, 64): type("Captured", (), {"graph": held})()}  # type: ignore[dict-item]
    graphs.end()
    assert held.resets == 1 and not graphs._captured


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_a_sum_that_fails_because_a_rank_has_ended_says_which(kind):
    """Torch raises either of a group that is being cut off; without such a rank both come as they are."""
    core = LeadingCore.__new__(LeadingCore)
    core._peers = Peers([], None)
    with pytest.raises(kind, match="is not initialized"), core._told(Call("step")):
        raise kind("the group is not initialized")
    with pytest.raises(EngineFailure, match="^rank 1 has ended$") as caught, core._told(Call("step")):
        core._peers.failure = "rank 1 has ended"
        raise kind("the group is not initialized")
    assert isinstance(caught.value.__cause__, kind)


def test_a_rank_that_does_not_read_is_not_waited_for_without_end():
    process = subprocess.Popen(["sleep", "600"], stdin=subprocess.PIPE)
    try:
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        peers._send(process, b"x", 0.1)
        with pytest.raises(OSError, match="it has not read for 0.1 s"):
            peers._send(process, bytes(1 << 20), 0.1)
    finally:
        process.kill()
        process.wait()


def test_a_rank_that_takes_no_message_since_it_was_killed_is_named_with_its_exit_code():
    process, end = subprocess.Popen(["sleep", "600"], stdin=subprocess.PIPE), Peers([], None)
    assert process.stdin is not None
    os.set_blocking(process.stdin.fileno(), False)
    process.kill()
    process.wait()
    end._processes.append(process)
    listener = threading.Timer(0.3, lambda: setattr(end, "failure", "rank 1 has ended (exit code -9)"))
    listener.start()
    with pytest.raises(EngineFailure, match="exit code -9"):
        end.tell(Call("step"))
    listener.join()
    process.stdin.close()


def test_a_rank_that_does_not_take_what_it_starts_with_is_named(monkeypatch):
    def fails(*_: Any) -> None:
        raise BrokenPipeError("nobody reads")

    monkeypatch.setattr(peers, "_send", fails)
    monkeypatch.setattr(peers.sys, "executable", "false")
    start = Start(
        rank=1, ranks=2, port=0, device="cpu", threads=1, deadline_s=1.0, shape={}, contract="", shards=8,
        config=EmbeddedConfig(), num_pages=1, tokenizer="", weight_version=0,
    )  # fmt: skip
    with pytest.raises(EngineFailure, match=r"rank 1 of the tensor-parallel engine has ended \(exit code 1\)"):
        Peers([start], None)


class Stuck:
    """A process that no signal ends."""

    pid = 7

    def __init__(self, waits: list[float]) -> None:
        self.waits, self.signals = waits, []

    def wait(self, timeout: float) -> None:
        self.waits.append(timeout)
        time.sleep(timeout)
        raise subprocess.TimeoutExpired("stuck", timeout)

    def send_signal(self, number: int) -> None:
        self.signals.append(number)

    def kill(self) -> None:
        self.signals.append(signal.SIGKILL)


def test_ranks_that_stay_share_one_deadline_and_are_left_after_sigkill(monkeypatch, caplog):
    monkeypatch.setattr(peers, "END_S", 0.2)
    monkeypatch.setattr(peers, "_STACKS_S", 0.0)
    waits: list[float] = []
    stuck = [Stuck(waits) for _ in range(3)]
    with caplog.at_level(logging.ERROR):
        peers._end(stuck, time.monotonic() + 0.2)  # type: ignore[arg-type]
    assert len(waits) == 6 and sum(waits[:3]) < 0.21 and sum(waits[3:]) < 0.21, "not 0.2 s each"
    assert all(each.signals == [signal.SIGUSR1, signal.SIGKILL] for each in stuck)
    assert "rank 1, rank 2, rank 3 of the tensor-parallel engine: not ended within 0.2 s" in caplog.text
    assert "rank 3 (process 7) of the tensor-parallel engine: still there 0.2 s after SIGKILL" in caplog.text


def test_an_engine_closes_while_its_step_waits_for_a_rank_that_stands_still(monkeypatch):
    monkeypatch.setattr("miles_rollout.engines.embedded.engine._GRACE_S", 0.2)

    async def main() -> int:
        engine = of_one(WIDE, tensor_parallel=2)
        pid: int = engine._core.peers._processes[0].pid  # type: ignore[union-attr]
        with ended_at_last([pid]):
            os.kill(pid, signal.SIGSTOP)
            waits = asyncio.ensure_future(engine.generate(ask("a", max_new_tokens=30)))
            while engine._core._scheduler.num_running == 0:  # type: ignore[union-attr]
                await asyncio.sleep(0.01)  # until it is in the step that cannot end
            await asyncio.wait_for(engine.close(), PATIENCE_S)
            with pytest.raises(EngineFailure, match="the engine"):
                await waits
            return pid

    assert not runs(asyncio.run(main()))


def test_a_rank_ends_with_a_leader_that_is_killed_while_it_waits_for_it():
    command = [sys.executable, "-c", LEADS, str(Path(__file__).parent)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as leader:
        assert leader.stdout is not None
        rank, other = map(int, leader.stdout.readline().split())
        with ended_at_last([rank, other]):
            assert runs(rank) and runs(other)
            leader.kill()
            assert eventually(lambda: not runs(rank))
            assert runs(other), "the control: a child that does nothing about it stays"


def test_a_process_that_keeps_pythons_lock_ends_with_whoever_started_it():
    found = subprocess.run([sys.executable, "-c", STARTS_TWO, HOLDS_THE_LOCK], stdout=subprocess.PIPE, text=True)
    kernel, thread = map(int, found.stdout.split())
    with ended_at_last([kernel, thread]):
        assert found.returncode == -signal.SIGKILL and eventually(lambda: not runs(kernel))
        assert runs(thread), "the control: a thread that watches cannot run"
