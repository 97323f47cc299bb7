"""One rank of the tensor-parallel engine: serves requests from a file, writes what it delivered. Arguments: rank, ranks, folder.

With one rank the folder's model is sharded onto this process alone. On a GPU host the ranks use NCCL, one device each.
"""

from __future__ import annotations

import os
import sys
from datetime import timedelta
from pathlib import Path

import msgspec
import torch
import torch.distributed as dist

from miles_kernels.contract import Contract
from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.config import DecoderConfig, RopeConfig
from miles_kernels.nn.decoder import CORRECTION, PackedKV
from miles_kernels.nn.parallel import shard_decoder
from miles_rollout.engines.embedded import EmbeddedConfig
from miles_rollout.engines.embedded.core import EngineCore
from miles_rollout.engines.embedded.state import Job
from miles_rollout.text import CharTokenizer
from miles_rollout.wire import GenerateRequest, GenerateResult


def serve(core: EngineCore, requests: list[GenerateRequest]) -> dict[str, GenerateResult]:
    """Requests that come a few steps apart; every rank sees them at the same steps."""
    waiting = [Job(request, i, frozenset((2,))) for i, request in enumerate(requests)]
    done: dict[str, GenerateResult] = {}
    while waiting or core.has_work:
        for job in waiting[:3]:
            core.add(job)
        waiting = waiting[3:]
        done.update({delivery.item.request_id: delivery.item for delivery in core.step()})
    assert core.metrics()["kv_used_ratio"] == 0
    return done


def scored(decoder: object, requests: list[GenerateRequest], done: dict[str, GenerateResult], device: str) -> int:
    """Tokens whose log-probability a packed forward of the sharded decoder gives otherwise."""
    unequal = 0
    for request in requests:
        for completion in done[request.request_id].completions:
            ids = torch.tensor(request.input_ids + completion.token_ids, device=device)
            if device == "cuda":
                from miles_kernels.cuda.attention import KVBatch

                plan, positions = KVBatch.packed([len(ids)]), torch.arange(len(ids), device=device)
            else:
                from miles_kernels.ops.attention import packed_plan

                plan, positions = packed_plan([len(ids)])
            hidden = decoder(ids, positions, PackedKV(plan))  # type: ignore[operator]
            first = len(request.input_ids) - 1
            out = decoder.logprob(hidden[first:-1], ids[first + 1 :], request.sampling.temperature or 1.0)  # type: ignore[attr-defined]
            unequal += int((out.logprob.cpu() != torch.tensor(completion.logprobs)).sum())
    return unequal


def main(rank: int, ranks: int, folder: Path) -> None:
    case = msgspec.json.decode((folder / "case.json").read_bytes())
    device = case["device"]
    if device == "cuda":
        torch.cuda.set_device(rank)
    group = None
    if ranks > 1:
        store = dist.FileStore(str(folder / "store"), ranks)
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=60))
        group = dist.group.WORLD
    requests = [msgspec.convert(request, GenerateRequest) for request in case["requests"]]
    contract = Contract.for_device(device, case["dtype"])
    shape = DecoderConfig(**case["shape"] | {"rope": RopeConfig(**case["shape"]["rope"])})
    whole = random_decoder(shape, 0, contract=contract, dtype=contract.torch_dtype, device=device)
    for name, view in whole.hf_state():
        if name.endswith(("q_proj.bias", "k_proj.bias", "v_proj.bias", CORRECTION)):  # zeros would leave them untested
            view.copy_(torch.linspace(-0.2, 0.2, len(view)))
    decoder = shard_decoder(whole, group, rank=rank)
    del whole
    config = msgspec.convert(case["config"], EmbeddedConfig)
    with torch.inference_mode():
        core = EngineCore(decoder, CharTokenizer("abcdefghijklmnopqrst"), config, num_pages=config.num_pages or 0)
        done = serve(core, requests)
        unequal = scored(decoder, requests, done, device)
    completions = {name: result.completions for name, result in done.items()}
    result = {"completions": completions, "unequal": unequal, "digest": decoder.contract.digest}
    (folder / f"{ranks}-{rank}.json").write_bytes(msgspec.json.encode(result))
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
    sys.stdout.flush()
    os._exit(0)  # the results are written; gloo's threads have been seen to abort a process that was only ending
