"""An engine that is not this run's: a rollout service that runs already, its weights brought to it from here."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

import msgspec

from miles_core.config.sections import ServiceConfig
from miles_rollout.client import RolloutClient, ServerError
from miles_rollout.wire import Completion, EngineInfo, GenerateChunk, GenerateRequest, GenerateResult, WeightManifest

TOKEN = "MILES_ROLLOUT_ADMIN_TOKEN"
"""Environment variable that holds the token of the service's admin endpoints."""
_RETRIES, _BACKOFF_S = 7, 0.5
"""A service that is started anew is waited for: 64 s in all."""


def client_of(config: ServiceConfig) -> RolloutClient:
    """A connection to the service. Every call ends by itself after `config.deadline_s`."""
    assert config.url is not None
    return RolloutClient(
        config.url, os.environ.get(TOKEN), timeout_s=config.deadline_s, connect_s=min(60.0, config.deadline_s),
        retries=_RETRIES, backoff_s=_BACKOFF_S,
    )  # fmt: skip


class ServiceEngine:
    """An `Engine` behind a URL. Version v of a run is version `offset` + v there, since others may have used it before.

    Tokens under another version, or another numeric contract, than the run's last update are an error: a service that was
    started anew serves old weights until somebody brings it the new ones. What the service cannot do is a ValueError here.

    Example: engine = await ServiceEngine.open(ServiceConfig(url="http://127.0.0.1:30000"))
    """

    def __init__(self, client: RolloutClient, info: EngineInfo, *, published: bool) -> None:
        self._client = client
        self._mark = f"{secrets.token_hex(4)}-"
        """Before the ids of requests: another run's may be named alike."""
        self.offset = info.weight_version + published
        self._info = msgspec.structs.replace(info, weight_version=-1 if published else 0)

    @classmethod
    async def open(cls, config: ServiceConfig, *, published: bool = True) -> ServiceEngine:
        """Ask the service what it is. `published`: this run will bring it weights; without, it is taken as it is.

        Raises ValueError when nothing answers there, or something else does.
        """
        client = client_of(config)
        try:
            return cls(client, await client.refresh(), published=published)
        except BaseException as error:
            await client.close()
            if not isinstance(error, (ServerError, TimeoutError)):
                raise
            raise ValueError(
                f'service.url = "{config.url}": {error}; start one with `miles-rollout serve MODEL` (admin token in {TOKEN})'
            ) from error

    async def generate(self, request: GenerateRequest) -> GenerateResult:
        """All completions of one request."""
        with _told():
            result = await self._client.generate(self._marked(request))
        if result.contract_digest != self._info.contract_digest:
            raise ValueError(
                f"{self._client.base_url}: computes under contract {result.contract_digest} now, and under "
                f"{self._info.contract_digest} when this run began; its samples do not belong together"
            )
        completions = tuple(self._own(completion) for completion in result.completions)
        return msgspec.structs.replace(result, request_id=request.request_id, completions=completions)

    async def stream(self, request: GenerateRequest) -> AsyncIterator[GenerateChunk]:
        """The same, token by token."""
        with _told():
            async for chunk in self._client.stream(self._marked(request)):
                version = self._version(chunk.weight_version)
                yield msgspec.structs.replace(chunk, request_id=request.request_id, weight_version=version)

    async def abort(self, request_id: str) -> bool:
        """End a request now."""
        with _told():
            return await self._client.abort(self._mark + request_id)

    async def update_weights(self, manifest: WeightManifest, tensors: Iterable[tuple[str, Any]]) -> None:
        """Not through the engine: the trainer's process writes them, and tells the service; see `miles_core.sync.service`."""
        raise ValueError("weights go to a service by way of a folder; use miles_core.sync.service.service_publisher")

    def published(self, version: int) -> None:
        """The service serves this version of the run's now."""
        self._info = msgspec.structs.replace(self._info, weight_version=version)

    def info(self) -> EngineInfo:
        """What the service stated, with the run's own number of its weights."""
        return self._info

    def metrics(self) -> dict[str, float]:
        """What the service last said of itself."""
        return self._client.metrics()

    async def close(self) -> None:
        """Close the connections; the service goes on."""
        await self._client.close()

    def _marked(self, request: GenerateRequest) -> GenerateRequest:
        return msgspec.structs.replace(request, request_id=self._mark + request.request_id)

    def _own(self, completion: Completion) -> Completion:
        spans = tuple(msgspec.structs.replace(span, version=self._version(span.version)) for span in completion.weight_spans)
        return msgspec.structs.replace(completion, weight_spans=spans)

    def _version(self, theirs: int) -> int:
        version = theirs - self.offset
        if version != self._info.weight_version:
            raise ValueError(
                f"{self._client.base_url}: sampled under weight version {theirs}, and this run's last update was "
                f"{self._info.weight_version + self.offset}: it was started anew, or somebody else updates it. Resume the run to "
                "bring it the weights again"
            )
        return version


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """What the service could not do, as the error of a setting: it is the user who can mend it."""
    try:
        yield
    except ServerError as error:
        raise ValueError(str(error)) from error
