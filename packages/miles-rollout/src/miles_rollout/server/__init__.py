"""The HTTP service over any engine: SGLang's native API, OpenAI's /v1, and admin endpoints for the operator."""

from miles_rollout.server.app import create_app
from miles_rollout.server.lifecycle import PortInUse, bind, listen, serve
from miles_rollout.server.service import ServerConfig

__all__ = ["PortInUse", "ServerConfig", "bind", "create_app", "listen", "serve"]
