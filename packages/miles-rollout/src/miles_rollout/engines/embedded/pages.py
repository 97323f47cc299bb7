"""Pages of the KV cache: who owns which, and which may be taken.

A page is free, owned (one or more references), or idle: cached by the prefix cache, owned by nobody, taken when nothing is free.
Page 0 is the null page; it is never handed out and stays zero, so unused table entries may point at it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence


class PagePool:
    """Reference counts of `num_pages` pages, numbered from 1.

    `on_evict(page)` is told when an idle page is taken, the longest idle first.
    """

    def __init__(self, num_pages: int) -> None:
        assert num_pages >= 1
        self.num_pages = num_pages
        self.on_evict: Callable[[int], None] | None = None
        self._references = [0] * (num_pages + 1)
        self._free = list(range(num_pages, 0, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._cached = [False] * (num_pages + 1)

    @property
    def num_available(self) -> int:
        """Pages that `take` could hand out: free and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_owned(self) -> int:
        """Pages with at least one reference."""
        return self.num_pages - self.num_available

    def references(self, page: int) -> int:
        """How many owners a page has."""
        return self._references[page]

    def take(self, count: int) -> list[int] | None:
        """`count` pages with one reference each, or None and no change when so many are not available."""
        if count > self.num_available:
            return None
        pages = []
        for _ in range(count):
            page = self._free.pop() if self._free else self._evict()
            assert self._references[page] == 0 and page != 0
            self._references[page] = 1
            pages.append(page)
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One more reference to each page, which is owned or idle."""
        for page in pages:
            if self._references[page] == 0:
                del self._idle[page]
            self._references[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        """One reference less. The last pages become idle first, so that a prefix outlives what follows it."""
        for page in reversed(pages):
            self._references[page] -= 1
            assert self._references[page] >= 0, f"page {page} released more often than taken"
            if self._references[page] == 0:
                if self._cached[page]:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def set_cached(self, page: int, cached: bool) -> None:
        """Whether the prefix cache knows this page, which decides if it becomes idle or free."""
        self._cached[page] = cached
        if not cached and page in self._idle:
            del self._idle[page]
            self._free.append(page)

    def _evict(self) -> int:
        page, _ = self._idle.popitem(last=False)
        self._cached[page] = False
        if self.on_evict is not None:
            self.on_evict(page)
        return page
