"""One process of a conformance run: `python -m miles_core.trainer.conformance.worker DIRECTORY`, with torchrun's environment."""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from miles_core.trainer.base import Trainer
from miles_core.trainer.conformance.cases import Case, Layout
from miles_core.trainer.conformance.check import Result
from miles_core.trainer.conformance.launch import LIFELINE
from miles_core.trainer.hashing import combined_hash
from miles_core.trainer.processes import leave
from miles_core.trainer.tensorfile import save_tensors


def watch_parent() -> None:
    """End this process when the one that started it is gone."""
    handle = os.environ.get(LIFELINE)
    if handle is None:
        return

    def watch() -> None:
        os.read(int(handle), 1)
        os._exit(3)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def main(directory: Path) -> None:
    """Run the plan in `directory`; see `launch.run`."""
    watch_parent()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    plan = json.loads((directory / "plan.json").read_text())
    rank = int(os.environ["RANK"])
    on_cuda = any(entry["case"]["device"].startswith("cuda") for entry in plan["todo"])
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(seconds=float(os.environ["MILES_DEADLINE_S"]))
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=timeout)
    try:
        build = _factory(plan["backend"])
        for entry in plan["todo"]:
            case = msgspec.convert(entry["case"], Case)
            _one(build, case, msgspec.convert(entry["layout"], Layout), directory, entry["number"], rank)
    finally:
        leave()


def _factory(name: str) -> Callable[..., Trainer]:
    module, _, function = name.partition(":")
    build: Callable[..., Trainer] = getattr(importlib.import_module(module), function)
    return build


def perform(build: Callable[..., Trainer], case: Case, layout: Layout) -> Result:
    """Build the trainer in this process (collectively, if there are several), score the batch, take one step, export."""
    try:
        trainer = build(case.decoder(), case, dict(layout.options))
        batch = case.batch()
        logprob = trainer.forward_logprobs(batch).detach().cpu().clone()
        metrics = trainer.step(batch).metrics()
        trainer.forward_logprobs(batch)  # an evaluation between a step and an export must leave no trace
        weights = {name: tensor.detach().float().cpu().clone() for name, tensor in trainer.export_weights()}
    except ValueError as error:
        return Result(case, layout, {}, Tensor(), {}, refusals=(f"{error}",))
    return Result(case, layout, dict(metrics), logprob, weights)


def _one(build: Callable[..., Trainer], case: Case, layout: Layout, directory: Path, number: int, rank: int) -> None:
    result = perform(build, case, layout)
    metrics, refusal = result.metrics, "".join(result.refusals)
    tensors = {"miles.logprob": result.logprob, **result.weights}
    digest = combined_hash([*tensors.items(), ("metrics", torch.tensor(sorted(metrics.values()), dtype=torch.float64))])
    said: dict[str, Any] = {"metrics": metrics, "digest": digest, "refusal": refusal}
    (directory / f"{number}-{rank}.json").write_text(json.dumps(said))
    if rank == 0 and not refusal:
        save_tensors(directory / f"{number}.safetensors", tensors)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
