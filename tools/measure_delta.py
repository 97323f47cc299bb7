"""How large a delta of each step of a run is: bytes of the disk transport's delta over bytes of all weights.

python tools/measure_delta.py runs/NAME      a run with checkpoint.every = 1 that kept several checkpoints
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from miles_kernels.nn.checkpoint import iter_tensors
from miles_rollout.weights.offer import layout
from miles_rollout.weights.stage import make_manifest, stream_views
from miles_rollout.weights.store import WeightStore, to_stream, weights_digest


def main(run: Path) -> None:
    """Write every step as a delta of the one before, read it back, compare, and print the sizes."""
    steps = sorted((run / "checkpoints").glob("step_*"))
    if len(steps) < 2:
        raise SystemExit(f"{run}: {len(steps)} checkpoints; give a run with checkpoint.every = 1 and a large keep_last")
    last = None
    for number, step in enumerate(steps):
        weights = dict(iter_tensors(step / "trainer" / "model"))
        manifest = make_manifest(weights.items(), version=number + 1, contract_digest="")
        stream, _ = to_stream(manifest, weights.values())
        if last is not None:
            before, base, old = last
            with tempfile.TemporaryDirectory() as folder:
                store = WeightStore(folder)
                store.write_delta(manifest, stream, base, old)
                found, again = store.load(number + 1, number, before, weights_digest(base))
                views = stream_views(found, layout(found), again)
                assert all(torch.equal(views[name], tensor) for name, tensor in weights.items()), "not bit-exact"
                size = store.read(number + 1).size_bytes
            full = sum(tensor.nbytes for tensor in weights.values())
            changed = sum(int((weights[name].view(torch.uint8) != before[name].view(torch.uint8)).sum()) for name in weights)
            share = f"{changed / full:.3%} of the bytes differ"
            print(f"{step.name}: {size:,} of {full:,} bytes = {size / full:.2%}, bit-exact ({share})")
        last = (weights, manifest, stream)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
