"""One address for many workers: health, load, prefix caches, weight versions."""

from miles_rollout.router.app import create_router
from miles_rollout.router.config import RouterConfig

__all__ = ["RouterConfig", "create_router"]
