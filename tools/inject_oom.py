"""Real allocation failures on a GPU, at every class of site: the work is recovered to the same bits, or refused in one report.

tools/inject_oom.py [--part trainer|engine] [--sites SITE,SITE] [--trials 240] [--seconds 150] [--out FILE]
tools/inject_oom.py --device cpu     the same code on a tiny model, with a pretended device that fails
tools/inject_oom.py --sum FILE FILE  one table of what several processes wrote

A trial lets its work begin, and when it comes to the site (a layer's forward or backward, the logits, the update, ...), empties
the allocator's cache, caps it (`torch.cuda.set_per_process_memory_fraction`) at what it holds, fills the holes that it keeps,
and allows it a drawn amount more. The cap stays until the work has ended. Loading and saving take host memory: there a tensor
finds no room on the host. What ends in neither way, or with other bits, is printed and makes the exit code 1, and so does a run
that throws nothing. Sites whose work allocates nothing then are counted as "fitted". `--seconds` begin when kernels are compiled
and the reference is known. The file is written after every trial, and a trial that hangs ends the process with the stacks of its
threads.
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import gc
import json
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import torch
from measure_memory import TINY, Bench, roll_out

from miles_core.algorithm.config import AlgorithmConfig
from miles_core.memory.config import MemoryConfig
from miles_core.memory.fake import FakeDevice
from miles_core.memory.ladder import OutOfRoom
from miles_core.memory.run import RunMemory
from miles_core.sync.inprocess import publish
from miles_core.trainer import state
from miles_core.trainer.batch import TrainBatch
from miles_core.trainer.config import OptimizerConfig, TrainerConfig
from miles_core.trainer.fsdp import FsdpTrainer
from miles_core.trainer.hashing import combined_hash
from miles_core.trainer.testing import random_samples
from miles_rollout.engines.embedded import engine as served
from miles_rollout.engines.embedded.config import EmbeddedConfig
from miles_rollout.engines.embedded.engine import EmbeddedEngine
from miles_rollout.text.char import CharTokenizer

TRAINER_SITES = ("forward", "backward", "logits", "optimizer", "save", "load", "wake")
ENGINE_SITES = ("engine pass", "KV growth", "graph capture", "publish", "engine wakes")
PARTS = {"all": (*TRAINER_SITES, *ENGINE_SITES), "trainer": TRAINER_SITES, "engine": ENGINE_SITES}
HANG_S = 60.0
"""Longest a trial may take."""
BEGUN = time.perf_counter()


class Cap:
    """From its (`skip` + 1)-th `hit` on, the allocator gets `extra` bytes more than it has; on the CPU some allocations fail."""

    def __init__(self, bench: Bench, extra: int, skip: int = 0) -> None:
        self.bench, self.extra, self.skip = bench, extra, skip
        self.left = random.choice((1, 1, 2, 3))
        self.is_set = False
        self._filling: list[torch.Tensor] = []

    def hit(self, *_: Any) -> None:
        """The site is reached."""
        if self.is_set or self.skip:
            self.skip = max(0, self.skip - 1)
            return
        self.is_set = True
        if self.bench.cuda:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            self._allow(0)
            self._fill()
            self._allow(self.extra)

    def _allow(self, extra: int) -> None:
        total = torch.cuda.mem_get_info()[1]
        torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + extra) / total))

    def _fill(self) -> None:
        """Take the holes between live blocks, which torch could use without asking the driver."""
        size = 1 << 28
        while size >= 512:
            try:
                self._filling.append(torch.empty(size, dtype=torch.uint8, device=self.bench.device))
            except torch.OutOfMemoryError:
                size //= 2

    def fails(self, number: int, size: int) -> bool:
        """For the pretended device."""
        self.left -= self.is_set and self.left > 0
        return self.is_set and self.left >= 0 and not self._spent()

    def _spent(self) -> bool:
        spent, self._was = getattr(self, "_was", None) == 0, self.left
        return spent

    @contextmanager
    def over(self, owner: Any, name: str) -> Iterator[None]:
        """While inside, calling `owner.name` reaches the site."""
        plain, own = getattr(owner, name), name in vars(owner)

        def call(*args: Any, **more: Any) -> Any:
            self.hit()
            return plain(*args, **more)

        setattr(owner, name, call)
        try:
            yield
        finally:
            if own:
                setattr(owner, name, plain)
            else:
                delattr(owner, name)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Around the work; lifted afterwards."""
        try:
            if self.bench.cuda:
                yield
            else:
                with FakeDevice(fails=self.fails):
                    yield
        finally:
            self.skip, self.is_set, self.left = 0, True, 0
            self._filling.clear()
            if self.bench.cuda:
                torch.cuda.set_per_process_memory_fraction(1.0)


