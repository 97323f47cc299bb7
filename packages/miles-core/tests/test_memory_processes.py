"""Two processes, one of which runs out of memory: recovered where it needs nobody else, else one refusal for both, at once."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
import time

WORKER = textwrap.dedent(
    """
    import sys
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    from miles_core.algorithm.config import AlgorithmConfig
    from miles_core.memory.config import MemoryConfig
    from miles_core.memory.ladder import OutOfRoom
    from miles_core.trainer.batch import TrainBatch
    from miles_core.trainer.config import OptimizerConfig, TrainerConfig
    from miles_core.trainer.fsdp import FsdpTrainer
    from miles_core.trainer.hashing import combined_hash
    from miles_core.trainer.testing import random_samples
    from miles_kernels.nn.checkpoint import random_decoder
    from miles_kernels.nn.config import DecoderConfig

    rank, port, where = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2, timeout=timedelta(seconds=240)
    )
    shape = DecoderConfig(
        family="qwen3", vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )
    trainer = FsdpTrainer(
        random_decoder(shape, 0, dtype=torch.bfloat16), AlgorithmConfig(), TrainerConfig(), OptimizerConfig(lr=1e-3),
        memory=MemoryConfig(release_groups=True),
    )
    batch = TrainBatch.from_groups(random_samples(1), AlgorithmConfig())
    left = [1]
    peers = trainer.model.peers.values()
    for each in peers:  # of their own, as on a GPU
        each._transport = lambda store, rank, size: dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=240))

    def failing(plain):
        def call(*args, **more):
            if rank == 0 and left and left.pop():
                raise torch.OutOfMemoryError("no room here")
            return plain(*args, **more)
        return call

    if where in ("optimizer", "refused"):
        left *= 1 if where == "optimizer" else 99
        trainer.optimizer._prepare = failing(trainer.optimizer._prepare)
    elif where == "gather":
        trainer.decoder.table.rows = failing(trainer.decoder.table.rows)
    elif where == "offload":
        trainer.memory.mover.offload = failing(trainer.memory.mover.offload)
    try:
        trainer.step(batch)
        if where == "offload":
            trainer.offload(["moments"])
        if where == "nowhere":
            trainer.memory.sleep()
            assert all(each._backend is None for each in peers)
        if where != "gather":
            trainer.step(batch)
            made = {each.name: each.num_made for each in peers}
            assert made == {"shard": 1 + (where == "nowhere"), "replicate": 0}, made
        print("hash", combined_hash(trainer.export_weights()), trainer.memory.ladder.counts["num_recovered"], flush=True)
    except OutOfRoom as error:
        print(error, flush=True)
        sys.exit(3)  # as it is: nothing is ended in good order, and nothing may keep the interpreter from ending
    dist.barrier()
    for each in peers:
        each.release()
    dist.destroy_process_group()
    """
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def both(where: str) -> tuple[list[int], list[str], float]:
    """Exit codes, outputs, seconds. Another process may take the port first: then with another one."""
    for _ in range(3):
        found = once(where, free_port())
        if not any("address already in use" in text for text in found[1]):
            break
    return found


def once(where: str, port: int) -> tuple[list[int], list[str], float]:
    begun = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(rank), str(port), where], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [worker.communicate(timeout=220) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    codes = [worker.returncode for worker in workers]
    texts = [out + err[-2000:] * (code != 3) for (out, err), code in zip(said, codes, strict=True)]
    return codes, texts, time.monotonic() - begun


def test_an_update_that_runs_out_of_memory_in_one_process_is_done_again_there() -> None:
    """The run it is compared with slept in between, and made its communicators anew."""
    codes, plain, _ = both("nowhere")
    assert codes == [0, 0], plain
    codes, found, _ = both("optimizer")
    assert codes == [0, 0], found
    assert plain[0].split()[1] == found[0].split()[1] == found[1].split()[1]
    assert [text.split()[2] for text in plain] == ["0", "0"] and [text.split()[2] for text in found] == ["1", "0"]


def test_in_the_middle_of_collectives_both_refuse_alike() -> None:
    codes, found, seconds = both("gather")
    assert codes == [3, 3], found
    for text in found:
        assert "process 0 ran out of memory in forward and backward: no room here" in text, text
        assert "--resume" in text
    assert seconds < 200, "somebody waited for the group's timeout"


def test_what_one_process_cannot_recover_alone_both_refuse_alike() -> None:
    """Its ladder ends where nobody else takes part, while the other is on its way to the next thing both do."""
    codes, found, seconds = both("refused")
    assert codes == [3, 3], found
    assert found[0].startswith("out of memory in optimizer: no room here\ntried: free cached blocks"), found[0]
    assert "process 0 ran out of memory in optimizer: no room here" in found[1], found[1]
    assert seconds < 200, "somebody waited for the group's timeout"


def test_one_process_that_cannot_move_what_it_holds_ends_both() -> None:
    """The other one has moved its part by then, and hears of it when it works on."""
    codes, found, seconds = both("offload")
    assert codes == [3, 3], found
    for text in found:
        assert "process 0 ran out of memory in offload: no room here" in text, text
    assert seconds < 200, "somebody waited for the group's timeout"


def test_nobody_listens_any_more_when_the_interpreter_ends() -> None:
    """A thread that returns from torch into an interpreter that has ended would abort the process."""
    code = textwrap.dedent(
        """
        import torch.distributed as dist
        from miles_core.memory import together

        together._LOOK_S = 0.0
        dist.init_process_group("gloo", store=dist.TCPStore("127.0.0.1", 0, 1, True), rank=0, world_size=1)
        kept = [together.Together(0, 1, on_cuda=False) for _ in range(8)]
        for each in kept:
            with each.alike("nothing", lambda *_: ""):
                pass
        del each
        dropped = kept.pop()._watch
        assert not dropped._thread.is_alive(), "it listens for nobody"
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 and "terminate called" not in done.stderr, done.stderr
