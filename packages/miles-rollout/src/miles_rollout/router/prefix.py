"""Which worker has probably cached the beginning of a prompt, from the prompts it was sent."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import msgspec

TOKENS = 16
"""Token ids per block, as many as a page of the embedded engine."""
BYTES = 64
"""Bytes of text per block."""
MAX_BLOCKS = 256


class Peek(msgspec.Struct):
    """What the router reads of a request; everything else passes through unseen."""

    stream: Any = False
    input_ids: Any = None
    text: Any = None
    prompt: Any = None
    messages: msgspec.Raw = msgspec.Raw()


def peek(body: bytes) -> Peek:
    """The fields of a JSON object, or nothing of a body that is none: the worker says what is wrong with it."""
    try:
        return msgspec.json.decode(body, type=Peek)
    except msgspec.MsgspecError:
        return Peek()


def blocks(asked: Peek) -> list[int]:
    """Hashes of the prompt's beginning, cut into blocks, each over all before it. A batch counts by its first prompt."""
    prompt = next((each for each in (asked.input_ids, asked.text, asked.prompt) if each is not None), None)
    if isinstance(prompt, list) and prompt and isinstance(prompt[0], list | str):
        prompt = prompt[0]
    if isinstance(prompt, list):
        pieces: list[Any] = [tuple(prompt[i : i + TOKENS]) for i in range(0, min(len(prompt), TOKENS * MAX_BLOCKS), TOKENS)]
        whole = len(prompt) // TOKENS
    else:
        data = prompt.encode("utf-8", "surrogatepass") if isinstance(prompt, str) else bytes(asked.messages)
        pieces = [data[i : i + BYTES] for i in range(0, min(len(data), BYTES * MAX_BLOCKS), BYTES)]
        whole = len(data) // BYTES
    found, before = [], 0
    try:
        for piece in pieces[:whole]:
            before = hash((before, piece))
            found.append(before)
    except TypeError:  # a list where a token id belongs; the worker refuses it
        return []
    return found


class PrefixMap:
    """Block hash to the worker that saw it last. Bounded; the least recently used are forgotten."""

    def __init__(self, max_entries: int = 200_000) -> None:
        self._max = max_entries
        self._owner: OrderedDict[int, str] = OrderedDict()

    def __len__(self) -> int:
        return len(self._owner)

    def match(self, hashes: list[int]) -> tuple[str | None, int]:
        """(worker, blocks it has) for the longest known beginning."""
        owner, depth = None, 0
        for each in hashes:
            known = self._owner.get(each)
            if known is None:
                break
            owner, depth = known, depth + 1
        return owner, depth

    def record(self, hashes: list[int], worker: str) -> None:
        """`worker` is about to see these blocks."""
        for each in hashes:
            self._owner[each] = worker
            self._owner.move_to_end(each)
        while len(self._owner) > self._max:
            self._owner.popitem(last=False)

    def forget(self, worker: str) -> None:
        """The worker lost its cache."""
        for each in [key for key, owner in self._owner.items() if owner == worker]:
            del self._owner[each]