def clean() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


class TrainerTrials:
    """A trainer made anew for every trial."""

    def __init__(self, bench: Bench, directory: Path) -> None:
        self.bench, self.directory = bench, directory
        self.shape = replace(bench.shape(), vocab_size=8192, num_hidden_layers=2) if bench.cuda else TINY
        if bench.cuda:
            from bench_train import make_batch

            self.batch: TrainBatch = make_batch("rl", 4096, self.shape.vocab_size)[0]
        else:
            self.batch = TrainBatch.from_groups(random_samples(1, num_groups=2), AlgorithmConfig())
        plain = self.fresh()
        plain.step(self.batch)  # compiles
        plain.save(directory / "start")
        before = combined_hash(self.fresh().export_weights())
        plain, bench_peak = self.fresh(), bench.peak
        clean()
        bench_peak()
        held = torch.cuda.memory_allocated() if bench.cuda else 0
        plain.step(self.batch)
        self.wanted = max(1, bench_peak() - held)
        self.stepped, self.before = fingerprint(plain), before
        plain.load(directory / "start")
        self.loaded = fingerprint(plain)

    def fresh(self, memory: MemoryConfig | None = None) -> FsdpTrainer:
        settings = TrainerConfig(max_tokens_per_microbatch=2048 if self.bench.cuda else 64)
        optimizer = OptimizerConfig(lr=1e-4)
        return FsdpTrainer(self.bench.decoder(self.shape), AlgorithmConfig(), settings, optimizer, memory=memory)

    def trial(self, site: str) -> str:
        """What became of one injection."""
        trainer = self.fresh(MemoryConfig(optimizer=random.choice(("device", "device", "host"))))
        cap = Cap(self.bench, int(self.wanted * random.choice((0.0, 0.1, 0.3)) * random.random()), random.choice((0, 0, 1)))
        hook, work, expected = self._site(site, trainer, cap)
        try:
            with hook, cap.in_force():
                work()
        except OutOfRoom as error:
            if "out of memory in " not in str(error):
                return "OTHER REPORT"
            return "refused"
        counts = trainer.memory.ladder.counts
        if not counts["num_oom"]:
            return "fitted"
        return "recovered" if fingerprint(trainer) == expected else "OTHER BITS"

    def _site(self, site: str, trainer: FsdpTrainer, cap: Cap) -> tuple[Any, Callable[[], object], str]:
        layers = trainer.decoder.layers
        step = lambda: trainer.step(self.batch)  # noqa: E731
        if site == "forward":
            return cap.over(random.choice(list(layers)), "forward"), step, self.stepped
        if site == "backward":
            return gradient_of(random.choice(list(trainer.decoder.parameters())), cap), step, self.stepped
        if site == "logits":
            return cap.over(trainer.decoder, "logprob"), step, self.stepped
        cap.skip = 0
        if site == "optimizer":
            cap.extra //= 8
            return cap.over(trainer.optimizer, "step"), step, self.stepped
        if site == "wake":
            trainer.memory.sleep()
            return cap.over(trainer.memory.mover, "onload"), step, self.stepped
        if site == "load":
            return no_room_for("read_tensors"), lambda: trainer.load(self.directory / "start"), self.loaded
        assert site == "save"
        place = self.directory / "again"

        def save_and_load() -> None:
            trainer.step(self.batch)
            trainer.save(place)
            trainer.load(place)

        return no_room_for("save_tensors"), save_and_load, self.stepped


