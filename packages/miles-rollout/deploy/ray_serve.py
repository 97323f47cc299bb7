"""Miles' rollout service as a Ray Serve application: Ray places and restarts replicas, each an engine with the whole HTTP API.

    MODEL=/models/policy serve run ray_serve:app             # or: python ray_serve.py MODEL

Ray Serve spreads requests itself, so weight updates must reach every replica: use our router where that matters (a replica then
is a plain server that `route` knows), or one replica per application.
"""

from __future__ import annotations

import os
import sys

from ray import serve


def asgi():  # type: ignore[no-untyped-def]
    """Called in the replica's process: the engine lives there."""
    from miles_rollout.engines.embedded.config import EmbeddedConfig
    from miles_rollout.launch import load_embedded
    from miles_rollout.server import ServerConfig, create_app

    model = os.environ["MODEL"]
    config = EmbeddedConfig(kv_memory_bytes=int(os.environ.get("KV_MEMORY_MIB", "1024")) << 20)
    device, dtype = os.environ.get("DEVICE", "cpu"), os.environ.get("DTYPE")
    engine, tokenizer, load = load_embedded(model, config, device=device, dtype=dtype, threads=1)
    server = ServerConfig(admin_token=os.environ.get("MILES_ROLLOUT_ADMIN_TOKEN"), weight_roots=(os.path.dirname(model),))
    return create_app(engine, tokenizer, server, load_weights=load)


@serve.deployment(ray_actor_options={"num_cpus": 1, "num_gpus": float(os.environ.get("NUM_GPUS", "0"))}, max_ongoing_requests=256)
@serve.ingress(asgi)
class Rollout:
    """One engine."""


app = Rollout.options(num_replicas=1).bind()

if __name__ == "__main__":
    os.environ["MODEL"] = sys.argv[1]
    serve.run(app, blocking=True)
