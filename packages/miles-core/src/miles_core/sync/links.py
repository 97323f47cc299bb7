"""The engines a publisher talks to: in this process, or behind a server's admin API. Control messages only."""

from __future__ import annotations

from typing import Protocol

import msgspec

from miles_rollout.engine import Engine
from miles_rollout.weights.offer import BroadcastOffer, GroupInvitation, WeightUpdate
from miles_rollout.weights.receiver import WeightReceiver
from miles_rollout.wire import EngineInfo


class Link(Protocol):
    """One engine. `name` is how errors call it."""

    name: str

    async def info(self) -> EngineInfo:
        """What the engine states now."""
        ...

    async def update(self, update: WeightUpdate) -> EngineInfo:
        """Answered after the swap. Raises ValueError for a refusal, TimeoutError when there is no answer in time."""
        ...

    async def join(self, invitation: GroupInvitation) -> None:
        """Answered once the group is complete."""
        ...

    async def leave(self, group: str) -> None:
        """Leave a group."""
        ...

    async def close(self) -> None:
        """Let go of the connection; the engine goes on. Idempotent."""
        ...


class LocalLink:
    """An engine of this process."""

    def __init__(self, engine: Engine, name: str = "engine") -> None:
        self.name = name
        self._engine = engine
        self._receiver = WeightReceiver(engine)

    async def info(self) -> EngineInfo:
        """See `Link`."""
        return self._engine.info()

    async def update(self, update: WeightUpdate) -> EngineInfo:
        """See `Link`."""
        return await self._receiver.update(update)

    async def join(self, invitation: GroupInvitation) -> None:
        """See `Link`."""
        await self._receiver.join(invitation)

    async def leave(self, group: str) -> None:
        """See `Link`."""
        await self._receiver.leave(group)

    async def close(self) -> None:
        """See `Link`."""
        self._receiver.close()


class HttpLink:
    """An engine behind a Miles rollout server. Every call has a deadline of `deadline_s` seconds.

    Example: HttpLink("http://127.0.0.1:30000", token="secret")
    """

    def __init__(self, url: str, token: str | None = None, *, name: str | None = None, deadline_s: float = 120.0) -> None:
        import httpx

        self.name = name or url
        self._deadline_s = deadline_s
        headers = {"content-type": "application/json"} | ({} if token is None else {"authorization": f"Bearer {token}"})
        self._http = httpx.AsyncClient(base_url=url.rstrip("/"), headers=headers, timeout=deadline_s)

    async def info(self) -> EngineInfo:
        """See `Link`."""
        reply = await self._ask("GET", "/get_server_info", b"")
        return msgspec.convert(reply["engine"], EngineInfo)

    async def update(self, update: WeightUpdate) -> EngineInfo:
        """See `Link`."""
        kind = "distributed" if isinstance(update.offer, BroadcastOffer) else "tensor"
        reply = await self._ask("POST", f"/update_weights_from_{kind}", msgspec.json.encode(update))
        return msgspec.convert(reply["engine"], EngineInfo)

    async def join(self, invitation: GroupInvitation) -> None:
        """See `Link`."""
        await self._ask("POST", "/init_weights_update_group", msgspec.json.encode(invitation))

    async def leave(self, group: str) -> None:
        """See `Link`."""
        await self._ask("POST", "/destroy_weights_update_group", msgspec.json.encode({"group_name": group}))

    async def close(self) -> None:
        """See `Link`."""
        await self._http.aclose()

    async def _ask(self, method: str, path: str, content: bytes) -> dict[str, object]:
        import httpx

        try:
            response = await self._http.request(method, path, content=content)
        except httpx.TimeoutException:
            raise TimeoutError(f"{self.name} did not answer {path} within {self._deadline_s:g} s") from None
        except httpx.HTTPError as error:
            raise ValueError(f"{self.name} cannot be reached for {path}: {error or type(error).__name__}") from error
        try:
            reply = msgspec.json.decode(response.content)
        except msgspec.DecodeError:
            reply = response.text[:200]
        if response.status_code == 200 and isinstance(reply, dict):
            return reply
        message = reply.get("message") or reply.get("error", reply) if isinstance(reply, dict) else reply
        message = message.get("message", message) if isinstance(message, dict) else message
        if isinstance(reply, dict) and reply.get("timed_out"):
            raise TimeoutError(f"{self.name}: {message}")
        raise ValueError(f"{self.name}: HTTP {response.status_code}: {message}")