@contextmanager
def gradient_of(parameter: torch.nn.Parameter, cap: Cap) -> Iterator[None]:
    """The site is where this parameter's gradient is ready."""
    handle = parameter.register_post_accumulate_grad_hook(cap.hit)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def no_room_for(name: str) -> Iterator[None]:
    """The site is a tensor that is read from a file, or a file that is written, drawn anew; it fails once or a few times."""
    plain, reads = getattr(state, name), name == "read_tensors"
    left, after = random.choice((1, 1, 2, 3, 9)), random.randrange(12 if reads else 2)

    def strike(number: int, what: object) -> None:
        nonlocal left
        if number >= after and left:
            left -= 1
            raise MemoryError(f"host: no room for {what}")

    def read(*args: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for number, found in enumerate(plain(*args)):
            strike(number, found[0])
            yield found

    files = count()

    def write(file: Path, *args: Any, **more: Any) -> Any:
        strike(next(files), file.name)
        return plain(file, *args, **more)

    setattr(state, name, read if reads else write)
    try:
        yield
    finally:
        setattr(state, name, plain)


def fingerprint(trainer: FsdpTrainer) -> str:
    trainer.memory.wake()
    return combined_hash([*trainer.export_weights(), *sorted(trainer.optimizer.state().items())])


class EngineTrials:
    """A colocated engine: generations, publications, sleeping and waking."""

    def __init__(self, bench: Bench, directory: Path) -> None:
        self.bench, self.directory = bench, directory
        self.shape = replace(bench.shape(), vocab_size=8192, num_hidden_layers=2) if bench.cuda else TINY
        bench.options.prompts, bench.options.group, bench.options.context, bench.options.new = (
            (4, 2, 600, 24) if bench.cuda else (2, 2, 40, 8)
        )
        self.number = 0
        self.start()
        self.expected = self.tokens()
        assert self.tokens() == self.expected

    def start(self) -> None:
        memory = MemoryConfig(sleep=True)
        config = EmbeddedConfig(
            page_size=64, num_pages=160 if self.bench.cuda else 16, max_context=1024, max_batched_tokens=2048, max_running=16
        )
        self.runner = asyncio.Runner()
        trained = self.bench.decoder(self.shape)
        self.trainer = FsdpTrainer(trained, AlgorithmConfig(), TrainerConfig(), OptimizerConfig(lr=1e-4), memory=memory)
        self.engine = EmbeddedEngine(
            self.bench.decoder(self.shape), CharTokenizer("0123456789"), config, weight_version=-1, eos_token_ids=()
        )
        self.memory = RunMemory(self.trainer.memory, self.engine, self.runner.run, memory, self.directory)
        self.publish()

    def close(self) -> None:
        try:
            self.runner.run(self.engine.close())
        finally:
            self.runner.close()

    def publish(self) -> None:
        self.number += 1
        self.memory.training(lambda: None)
        version = self.number
        self.memory.publishing(lambda: self.runner.run(publish(self.trainer, self.engine, version)))

    def tokens(self) -> Any:
        self.number += 1
        found = roll_out(self.bench, self.engine, self.runner, 1)
        return [(sample.token_ids, sample.rollout_logprobs) for sample in found]

    def trial(self, site: str) -> str:
        core = self.engine._core
        assert core is not None
        graphs = core._runner.graphs
        weights = 2 * sum(p.numel() for p in self.trainer.decoder.parameters())
        cap = Cap(self.bench, int(weights * random.choice((0.0, 0.02, 0.5)) * random.random()))
        if site == "engine pass":
            cap.extra //= 16
        before = self.engine.metrics()["num_oom"] + self.trainer.memory.ladder.counts["num_oom"]
        found: Any = None
        hooks: dict[str, tuple[Any, str]] = {
            "engine pass": (core, "step"), "KV growth": (core._kv, "restore"), "graph capture": (graphs or core, "_capture"),
            "publish": (served, "stage"), "engine wakes": (core, "restore"),
        }  # fmt: skip
        if site == "graph capture":
            if graphs is None:
                hooks[site] = (core, "step")
            else:
                graphs.forget()
        outcome = ""
        try:
            with cap.over(*hooks[site]), cap.in_force():
                if site in ("engine pass", "graph capture"):
                    found = self.tokens()
                else:
                    self.publish()
        except Exception as error:
            if not isinstance(error, OutOfRoom) and "lower engine." not in f"{error} {error.__cause__}":
                raise
            outcome = "refused"
        after = self.engine.metrics()["num_oom"] + self.trainer.memory.ladder.counts["num_oom"]
        if outcome == "refused" and site in ("engine pass", "graph capture"):  # this engine has ended; the run would resume
            self.close()
            self.start()
        elif outcome == "refused":
            self.publish()  # there is room again: it goes on
        found = found or self.tokens()
        if found != self.expected:
            return "OTHER BITS"
        return outcome or ("recovered" if after > before else "fitted")


THROWN = ("recovered", "refused")


def run(bench: Bench) -> int:
    table: dict[str, Counter[str]] = {site: Counter() for site in PARTS["all"]}
    options = bench.options
    wanted = choose(options.part, options.sites)
    of_trainer, of_engine = (tuple(site for site in wanted if site in sites) for sites in (TRAINER_SITES, ENGINE_SITES))
    shares = (0.6, 0.4) if of_trainer and of_engine else (1.0, 1.0)
    try:
        with tempfile.TemporaryDirectory() as folder:
            if of_trainer:
                inject(TrainerTrials(bench, Path(folder)), of_trainer, table, bench, shares[0] * options.seconds)
                clean()
            if of_engine:
                trials = EngineTrials(bench, Path(folder))
                inject(trials, of_engine, table, bench, shares[1] * options.seconds)
                trials.close()
    except Exception:
        traceback.print_exc()
        table["outside a trial"] = Counter({"ABORTED": 1})
    return conclude(bench, table)


def choose(part: str, sites: str | None) -> tuple[str, ...]:
    """The sites asked for, all of the part where none are named; ends the process where the part has no such site."""
    known = PARTS[part]
    wanted = known if sites is None else tuple(each.strip() for each in sites.split(","))
    if strange := [site for site in wanted if site not in known]:
        sys.exit(f"--sites: --part {part} has no {', '.join(map(repr, strange))}; its sites are {', '.join(known)}")
    return tuple(site for site in known if site in wanted)


def conclude(bench: Bench, table: dict[str, Counter[str]]) -> int:
    """Print the table; 1 when a trial ended in another way than it may, or when no failure was thrown at all."""
    total, wrong = show(table)
    bench.note("injected, wrong", (total, wrong))
    bench.note("sites", {site: dict(counts) for site, counts in table.items() if counts})
    if not total:
        print("no failure was thrown, so nothing is shown: allow more --trials or --seconds, or choose other --sites", flush=True)
    return 1 if wrong or not total else 0


def show(table: dict[str, Counter[str]]) -> tuple[int, int]:
    """Print the table; failures thrown, and those of them that ended in another way than they may."""
    print("| site | injected | recovered, same bits | refused, one report | other | never short |")
    for site, counts in table.items():
        other = sum(counts.values()) - sum(counts[kind] for kind in (*THROWN, "fitted"))
        row = (counts["recovered"] + counts["refused"] + other, counts["recovered"], counts["refused"], other, counts["fitted"])
        if counts:
            print(f"| {site} | " + " | ".join(map(str, row)) + " |")
    total = sum(sum(counts.values()) - counts["fitted"] for counts in table.values())
    return total, total - sum(counts[kind] for counts in table.values() for kind in THROWN)


def inject(
    trials: TrainerTrials | EngineTrials, sites: tuple[str, ...], table: dict[str, Counter[str]], bench: Bench, seconds: float
) -> None:
    """Site after site, until each has had its share of failures or the time is over."""
    print(f"{type(trials).__name__} ready {time.perf_counter() - BEGUN:.1f} s after the start", flush=True)
    until, spent = time.perf_counter() + seconds, dict.fromkeys(sites, 0.0)
    gc.collect()
    gc.freeze()  # every failure collects garbage: not what stays
    limit = bench.options.trials * len(sites) // len(choose(bench.options.part, bench.options.sites))
    for number in range(4 * limit):
        if time.perf_counter() > until or sum(table[site][kind] for site in sites for kind in THROWN) >= limit:
            break
        site, seed = sites[number % len(sites)], random.randrange(2**32)
        faulthandler.dump_traceback_later(HANG_S, exit=True)
        clean()
        random.seed(seed)
        begun = time.perf_counter()
        try:
            outcome = trials.trial(site)
        except Exception as error:
            traceback.print_exc(limit=-8)
            outcome = f"ABORTED: {type(error).__name__}"
        table[site][outcome] += 1
        spent[site] += time.perf_counter() - begun
        bench.facts["seconds"] = {each: round(of_it, 1) for each, of_it in spent.items()}
        if outcome not in (*THROWN, "fitted"):
            print(f"{site}, seed {seed}: {outcome}", flush=True)
        if "AcceleratorError" in outcome:  # nothing works in this process any more
            break
        if outcome.startswith("ABORTED") and isinstance(trials, EngineTrials):
            trials.start()
        bench.facts["sites"] = {site: dict(counts) for site, counts in table.items() if counts}
        bench.write()
        if number % 35 == 34:
            print(bench.facts["sites"], flush=True)
    faulthandler.cancel_dump_traceback_later()
    gc.unfreeze()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen3-0.6b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--part", choices=("all", "trainer", "engine"), default="all")
    parser.add_argument("--sites", help="only these, with commas between")
    parser.add_argument("--sum", nargs="+", metavar="FILE", help="add up what earlier calls wrote with --out")
    parser.add_argument("--trials", type=int, default=240, help="failures to throw, in all")
    parser.add_argument("--seconds", type=float, default=150.0)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out")
    options = parser.parse_args()
    if options.sum:
        table = {site: Counter[str]() for site in (*TRAINER_SITES, *ENGINE_SITES)}
        for file in options.sum:
            for site, counts in json.loads(Path(file).read_text(encoding="utf-8")).get("sites", {}).items():
                table.setdefault(site, Counter()).update(counts)
        print("failures, ended otherwise:", *show(table))
        return
    sys.exit(run(Bench(options)))


if __name__ == "__main__":
    main()
