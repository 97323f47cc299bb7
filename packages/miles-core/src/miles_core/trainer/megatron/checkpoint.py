"""Save and load a `MegatronTrainer` in megatron-core's own format (dist_checkpointing, torch_dist), in any layout.

`megatron/` holds whole tensors under Megatron's names, cut as it suited the writers; a reader takes its own share. Optimizer
state is in model space ("fully_reshardable"), so it follows. `trainer.json` holds what the run must agree on.
"""

from __future__ import annotations

import json
import math
import queue
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch.distributed as dist

from miles_core.convert.megatron import parts
from miles_core.trainer.hashing import combined_hash
from miles_core.trainer.megatron import core
from miles_core.trainer.megatron.model import MegatronModel
from miles_core.trainer.megatron.standins import on_device
from miles_core.trainer.state import write_model
from miles_kernels.nn.decoder import stored_dtype

if TYPE_CHECKING:
    from miles_core.trainer.megatron.backend import MegatronTrainer

SCHEMA = 1
FOLDER = "megatron"
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


@contextmanager
def _writing_here() -> Iterator[None]:
    """Let megatron-core write in this process.

    By default it starts a manager process, forks a writer per file, and waits for ever when one of them dies. The few seconds a
    second writer would save are not worth processes that outlive us.
    """
    writer = core.filesystem_async
    with ExitStack() as stack:
        for name in ("_get_write_results_queue", "get_write_results_queue"):  # 0.16, 0.19
            if hasattr(writer, name):
                stack.enter_context(mock.patch.object(writer, name, lambda *_: queue.Queue()))
        stack.enter_context(mock.patch.object(writer, "_process_memory", lambda: 0))  # for its log; would need psutil
        if hasattr(writer.FileSystemWriterAsync, "write_preloaded_data_multiproc"):  # 0.19 has threads instead
            stack.enter_context(
                mock.patch.object(writer.FileSystemWriterAsync, "write_preloaded_data_multiproc", staticmethod(_write_files))
            )
        yield


def _write_files(transforms: Any, use_msc: bool, rank: int, buckets: list[Any], results: Any) -> None:
    """Write the files of one process one after the other; the interface is megatron-core's."""
    done: dict[int, Any] = {}
    for index, bucket in enumerate(buckets):
        said, count = queue.Queue(), queue.Queue()
        count.put(index)
        core.filesystem_async.FileSystemWriterAsync.write_preloaded_data(transforms, index, bucket, said, count, True)
        number, outcome = said.get_nowait()
        if isinstance(outcome, Exception):
            raise outcome
        done[number] = outcome
    results.put(done)


def save_model(model: MegatronModel, folder: Path, more: dict[str, Any] | None = None) -> None:
    """Write the weights (and `more` of the state) of a model as a torch_dist checkpoint. Collective."""
    if dist.get_rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    with on_device(model.device), _writing_here():
        state = {"model": model.module.sharded_state_dict(metadata=dict(_METADATA)), **(more or {})}
        core.dist_checkpointing.save(state, str(folder))
    dist.barrier()


def load_model(model: MegatronModel, folder: Path, more: dict[str, Any] | None = None) -> dict[str, Any]:
    """Read what `save_model` wrote into the model; the loaded state, for the optimizer. Collective.

    Raises ValueError naming the folder and what is missing, unexpected or misshaped.
    """
    if not (folder / "metadata.json").is_file():
        raise ValueError(f"{folder}: no megatron checkpoint (metadata.json is missing); resume from another checkpoint")
    strict = core.dist_checkpointing.validation.StrictHandling.RAISE_ALL
    with on_device(model.device):
        wanted = {"model": model.module.sharded_state_dict(metadata=dict(_METADATA)), **(more or {})}
        try:
            state: dict[str, Any] = core.dist_checkpointing.load(wanted, str(folder), strict=strict)
        except (core.dist_checkpointing.core.CheckpointingException, RuntimeError, OSError, KeyError, EOFError) as error:
            raise ValueError(f"{folder}: cannot be read into this model ({error}); resume from another checkpoint") from None
        model.module.load_state_dict(state["model"])
    return state


def save(trainer: MegatronTrainer, directory: Path) -> None:
    """Write `megatron/`, the model directory `model/` (for `miles export` and eval), and `trainer.json` last."""
    save_model(trainer.model, directory / FOLDER, _optimizer_state(trainer, loading=False))
    model, dtype = trainer.model, trainer.model.contract.torch_dtype
    named = [item for part in parts(model.config, model.vocab_rows) for item in part.hf]
    sizes = [(name, math.prod(shape) * stored_dtype(name, dtype).itemsize) for name, shape in named]
    write_model(directory / "model", model.config, dtype, sizes, model.export_hf(), writer=dist.get_rank() == 0)
    facts = _facts(trainer) | {"num_updates": trainer.num_updates}
    if dist.get_rank() == 0:
        (directory / "trainer.json").write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    dist.barrier()


def load(trainer: MegatronTrainer, directory: Path) -> None:
    """Restore what `save` wrote; raises ValueError as `MegatronTrainer.load` says."""
    file = directory / "trainer.json"
    try:
        stated: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); resume from another checkpoint") from None
    facts = _facts(trainer)
    for name in ("schema", "backend", "dtype", "reference"):
        if stated.get(name) != facts[name]:
            found, own = stated.get(name), facts[name]
            raise ValueError(f"{file}: {name} is {found!r}, this run has {own!r}; resume with the run's own configuration")
    if stated.get("contract") != facts["contract"]:
        warnings.warn(
            f"{file}: written under contract {stated.get('contract')}, this machine has {facts['contract']}: "
            "the run goes on, but not with the bits it would have had there",
            stacklevel=3,
        )
    state = load_model(trainer.model, directory / FOLDER, _optimizer_state(trainer, loading=True))
    trainer.optimizer.load(state["optimizer"], int(stated["num_updates"]))


def _optimizer_state(trainer: MegatronTrainer, *, loading: bool) -> dict[str, Any]:
    with on_device(trainer.device):
        weights = trainer.model.module.sharded_state_dict(metadata=dict(_METADATA))
    return {"optimizer": trainer.optimizer.sharded_state({"model": weights}, dict(_METADATA), loading=loading)}


def _facts(trainer: MegatronTrainer) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "backend": "megatron",
        "dtype": str(trainer.model.contract.torch_dtype),
        "contract": trainer.contract.digest,
        "reference": None if trainer.reference is None else combined_hash(trainer.reference.export_hf()),
    }
