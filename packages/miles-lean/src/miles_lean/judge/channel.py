"""Messages between the judge and its zygotes: a JSON object and some blobs, with their lengths in front."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Sequence
from typing import Any

_HEAD = struct.Struct("<IQ")
MAX_MESSAGE = 1 << 30


class Closed(ConnectionError):
    """The other side is gone."""


class Late(TimeoutError):
    """Nothing complete arrived before the deadline."""


class Channel:
    """One end of a socket pair. Not for use by two threads at once."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    def send(self, message: dict[str, Any], blobs: Sequence[bytes] = ()) -> None:
        """Raises Closed."""
        text = json.dumps(message | {"blobs": [len(blob) for blob in blobs]}).encode()
        try:
            self.sock.settimeout(None)
            self.sock.sendall(b"".join((_HEAD.pack(len(text), sum(map(len, blobs))), text, *blobs)))
        except OSError as error:
            raise Closed(str(error)) from error

    def receive(self, deadline: float | None = None) -> tuple[dict[str, Any], list[bytes]]:
        """The next message; `deadline` on time.monotonic's clock. Raises Closed or Late."""
        size, blob_size = _HEAD.unpack(self._exactly(_HEAD.size, deadline))
        if size + blob_size > MAX_MESSAGE:
            raise Closed(f"a message of {size + blob_size} bytes")
        message = json.loads(self._exactly(size, deadline))
        rest, blobs = memoryview(self._exactly(blob_size, deadline)), []
        for length in message.pop("blobs"):
            blobs.append(bytes(rest[:length]))
            rest = rest[length:]
        return message, blobs

    def _exactly(self, size: int, deadline: float | None) -> bytes:
        parts, left = [], size
        while left:
            wait = None if deadline is None else deadline - time.monotonic()
            if wait is not None and wait <= 0:
                raise Late(f"{left} of {size} bytes still to come")
            self.sock.settimeout(wait)
            try:
                part = self.sock.recv(min(left, 1 << 20))
            except TimeoutError as error:
                raise Late(f"{left} of {size} bytes still to come") from error
            except OSError as error:
                raise Closed(str(error)) from error
            if not part:
                raise Closed("end of the channel")
            parts.append(part)
            left -= len(part)
        return b"".join(parts)
