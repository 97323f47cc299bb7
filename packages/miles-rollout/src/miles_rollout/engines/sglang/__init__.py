"""SGLang behind our engine protocol: spawned or attached to, driven over its native HTTP API, its options passed through."""

from miles_rollout.engines.sglang.config import SglangConfig
from miles_rollout.engines.sglang.engine import SglangEngine
from miles_rollout.engines.sglang.replies import SglangFailure

__all__ = ["SglangConfig", "SglangEngine", "SglangFailure"]
