"""The workers: who is alive, who holds the fleet's weights, who takes the next request."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, Literal

import msgspec

from miles_rollout.router.config import RouterConfig
from miles_rollout.router.prefix import PrefixMap
from miles_rollout.upstream import Upstream, UpstreamError

logger = logging.getLogger("miles_rollout.router")
State = Literal["joining", "ready", "down", "stale", "foreign"]
"""stale: holds another weight version than the fleet. foreign: computes under another contract than the fleet."""
JSON = "Content-Type: application/json\r\n"
PAUSE, CONTINUE = "/pause_generation", "/continue_generation"


class NoWorker(Exception):
    """No worker can take the request. `busy`: they could, were they not full."""

    def __init__(self, message: str, *, busy: bool) -> None:
        super().__init__(message)
        self.busy = busy


class Target(msgspec.Struct, frozen=True):
    """What every worker must hold: a weight version, and the update request that brings it."""

    version: str
    body: dict[str, Any]


class Worker:
    """One server. `num_active` counts requests it is serving for this router."""

    def __init__(self, url: str, config: RouterConfig) -> None:
        self.data = Upstream(url, token=config.worker_token)
        self.control = Upstream(url, token=config.worker_token)
        self.pushes = Upstream(url, token=config.worker_token)
        self.url = self.data.url
        self.state: State = "joining"
        self.reason = ""
        self.leaving = False
        self.version: str | None = None
        self.digest: str | None = None
        self.paused: bool | None = False
        """What it took last, PAUSE or CONTINUE; None while that is not known."""
        self.telling = asyncio.Lock()
        self.num_active = 0
        self.num_served = 0
        self.num_failed = 0
        self.num_timeouts = 0
        self.check_now = asyncio.Event()
        self.watch: asyncio.Task[None] | None = None

    @property
    def serves(self) -> bool:
        """Whether it may be given requests."""
        return self.state == "ready" and not self.leaving

    def describe(self) -> dict[str, Any]:
        """For /workers."""
        state = "draining" if self.leaving else self.state
        return {
            "url": self.url, "state": state, "reason": self.reason, "weight_version": self.version,
            "contract_digest": self.digest, "num_active": self.num_active, "num_served": self.num_served,
            "num_failed": self.num_failed,
        }  # fmt: skip


class Fleet:
    """All workers. Every method runs on one event loop."""

    def __init__(self, config: RouterConfig) -> None:
        config.validate()
        self.config = config
        self.workers: dict[str, Worker] = {}
        self.target: Target | None = None
        self.digest: str | None = None
        self.counts: Counter[str] = Counter()
        self.paused = False
        """Paused engines answer no health check; then their reports alone tell that they are alive."""
        self.ending = False
        """Connections are cut because the router ends, not because workers are lost."""
        self._epoch = 0
        self._said: tuple[str, bytes] = (CONTINUE, b"{}")
        """PAUSE or CONTINUE with its body, whichever came last: what every worker must have taken."""
        self._resting = asyncio.Lock()
        self._updating = asyncio.Lock()
        self._num_updates = 0
        """Updates that run or wait; pushes to workers that lack the target make way for them."""
        self._again: asyncio.Task[str | None] | None = None
        """The push under way to a worker that lacks the target."""
        self._prefixes = PrefixMap()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._leaving: set[asyncio.Task[None]] = set()
        self.unsaved = ""
        """Why the state file does not hold the target; it is tried again at every health check."""
        if config.state is not None:
            self.target = _load(config.state)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a worker."""
        return len(self._waiting)

    # ------------------------------------------------------------------ membership

    def add(self, url: str) -> Worker:
        """Let a worker join; it serves once it was found healthy. Raises ValueError for an address that is none."""
        worker = Worker(url, self.config)
        known = self.workers.get(worker.url)
        if known is not None and not known.leaving:
            return known
        if known is not None:
            raise ValueError(f"{worker.url} is still leaving; add it again when it has gone")
        self.workers[worker.url] = worker
        worker.watch = asyncio.ensure_future(self._watch(worker))
        return worker

    def remove(self, url: str) -> Worker:
        """Give a worker nothing new, let it finish for `drain_s`, then forget it. Raises ValueError for an unknown one."""
        worker = self.workers.get(Upstream(url).url)
        if worker is None:
            raise ValueError(f"no worker {url}; there are {', '.join(self.workers) or 'none'}")
        if not worker.leaving:
            worker.leaving = True
            task = asyncio.ensure_future(self._see_off(worker))
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)
        return worker

    async def _see_off(self, worker: Worker) -> None:
        end = time.monotonic() + self.config.drain_s
        while worker.num_active and time.monotonic() < end:
            await asyncio.sleep(0.02)
        self._cut(worker)
        del self.workers[worker.url]
        if worker.watch is not None:
            worker.watch.cancel()

    async def close(self) -> None:
        """Stop watching and drop all connections."""
        tasks = [worker.watch for worker in self.workers.values() if worker.watch is not None] + list(self._leaving)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for worker in self.workers.values():
            self._cut(worker)
            worker.control.abort_all()

    # ------------------------------------------------------------------ choosing

    async def acquire(self, session: str | None, hashes: list[int], tried: Collection[str]) -> Worker:
        """A worker for one request, counted as active until `release`. Raises NoWorker after `wait_s`, or when too many wait."""
        worker = self._choose(session, hashes, tried)
        if worker is None:
            if len(self._waiting) >= self.config.max_waiting:
                raise NoWorker(f"{len(self._waiting)} requests wait already", busy=True)
            worker = await self._wait(session, hashes)
        worker.num_active += 1
        if self.config.policy == "cache-aware":
            self._prefixes.record(hashes, worker.url)
        return worker

    def acquire_other(self, hashes: list[int], tried: Collection[str]) -> Worker | None:
        """A worker not tried yet that is free now, counted as active, or None."""
        able = [w for w in self.workers.values() if w.serves and w.num_active < self.config.max_per_worker and w.url not in tried]
        if not able:
            return None
        worker = min(able, key=lambda w: (w.num_active, w.num_served))
        worker.num_active += 1
        return worker

    async def _wait(self, session: str | None, hashes: list[int]) -> Worker:
        try:
            async with asyncio.timeout(self.config.wait_s):
                while True:
                    turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
                    self._waiting.append(turn)
                    try:
                        await turn
                    except asyncio.CancelledError:
                        if turn.done() and not turn.cancelled():
                            self._wake(1)  # the turn was given to a request that has just left
                        raise
                    finally:
                        with contextlib.suppress(ValueError):
                            self._waiting.remove(turn)
                    worker = self._choose(session, hashes, ())
                    if worker is not None:
                        return worker
        except TimeoutError:
            busy = any(worker.serves for worker in self.workers.values())
            what = "all workers are busy" if busy else "no worker serves"
            raise NoWorker(f"{what}; waited {self.config.wait_s:g} s", busy=busy) from None

    def _choose(self, session: str | None, hashes: list[int], tried: Collection[str]) -> Worker | None:
        able = [w for w in self.workers.values() if w.serves and w.num_active < self.config.max_per_worker]
        able = [w for w in able if w.url not in tried] or able
        if not able:
            return None
        if session is not None:
            return max(able, key=lambda w: hashlib.blake2b(f"{session}\0{w.url}".encode(), digest_size=8).digest())
        idlest = min(able, key=lambda w: (w.num_active, w.num_served))
        if self.config.policy == "cache-aware" and hashes:
            owner, _ = self._prefixes.match(hashes)
            known = next((w for w in able if w.url == owner), None)
            if known is not None and known.num_active <= 2 * idlest.num_active + 8:
                self.counts["prefix_hits"] += 1
                return known
        return idlest

    def release(self, worker: Worker, *, served: bool) -> None:
        """The request is done, or gone elsewhere."""
        worker.num_active -= 1
        worker.num_served += served
        self._wake(1)

    def _wake(self, count: int | None = None) -> None:
        asleep = [turn for turn in self._waiting if not turn.done()]
        for turn in asleep[:count]:
            turn.set_result(None)

    def failed(self, worker: Worker, error: Exception) -> None:
        """A request met a broken connection: nothing more for this worker until a check finds it well."""
        worker.num_failed += 1
        if worker.state == "ready":
            self._turn(worker, "down", str(error))
        worker.check_now.set()

    def lost(self, worker: Worker, error: Exception) -> None:
        """Its process is gone."""
        self._turn(worker, "down", str(error))
        worker.check_now.set()

    # ------------------------------------------------------------------ health

    def _turn(self, worker: Worker, state: State, reason: str = "") -> None:
        if worker.state == state:
            worker.reason = reason
            return
        logger.info("worker %s: %s -> %s %s", worker.url, worker.state, state, reason)
        worker.state, worker.reason = state, reason
        if state == "ready":
            self._wake()
        elif state != "joining":
            self._prefixes.forget(worker.url)
            self._cut(worker)

    @staticmethod
    def _cut(worker: Worker) -> None:
        """What it still computes must not be delivered: unanswered requests go elsewhere, streams end with an error."""
        worker.data.abort_all()
        worker.pushes.abort_all()

    async def _watch(self, worker: Worker) -> None:
        while True:
            try:
                if self.unsaved:
                    self._save()
                await self._check(worker)
            except Exception:  # a watcher that dies would leave its worker unwatched for ever
                logger.exception("the check of worker %s failed", worker.url)
                self._turn(worker, "down", "internal error in the health check")
            worker.check_now.clear()
            with contextlib.suppress(TimeoutError):
                # Not `wait_for`: on Python 3.11 it forgets a cancellation that comes with the event, and we would never end.
                async with asyncio.timeout(self.config.health_interval_s):
                    await worker.check_now.wait()

    async def _check(self, worker: Worker) -> None:
        started, epoch = time.monotonic(), self._epoch
        try:
            status, body = await worker.control.request("GET", "/get_model_info", timeout_s=self.config.health_s)
            info = msgspec.json.decode(body, type=dict[str, Any]) if status == 200 else None
            if info is not None and (refused := await self._told(worker)):
                self._turn(worker, "down", refused)
                return
            if info is not None and not self.paused:
                status, _ = await worker.control.request("GET", "/health", timeout_s=self.config.health_s)
                if self.paused:
                    return  # meanwhile, so its health tells nothing
        except (UpstreamError, msgspec.MsgspecError) as error:
            slow = "no reply within" in str(error)
            worker.num_timeouts = worker.num_timeouts + 1 if slow else self.config.fail_after
            if worker.data.last_byte <= started and worker.num_timeouts >= self.config.fail_after:
                self._turn(worker, "down", str(error))
            return
        worker.num_timeouts = 0
        if status != 200 or info is None:
            self._turn(worker, "down", f"the health check answered HTTP {status}")
            return
        if self._updating.locked() or epoch != self._epoch:
            return  # what was read may be of before the update
        await self._judge(worker, str(info.get("weight_version")), info.get("contract_digest"))

    async def _judge(self, worker: Worker, version: str, digest: str | None) -> None:
        worker.version, worker.digest = version, digest
        if self.digest is None:
            self.digest = digest
        if digest != self.digest:
            self._turn(worker, "foreign", f"its contract is {digest}, the fleet's {self.digest}")
        elif self.target is None:
            others = [w for w in self.workers.values() if w.state == "ready" and w is not worker]
            if any(_older(version, w.version) for w in others):
                self._turn(worker, "stale", f"it holds version {version}, others more, and none was sent through this router")
                return
            for other in others:
                if _older(other.version, version):
                    self._turn(other, "stale", f"it holds version {other.version}, {worker.url} holds {version}")
            self._turn(worker, "ready")
        elif version == self.target.version:
            self._turn(worker, "ready")
        else:
            self._turn(worker, "stale", f"it holds version {version}, the fleet {self.target.version}")
            await self._push_again(worker)

    # ------------------------------------------------------------------ weights

    async def _push_again(self, worker: Worker) -> None:
        async with self._updating:
            if self._num_updates or self.target is None or worker.version == self.target.version or worker.leaving:
                return
            self.counts["repushes"] += 1
            push = self._again = asyncio.ensure_future(self._push(worker, self.target))
            try:
                await asyncio.wait({push})
            finally:
                push.cancel()
            if push.cancelled():
                return  # for an update; what that one brings is what the worker lacks now
            error = push.result()
            if error is None:
                self._turn(worker, "ready")
            else:
                self._turn(worker, "stale", error)

    async def _push(self, worker: Worker, target: Target) -> str | None:
        """Bring one worker to a version; None on success, else why not. The worker itself is asked what it holds."""
        why = ""
        try:
            body = msgspec.json.encode(target.body)
            status, reply = await worker.pushes.request("POST", "/update_weights_from_disk", body, timeout_s=self.config.update_s)
            why = "" if status == 200 else _message(reply) or f"HTTP {status}"
        except UpstreamError as error:
            why = str(error)
        try:
            status, reply = await worker.control.request("GET", "/get_model_info", timeout_s=self.config.health_s)
            worker.version = str(msgspec.json.decode(reply, type=dict[str, Any]).get("weight_version"))
        except (UpstreamError, msgspec.MsgspecError) as error:
            return why or str(error)
        return None if worker.version == target.version else why or f"it still holds version {worker.version}"

    async def update(self, body: dict[str, Any]) -> tuple[Target | None, dict[str, str | None]]:
        """Bring all workers to a new version: the target and, per worker, None or why it lacks it.

        When none took it, the target is None and the fleet keeps its old weights. Otherwise the version is the fleet's, and
        a worker that lacks it serves nothing until it has it; it is tried again at every health check. One that lacked the
        version before is left to those checks while another is ready: nobody waits for a worker that hangs.
        """
        self._num_updates += 1
        if self._again is not None:
            self._again.cancel()
        try:
            return await self._update(body)
        finally:
            self._num_updates -= 1

    async def _update(self, body: dict[str, Any]) -> tuple[Target | None, dict[str, str | None]]:
        async with self._updating:
            workers = [w for w in self.workers.values() if not w.leaving]
            if not any(w.state in ("ready", "stale") for w in workers):
                raise NoWorker("no worker serves", busy=False)
            given = body.get("weight_version")
            held = [int(w.version) for w in workers if w.version is not None and w.version.isdigit()]
            held += [int(self.target.version)] if self.target is not None and self.target.version.isdigit() else []
            version = str(max(held, default=0) + 1) if given is None else str(given)
            if version.isdigit() and int(version) >= 2**63:
                raise ValueError(f"weight_version {version} is too large; versions lie below 2^63")
            if version.isdigit() and any(int(version) <= each for each in held):
                raise ValueError(f"weight_version {version} does not grow; the fleet holds {max(held)}")
            target = Target(version, body | {"weight_version": version})
            up = [w for w in workers if w.state == "ready"] or [w for w in workers if w.state == "stale"]
            errors = await asyncio.gather(*(self._push(w, target) for w in up))
            found: dict[str, str | None] = {w.url: f"it is {w.state}: {w.reason}" for w in workers}
            found |= {w.url: error for w, error in zip(up, errors, strict=True)}
            self._epoch += 1
            if all(error is not None for error in errors):
                logger.warning(
                    "no worker took weight version %s: %s", version, "; ".join(f"{u}: {why}" for u, why in found.items())
                )
                return None, found
            # Workers hold it, so it is the fleet's, kept in a file or not.
            self.target = target
            self._save()
            self.counts["updates"] += 1
            num_lacking = sum(error is not None for error in found.values())
            logger.info("weight version %s is the fleet's; %d of %d workers lack it", version, num_lacking, len(found))
            for worker in self.workers.values():
                if found.get(worker.url, "it joined during the update") is None:
                    self._turn(worker, "ready")
                elif worker.state == "ready" or worker in up:
                    self._turn(worker, "stale", found.get(worker.url) or "it joined during the update")
                worker.check_now.set()
            return target, found

    def _save(self) -> None:
        """Keep the target in the state file; what hinders that is logged once and kept in `unsaved`."""
        path, why = self.config.state, ""
        if path is not None and self.target is not None:
            partial = path.with_name(path.name + ".partial")
            try:
                with partial.open("wb") as file:
                    file.write(msgspec.json.encode(self.target))
                    file.flush()
                    os.fsync(file.fileno())
                partial.replace(path)
            except OSError as error:
                why = f"{path} could not be written ({error.strerror}); a router started now would not know the fleet's weights"
        if why and why != self.unsaved:
            logger.error("%s", why)
        self.unsaved = why

    async def rest(self, path: str, body: bytes) -> dict[str, tuple[int, bytes]]:
        """PAUSE all workers that are up, or have all CONTINUE; the replies of those that are up or took it.

        Without any that takes it, the fleet is paused or not as before. Others are told at their next health check.
        """
        async with self._resting:
            before, pause = (self._said, self.paused), path == PAUSE
            self._said = (path, body)
            self.paused = self.paused or pause  # at once: who pauses first must not count as down while others are waited for
            up = {w.url for w in self.workers.values() if w.state in ("ready", "stale")}
            chosen = [w for w in self.workers.values() if w.url in up or not pause]  # who is down now may have paused before

            async def one(worker: Worker) -> tuple[int, bytes]:
                try:
                    return await self._tell(worker, self.config.health_s * 4)
                except UpstreamError as error:
                    return _unreached(error)

            replies = dict(zip((w.url for w in chosen), await asyncio.gather(*map(one, chosen)), strict=True))
            if any(status == 200 for status, _ in replies.values()):
                self.paused = pause
            else:
                self._said, self.paused = before
            for worker in chosen:
                worker.check_now.set()
            return {url: reply for url, reply in replies.items() if url in up or reply[0] == 200}

    async def _tell(self, worker: Worker, timeout_s: float) -> tuple[int, bytes]:
        """Send a worker what was said last. Raises UpstreamError."""
        async with worker.telling:
            (path, body), before = self._said, worker.paused
            worker.paused = None
            status, reply = await worker.control.request("POST", path, body, timeout_s=timeout_s)
            worker.paused = path == PAUSE if status == 200 else before
            return status, reply

    async def _told(self, worker: Worker) -> str:
        """Have a worker pause or go on as the fleet does where it has not; why it must not join. Raises UpstreamError."""
        path, comes = self._said[0], worker.state in ("joining", "down")
        known = worker.paused is (path == PAUSE) and not (path == PAUSE and comes)  # its process may be another one than before
        if known or worker.telling.locked():
            return ""
        status, reply = await self._tell(worker, self.config.health_s)
        return f"the fleet is paused, and {path} failed: {_message(reply)}" if status != 200 and path == PAUSE and comes else ""

    async def everywhere(self, path: str, body: bytes, workers: Iterable[Worker] | None = None) -> dict[str, tuple[int, bytes]]:
        """POST to all workers that are up; 502 stands for one that could not be reached."""
        chosen = [w for w in self.workers.values() if w.state in ("ready", "stale")] if workers is None else list(workers)

        async def one(worker: Worker) -> tuple[int, bytes]:
            try:
                return await worker.control.request("POST", path, body, timeout_s=self.config.health_s * 4)
            except UpstreamError as error:
                return _unreached(error)

        return dict(zip((w.url for w in chosen), await asyncio.gather(*map(one, chosen)), strict=True))


def _load(path: Path) -> Target | None:
    """What the state file holds, None before there is one. Raises ValueError for a place where none can be kept."""
    if not path.parent.is_dir():
        raise ValueError(f"--state {path}: {path.parent} is no directory; make it first")
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"--state {path}: {path.parent} cannot be written to")
    try:
        return msgspec.json.decode(path.read_bytes(), type=Target)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"--state {path}: {error.strerror}; name a file") from None
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path}: not a router's state: {error}; delete it to start afresh") from None


def _unreached(error: UpstreamError) -> tuple[int, bytes]:
    return 502, msgspec.json.encode({"error": {"message": str(error)}})


def _older(version: str | None, than: str | None) -> bool:
    return version is not None and than is not None and version.isdigit() and than.isdigit() and int(version) < int(than)


def _message(reply: bytes) -> str:
    try:
        found = msgspec.json.decode(reply)
    except msgspec.MsgspecError:
        return reply[:200].decode(errors="replace")
    error = found.get("error", found) if isinstance(found, dict) else found
    return str(error.get("message", error) if isinstance(error, dict) else error)
