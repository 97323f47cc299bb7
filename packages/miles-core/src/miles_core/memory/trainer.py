"""The memory of a trainer: its regions by tag, sleeping and waking, and where its optimizer lives."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from miles_core.memory.config import MemoryConfig
from miles_core.memory.evidence import Refusal, refusal
from miles_core.memory.homes import PAD, StateHome
from miles_core.memory.ladder import Ladder, OutOfRoom, Rung, is_out_of_memory
from miles_core.memory.peers import Peers
from miles_core.memory.regions import Moved, Mover, Region, Target
from miles_core.memory.slabs import HostSlabs
from miles_core.memory.stack import KernelStack
from miles_core.memory.together import Together
from miles_kernels.checksum import forget_tables

TRAINER_TAGS = ("masters", "moments", "tables", "weights", "reference", "draft")
"""In the order they come back: weights may be computed from masters. Tables are those that turn heads by position."""


PASSES = "forward and backward"
"""The phase of a step that is done again as a whole."""
T = TypeVar("T")


class Recomputing(Protocol):
    """A model that can trade time for memory without changing a bit."""

    gradient_checkpointing: bool


class _Optimizer(Protocol):
    held: list[Tensor]
    masters: list[Tensor]
    exp_avg: list[Tensor]
    exp_avg_sq: list[Tensor]
    home: StateHome | None

    @property
    def is_between_updates(self) -> bool: ...

    def rebuild_weights(self) -> None: ...

    def rehouse(self, home: Callable[[Sequence[int], int], StateHome]) -> None: ...


class TrainerMemory:
    """Moves what a trainer holds by tag, and makes room when there is none.

    `weights`, `reference` and `tables` yield the tensors of model and frozen policy, and what both look up; `model` is what can
    recompute its layers. `place` is the rank and number of processes that work together, `peers` are their groups.

    Example: memory.sleep(); ...; memory.wake()
    """

    def __init__(
        self,
        optimizer: _Optimizer,
        weights: Callable[[], Iterable[Tensor]],
        reference: Callable[[], Iterable[Tensor]],
        device: torch.device,
        config: MemoryConfig,
        *,
        model: Recomputing | None = None,
        place: tuple[int, int] | None = None,
        splits_gradients: bool = False,
        peers: Sequence[Peers] = (),
        tables: Callable[[], Iterable[Tensor]] = list,
    ) -> None:
        self.optimizer, self.device, self.config = optimizer, device, config
        self._model = model
        self.splits_gradients = splits_gradients
        self.split = 1
        """Parts that a micro-batch is cut into."""
        self.saves_on_host = False
        """Whether what the forward pass keeps for the backward one waits on the host."""
        self.draft: Callable[[], Iterable[Tensor]] = list
        """What a draft in training holds: weights, masters, moments. Set by whoever trains one."""
        self.facts = Refusal(device)
        self._peers = tuple(peers)
        self._stack = (
            KernelStack(device) if any(each.own for each in self._peers) else None
        )  # alone, an engine may be at work in this process
        self._together = None if place is None else Together(*place, on_cuda=device.type == "cuda", peers=self._peers)
        rungs = [
            Rung("free cached blocks", self._free),
            Rung("optimizer state to the host", self._rehouse),
            Rung("smaller pieces of the update", self._smaller_pieces),
            Rung("smaller micro-batches", self._smaller),
            Rung("recompute layers", self._recompute),
            Rung("activations to the host", self._activations_away),
        ]
        self.ladder = Ladder(rungs, report=self._report, enabled=config.recover)
        rebuild = optimizer.rebuild_weights if self._has_masters else None
        self.mover = Mover(
            [
                Region(tag="masters", tensors=lambda: optimizer.masters if self._own_masters else []),
                Region(tag="moments", tensors=lambda: [] if optimizer.home else [*optimizer.exp_avg, *optimizer.exp_avg_sq]),
                Region(tag="tables", tensors=tables),
                Region(tag="weights", tensors=weights, rebuild=rebuild),
                Region(tag="reference", tensors=reference),
                Region(tag="draft", tensors=lambda: self.draft()),
            ],
            device,
            directory=None if config.directory is None else Path(config.directory),
            verify=config.verify,
        )

    @property
    def _has_masters(self) -> bool:
        """Whether the weights are rounded from a float32 copy."""
        optimizer = self.optimizer
        return bool(optimizer.held) and all(m is not h for m, h in zip(optimizer.masters, optimizer.held, strict=True))

    @property
    def _own_masters(self) -> bool:
        return self.optimizer.home is None and self._has_masters

    def offload(self, tags: Iterable[str], target: Target | None = None) -> list[Moved]:
        """Move tags off the device. Without a target: weights with masters are dropped, everything else as configured."""
        return [self.mover.offload(tag, target or self._default(tag)) for tag in _ordered(tags, reverse=True)]

    def onload(self, tags: Iterable[str]) -> list[Moved]:
        """Bring tags back, with weights that were dropped their masters, and with any weights their tables. Idempotent."""
        if self._stack is not None:
            self._stack.restore()
        wanted = set(tags)
        if "weights" in wanted and self.mover.away.get("weights") == "drop":
            wanted.add("masters")
        if wanted & {"weights", "reference"}:
            wanted.add("tables")
        return [self.mover.onload(tag) for tag in _ordered(wanted)]

    def sleep(self) -> list[Moved]:
        """Everything off the device, communicators too, and what the allocator kept given back. Collective.

        Among several processes one that finds no room for what leaves ends all of them in OutOfRoom.
        """
        with nullcontext() if self._together is None else self._together.alike("sleep", self._report):
            moved = self.offload(TRAINER_TAGS)
            if self.device.type == "cuda":
                forget_tables()  # they lie in what the passes left free, and would keep hundreds of MiB of it from the driver
            empty_device(self.device)
            for peers in self._peers:
                peers.release()
            if self._stack is not None:
                self._stack.shrink()
        return moved

    def wake(self) -> list[Moved]:
        """Everything back; communicators are made when they are first used."""
        return self.onload(TRAINER_TAGS)

    def close(self) -> None:
        """Stop listening to the other processes, and give up the communicators. Collective. Idempotent."""
        if self._together is not None:
            self._together.close()
        for peers in self._peers:
            peers.close()

    def rehouse(self) -> None:
        """Move masters and moments into host memory for good; updates stream from then on."""
        self.onload(("masters", "moments"))
        self.mover.forget_host(("masters", "moments"))  # where they waited while the trainer slept; they will not again
        self.optimizer.rehouse(make_home(MemoryConfig(optimizer="host"), self.device))

    def run(self, phase: str, work: Callable[[], T], *, undo: Callable[[], None] | None = None, alone: bool = False) -> T:
        """Work that may be done again when memory runs out, with the same result.

        With several processes only what needs no other process (`alone`) is done again; the rest ends in OutOfRoom for all.
        """
        if self._together is None or alone:
            return self.ladder.run(phase, work, undo=undo)
        with self._together.alike(phase, self._report):
            return work()

    @contextmanager
    def alike(self, phase: str) -> Iterator[None]:
        """Around all that a caller asked for: whatever runs out of memory in it, in any process, is one OutOfRoom in every one.

        Of work inside that may be done again (`run`), this is told when its ladder has ended.
        """
        if self._together is not None:
            with self._together.alike(phase, self._report):
                yield
            return
        try:
            yield
        except Exception as error:
            if isinstance(error, OutOfRoom) or not is_out_of_memory(error):
                raise
            raise OutOfRoom(self._report(phase, str(error).splitlines()[0], [])) from None

    def keeping(self) -> AbstractContextManager[object]:
        """Around a forward pass: where its activations wait."""
        if not self.saves_on_host:
            return nullcontext()
        return torch.autograd.graph.save_on_cpu(pin_memory=self.device.type == "cuda")

    def _report(self, phase: str, error: str, tried: list[str]) -> str:
        held: dict[str, int] = self.num_bytes()
        away: dict[str, str] = dict(self.mover.away)
        home = self.optimizer.home
        if home is not None:
            held["optimizer state"], away["optimizer state"] = home.num_bytes, "disk" if home.on_disk else "host"
        text = refusal(phase, error, tried, held, away, self.facts)
        if not self.optimizer.is_between_updates:
            text += "\nThe update is half done: the weights in memory belong to no step"
        return text

    def _free(self, phase: str) -> bool:
        empty_device(self.device, collect=True)
        return True

    def _rehouse(self, phase: str) -> bool:
        """For good: the state then streams through the device."""
        optimizer = self.optimizer
        if optimizer.home is not None or not optimizer.is_between_updates or self.mover.away.keys() & {"masters", "moments"}:
            return False
        self.rehouse()
        empty_device(self.device)
        return True

    def _smaller_pieces(self, phase: str) -> bool:
        home = self.optimizer.home
        if phase != "optimizer" or home is None or home.piece <= PAD:
            return False
        home.piece = max(PAD, home.piece // 8 // PAD * PAD)
        empty_device(self.device)
        return True

    def _smaller(self, phase: str) -> bool:
        """Log-probabilities do not depend on how sequences are packed; sums of gradients only do not where they are chained."""
        if self.split > 1 or not (phase == "forward" or (phase == PASSES and self.splits_gradients)):
            return False
        self.split = 4
        empty_device(self.device)
        return True

    def _recompute(self, phase: str) -> bool:
        if phase != PASSES or self._model is None or self._model.gradient_checkpointing:
            return False
        self._model.gradient_checkpointing = True
        empty_device(self.device)
        return True

    def _activations_away(self, phase: str) -> bool:
        if phase != PASSES or self.saves_on_host:
            return False
        self.saves_on_host = True
        empty_device(self.device)
        return True

    def num_bytes(self) -> dict[str, int]:
        """Device bytes by tag, whether there or away."""
        return {tag: self.mover.num_bytes(tag) for tag in TRAINER_TAGS}

    def _default(self, tag: str) -> Target:
        return "drop" if tag == "weights" and self._has_masters else self.config.sleep_to


def make_home(
    config: MemoryConfig, device: torch.device, slabs: HostSlabs | None = None
) -> Callable[[Sequence[int], int], StateHome]:
    """Builds the home of an optimizer's state that `memory.optimizer` names, in `slabs` if they were made for it."""
    directory = Path(config.directory) if config.optimizer == "disk" and config.directory is not None else None
    return lambda counts, columns: StateHome(counts, columns=columns, device=device, directory=directory, slabs=slabs)


def empty_device(device: torch.device, *, collect: bool = False) -> None:
    """Give what the allocator keeps but nobody uses back to the driver, once everything in flight is done.

    `collect` looks for tensors in reference cycles first, which takes a tenth of a second.
    """
    if collect:
        gc.collect()
    if device.type != "cuda":
        return
    torch.cuda.synchronize(device)
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if clear is not None:
        clear()
    torch.cuda.empty_cache()


def _ordered(tags: Iterable[str], *, reverse: bool = False) -> list[str]:
    wanted = set(tags)
    unknown = sorted(wanted - set(TRAINER_TAGS))
    if unknown:
        raise ValueError(f"unknown memory tag {unknown[0]!r}; known: {', '.join(TRAINER_TAGS)}")
    found = [tag for tag in TRAINER_TAGS if tag in wanted]
    return found[::-1] if reverse else found
