"""Tensor parallelism over two processes: every token and log-probability is that of one, for engine and trainer's forward."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from engine_cases import SHAPE, batch_of

from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.config import DecoderConfig
from miles_kernels.nn.parallel import local_config, shard_decoder

WORKER = Path(__file__).with_name("parallel_worker.py")
WIDE = replace(SHAPE, num_attention_heads=8, num_key_value_heads=2, head_dim=16, intermediate_size=128)


def ranks_of(folder: Path, ranks: int) -> list[dict[str, Any]]:
    """What each of `ranks` processes delivered."""
    (folder / "store").unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, str(WORKER), str(rank), str(ranks), str(folder)], env=environment)
        for rank in range(ranks)
    ]
    try:
        codes = [process.wait(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0] * ranks
    return [msgspec.json.decode((folder / f"{ranks}-{rank}.json").read_bytes()) for rank in range(ranks)]


def case(folder: Path, shape: DecoderConfig, device: str, dtype: str, requests: list[Any], **config: Any) -> None:
    fields = {name: getattr(shape, name) for name in shape.__dataclass_fields__ if name != "rope"}
    content = {"device": device, "dtype": dtype, "shape": fields, "requests": requests, "config": config}
    (folder / "case.json").write_bytes(msgspec.json.encode(content))


def test_two_processes_give_the_bits_of_one(tmp_path: Path):
    requests = batch_of(8, 3, most_new=12)
    case(tmp_path, WIDE, "cpu", "float32", requests, num_pages=40, max_running=8, max_batched_tokens=48, overlap=True)
    (one,) = ranks_of(tmp_path, 1)
    first, second = ranks_of(tmp_path, 2)
    assert first["completions"] == second["completions"] == one["completions"]
    assert one["unequal"] == first["unequal"] == second["unequal"] == 0
    assert first["digest"] == one["digest"]


def test_a_sharded_model_is_another_contract_with_other_bits(tmp_path: Path):
    """The control: without the fixed fold the comparison above could not hold by chance."""
    decoder = random_decoder(WIDE, 0)
    sharded = shard_decoder(decoder)
    assert sharded.contract.digest != decoder.contract.digest
    import torch

    from miles_kernels.nn.decoder import PackedKV
    from miles_kernels.ops.attention import packed_plan

    plan, positions = packed_plan([40])
    ids = torch.randint(4, 20, (40,))
    with torch.no_grad():
        plain, folded = (model(ids, positions, PackedKV(plan)) for model in (decoder, sharded))
    assert torch.allclose(plain, folded, atol=1e-4) and not torch.equal(plain, folded)


def test_what_cannot_be_divided_is_refused_by_name():
    with pytest.raises(ValueError, match=r"num_key_value_heads=2 is no multiple of 4; .*head_dim=64 is no multiple of 16 \* 8"):
        local_config(replace(SHAPE, intermediate_size=128), 4)
    with pytest.raises(ValueError, match="6 shards must be a power of two and a multiple of the 2 ranks"):
        local_config(WIDE, 2, 6)
    moe = replace(WIDE, family="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    with pytest.raises(ValueError, match="experts are not divided; serve a mixture of experts on one device"):
        shard_decoder(random_decoder(moe, 0))
