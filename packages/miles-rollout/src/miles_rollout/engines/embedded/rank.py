"""A further rank of a tensor-parallel engine: `python -m miles_rollout.engines.embedded.rank`, started by `lead`.

Standard input brings `ranks` messages, standard output takes READY and at most one Failure. The end of the input ends it, also
in the middle of a sum, and so does the kernel when the leader is gone: a rank that is stuck in a call outlives nobody.
SIGUSR1 writes the stacks of all threads to standard error.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import queue
import signal
import sys
import threading
from typing import Any

import msgspec

from miles_rollout.child import end_with_parent


def main() -> None:
    """Be a rank until told to end, or nobody tells any more."""
    end_with_parent()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    from miles_kernels.env import prepare_process

    prepare_process()
    from miles_rollout.engines.embedded import ranks

    inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(inbox,), daemon=True).start()
    code = 0
    try:
        _serve(inbox, lambda: ranks.write_raw(answers, ranks.READY))
    except BaseException as error:
        code = 1
        with contextlib.suppress(OSError):
            ranks.write(answers, ranks.Failure(f"{type(error).__name__}: {error}"))
        if not isinstance(error, (ValueError, RuntimeError)):
            sys.excepthook(*sys.exc_info())
    sys.stderr.flush()
    os._exit(code)  # nothing is left to save, and threads of process groups have been seen to abort an ending process


def _read(inbox: queue.SimpleQueue[Any]) -> None:
    from miles_rollout.engines.embedded import ranks

    stream = os.fdopen(0, "rb")
    while (content := ranks.read(stream)) is not None:
        inbox.put(msgspec.msgpack.decode(content, type=ranks.Message))
    os._exit(1)  # the leader is gone; a sum that waits for it would wait for long


def _serve(inbox: queue.SimpleQueue[Any], ready: Any) -> None:
    import torch

    from miles_kernels.contract import Contract
    from miles_kernels.nn.config import DecoderConfig, RopeConfig
    from miles_rollout.engines.embedded import ranks
    from miles_rollout.engines.embedded.lead import RankCore, empty_part, tokenizer_of

    start = inbox.get()
    torch.set_num_threads(start.threads)
    device = torch.device(start.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    contract = Contract.from_json(start.contract)
    own = Contract.for_device(device.type, contract.dtype)
    if (own.platform, own.kernels) != (contract.platform, contract.kernels):
        raise ValueError(
            f"this rank computes as {own.platform}/{own.kernels}, the first one as {contract.platform}/{contract.kernels}"
        )
    rope = RopeConfig(**start.shape["rope"])
    lists = {name: tuple(value) for name, value in start.shape.items() if isinstance(value, list)}
    shape = DecoderConfig(**start.shape | lists | {"rope": rope})
    tokenizer = tokenizer_of(start.tokenizer)
    ready()
    store = ranks.make_store(start.port, leads=False, deadline_s=start.deadline_s)
    group = ranks.make_group(store, start.rank, start.ranks, device, start.deadline_s)
    local = empty_part(shape, contract, group, rank=start.rank, device=device, shards=start.shards)
    with torch.inference_mode():
        core = RankCore(local, tokenizer, start.config, num_pages=start.num_pages, weight_version=start.weight_version)
        core.joined = (group, start.rank)
        while not isinstance(message := inbox.get(), ranks.Bye):
            _obey(core, message)


def _obey(core: Any, message: Any) -> None:
    """Make the call the leader makes."""
    from miles_rollout.engines.embedded import ranks
    from miles_rollout.engines.embedded.state import Job

    if isinstance(message, ranks.Add):
        core.add(Job(message.request, message.arrival, frozenset(message.eos), message.stream))
    elif isinstance(message, ranks.Begin):
        with contextlib.suppress(MemoryError, ValueError):  # refused on every rank alike; the leader says so
            core.begin_update(message.manifest)
    elif isinstance(message, ranks.Bucket):
        core.take_bucket(message.numbers)
    elif isinstance(message, ranks.Swap):
        with contextlib.suppress(ValueError):
            core.finish_update(message.stated)
    elif message.name == "step":
        core.step()
    elif message.argument is None:
        found = getattr(core, message.name)()
        if isinstance(found, list):
            core.note(found)
    elif message.name == "abort":
        core.note(core.abort(message.argument))
    else:
        with contextlib.suppress(ValueError):  # tags that were refused here were refused there
            getattr(core, message.name)(message.argument)


if __name__ == "__main__":
    main()
