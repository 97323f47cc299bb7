"""Settings of the sglang engine."""

from __future__ import annotations

import msgspec

DETERMINISTIC = "--enable-deterministic-inference"


class SglangConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Where SGLang is, or how to start it.

    Example: SglangConfig(model="models/qwen3-0.6b", args=("--mem-fraction-static", "0.8"))
    """

    model: str = ""
    """Model directory. To start a server; when attaching, only where its config.json lies, if the server's own path is another
    machine's."""
    url: str = ""
    """Attach to the server at this address instead of starting one."""
    args: tuple[str, ...] = ()
    """Passed to `sglang.launch_server` as they are."""
    python: str = ""
    """Interpreter of an environment that has SGLang; ours when empty."""
    token: str | None = None
    """SGLang's --api-key, when attaching to a server that has one."""
    seeds: bool = True
    """Seeds hold: a server is started with --enable-deterministic-inference, and one without it is refused. False: faster, and
    every request samples afresh."""
    start_s: float = 900.0
    """How long a started server may take until it serves."""
    request_s: float = 3600.0
    """Deadline of one request."""
    update_s: float = 600.0
    """Deadline of a weight update."""
    staging: str = ""
    """Where updates that arrive as tensors are put for SGLang to read; /dev/shm, else the temporary directory, when empty."""

    def validate(self) -> None:
        """Raise ValueError naming every setting outside its range."""
        wrong = []
        if not self.url and not self.model:
            wrong.append("give a model to start a server with, or the url of one that runs")
        if self.url and self.args:
            wrong.append("options reach only a server that is started; drop them or the url")
        for flag in ("--model-path", "--model", "--host", "--port"):
            if any(each == flag or each.startswith(flag + "=") for each in self.args):
                wrong.append(f"{flag} is set by this engine")
        for name in ("start_s", "request_s", "update_s"):
            if not getattr(self, name) > 0:
                wrong.append(f"{name}={getattr(self, name)} must be above 0")
        if wrong:
            raise ValueError("sglang engine: " + "; ".join(wrong))
