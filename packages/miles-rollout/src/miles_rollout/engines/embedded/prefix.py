"""Prefix cache: full pages of tokens whose keys and values are known, found by their tokens.

A page is filed under (serial number of the page before it, its tokens), so equal keys mean equal tokens all the way back:
there is no hash to collide. A page being computed right now is filed as not ready; whoever needs it waits for it
instead of computing it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from miles_rollout.engines.embedded.pages import PagePool

_ROOT = 0
Key = tuple[int, tuple[int, ...]]


class _Node:
    __slots__ = ("page", "serial", "ready")

    def __init__(self, page: int, serial: int, ready: bool) -> None:
        self.page = page
        self.serial = serial
        self.ready = ready


class Match(NamedTuple):
    """Pages holding the first tokens of a sequence; `pending` when the next page is being computed by somebody else."""

    pages: list[int]
    pending: bool


class PrefixCache:
    """Full pages by their tokens, least recently used ones evicted by the pool when it needs room.

    Disabled, it matches nothing and files nothing.
    """

    def __init__(self, pool: PagePool, page_size: int, enabled: bool = True) -> None:
        self.enabled = enabled
        self._pool = pool
        self._page_size = page_size
        self._nodes: dict[Key, _Node] = {}
        self._keys: dict[int, Key] = {}
        self._serial = _ROOT
        pool.on_evict = self._forget

    def __len__(self) -> int:
        return len(self._nodes)

    def match(self, tokens: Sequence[int], most: int) -> Match:
        """The longest run of ready pages that covers at most `most` tokens. The caller shares them with the pool."""
        pages: list[int] = []
        if not self.enabled:
            return Match(pages, False)
        parent = _ROOT
        for start in range(0, most - self._page_size + 1, self._page_size):
            node = self._nodes.get((parent, tuple(tokens[start : start + self._page_size])))
            if node is None:
                break
            if not node.ready:
                return Match(pages, True)
            pages.append(node.page)
            parent = node.serial
        return Match(pages, False)

    def publish(self, tokens: Sequence[int], pages: Sequence[int], ready: bool = True) -> list[int]:
        """File the full pages of `tokens`; returns the pages that were newly filed.

        A page whose tokens are filed already stays with its owner only.
        """
        filed: list[int] = []
        if not self.enabled:
            return filed
        parent = _ROOT
        for i in range(len(tokens) // self._page_size):
            key = (parent, tuple(tokens[i * self._page_size : (i + 1) * self._page_size]))
            node = self._nodes.get(key)
            if node is None:
                page = pages[i]
                if page in self._keys:  # filed under a chain whose start has been evicted
                    self._remove(page)
                self._serial += 1
                node = self._nodes[key] = _Node(page, self._serial, ready)
                self._keys[page] = key
                self._pool.set_cached(page, True)
                filed.append(page)
            elif ready and node.page == pages[i]:
                node.ready = True
            parent = node.serial
        return filed

    def mark_ready(self, page: int) -> None:
        """The keys and values of a page filed as not ready are there now. Without effect after `clear`."""
        key = self._keys.get(page)
        if key is not None:
            self._nodes[key].ready = True

    def withdraw(self, pages: Sequence[int]) -> None:
        """Unfile pages that will not become ready; their owner still holds them."""
        for page in pages:
            if page in self._keys:
                self._remove(page)

    def clear(self) -> None:
        """Forget everything; idle pages become free."""
        for page in list(self._keys):
            self._pool.set_cached(page, False)
        self._nodes.clear()
        self._keys.clear()

    def _remove(self, page: int) -> None:
        self._forget(page)
        self._pool.set_cached(page, False)

    def _forget(self, page: int) -> None:
        del self._nodes[self._keys.pop(page)]
