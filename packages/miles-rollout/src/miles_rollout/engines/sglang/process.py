"""Start an SGLang server of our own, or find that it cannot be started."""

from __future__ import annotations

import asyncio
import importlib.util
import sys
import time

from miles_rollout.child import Child, free_port
from miles_rollout.engines.sglang.config import DETERMINISTIC, SglangConfig
from miles_rollout.extras import MissingExtraError
from miles_rollout.upstream import Upstream, UpstreamError


def command(config: SglangConfig, port: int) -> list[str]:
    """The command line of the server. Raises MissingExtraError when SGLang is not in this environment and no other is named."""
    if not config.python and importlib.util.find_spec("sglang") is None:
        raise MissingExtraError(
            'engine "sglang" needs SGLang: pip install "miles-rollout[sglang]" sglang, '
            "or name the interpreter of an environment that has it (--sglang-python)"
        )
    line = [config.python or sys.executable, "-m", "sglang.launch_server", "--model-path", config.model]
    line += ["--host", "127.0.0.1", "--port", str(port), *config.args]
    on_policy = any(each.startswith("--rl-on-policy-target") for each in config.args)
    if config.seeds and DETERMINISTIC not in config.args and not on_policy:
        line.append(DETERMINISTIC)
    return line


async def start(config: SglangConfig) -> tuple[Child, str]:
    """A server that answers, and its address. Raises ValueError when it ends instead, TimeoutError after `start_s`."""
    port = free_port()
    child = await Child.start(command(config, port), grace_s=10.0)
    url = f"http://127.0.0.1:{port}"
    upstream = Upstream(url, token=config.token)
    end = time.monotonic() + config.start_s
    try:
        while True:
            try:
                status, _ = await upstream.request("GET", "/health_generate", timeout_s=30.0)
                if status == 200:
                    return child, url
            except UpstreamError:
                pass  # not listening yet
            if not child.running:
                raise ValueError(f"SGLang ended with exit code {child.exit_code} before it served; its output says why")
            if time.monotonic() > end:
                raise TimeoutError(f"SGLang did not serve within {config.start_s:g} s")
            await asyncio.sleep(0.25)
    except BaseException:
        await child.stop()
        raise
    finally:
        upstream.abort_all()
