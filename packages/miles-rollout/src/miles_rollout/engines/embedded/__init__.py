"""The embedded engine: paged KV cache, continuous batching, prefix cache, in this process.

`config` imports no torch; the rest is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from miles_rollout.engines.embedded.config import EmbeddedConfig

if TYPE_CHECKING:
    from miles_rollout.engines.embedded.engine import EmbeddedEngine
    from miles_rollout.engines.embedded.factory import load_engine
    from miles_rollout.engines.embedded.reply import EngineFailure
    from miles_rollout.engines.embedded.weights import make_manifest, tensor_hash

__all__ = ["EmbeddedConfig", "EmbeddedEngine", "EngineFailure", "load_engine", "make_manifest", "tensor_hash"]

_HOME = {
    "EmbeddedEngine": "engine",
    "EngineFailure": "reply",
    "load_engine": "factory",
    "make_manifest": "weights",
    "tensor_hash": "weights",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
