"""Page pool and prefix cache: ownership, eviction order, and what a lookup may return."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miles_rollout.engines.embedded.pages import PagePool
from miles_rollout.engines.embedded.prefix import PrefixCache

PAGE = 16


def tokens(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(50) for _ in range(count)]


def test_take_is_all_or_nothing_and_never_the_null_page():
    pool = PagePool(4)
    first = pool.take(3)
    assert sorted(first) == [2, 3, 4] or (len(set(first)) == 3 and 0 not in first)
    assert pool.take(2) is None
    assert pool.num_available == 1
    pool.release(first)
    assert pool.num_available == 4 and pool.num_owned == 0


def test_shared_page_is_free_only_after_its_last_owner():
    pool = PagePool(1)
    pages = pool.take(1)
    pool.share(pages)
    pool.release(pages)
    assert pool.take(1) is None
    pool.release(pages)
    assert pool.take(1) == pages
    with pytest.raises(AssertionError):
        pool.release(pages)
        pool.release(pages)


def test_published_pages_are_found_after_release_and_only_for_equal_tokens():
    pool = PagePool(8)
    cache = PrefixCache(pool, PAGE)
    text = tokens(40)
    pages = pool.take(3)
    assert cache.publish(text, pages) == pages[:2]
    pool.release(pages)
    assert cache.match(text, 40).pages == pages[:2]
    assert cache.match(text, 31).pages == pages[:1]
    assert cache.match(text, 15).pages == []
    other = [*text[:20], 49 - text[20], *text[21:]]
    assert cache.match(other, 40).pages == pages[:1]
    assert cache.match(text[16:], 24).pages == [], "the same tokens at another place are another page"


def test_eviction_takes_the_longest_idle_and_the_end_of_a_prefix_first():
    pool = PagePool(4)
    cache = PrefixCache(pool, PAGE)
    old, new = tokens(32, 1), tokens(32, 2)
    for text in (old, new):
        pages = pool.take(2)
        cache.publish(text, pages)
        pool.release(pages)
    assert pool.num_available == 4
    pool.take(1)
    assert len(cache.match(old, 32).pages) == 1 and len(cache.match(new, 32).pages) == 2
    pool.take(1)
    assert len(cache.match(old, 32).pages) == 0 and len(cache.match(new, 32).pages) == 2


def test_pending_pages_are_waited_for_and_withdrawn():
    pool = PagePool(4)
    cache = PrefixCache(pool, PAGE)
    text = tokens(32)
    pages = pool.take(2)
    assert cache.publish(text, pages, ready=False) == pages
    assert cache.match(text, 32) == ([], True)
    cache.mark_ready(pages[0])
    assert cache.match(text, 32) == (pages[:1], True)
    cache.withdraw(pages[1:])
    assert cache.match(text, 32) == (pages[:1], False)
    cache.clear()
    assert cache.match(text, 32) == ([], False) and len(cache) == 0
    cache.mark_ready(pages[0])  # nothing left to mark
    pool.release(pages)
    assert pool.num_available == 4


def test_disabled_cache_keeps_nothing():
    pool = PagePool(2)
    cache = PrefixCache(pool, PAGE, enabled=False)
    pages = pool.take(2)
    assert cache.publish(tokens(32), pages) == []
    assert cache.match(tokens(32), 32) == ([], False)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 12))
def test_random_use_never_loses_a_page_nor_returns_a_wrong_one(seed: int, num_pages: int):
    """Oracle: a plain dict page -> tokens it holds. A match must return pages holding exactly the tokens asked for."""
    rng = random.Random(seed)
    pool = PagePool(num_pages)
    cache = PrefixCache(pool, PAGE)
    content: dict[int, list[int]] = {}
    owned: list[list[int]] = []
    for _ in range(60):
        if owned and rng.random() < 0.5:
            pool.release(owned.pop(rng.randrange(len(owned))))
        else:
            text = [b for _ in range(rng.randint(1, 3)) for b in [rng.randrange(2)] * PAGE]
            shared, pending = cache.match(text, len(text))
            assert not pending
            for i, page in enumerate(shared):
                assert content[page] == text[: (i + 1) * PAGE]
            pool.share(shared)
            new = pool.take(len(text) // PAGE - len(shared))
            if new is None:
                pool.release(shared)
                continue
            pages = shared + new
            for i in range(len(shared), len(pages)):
                content[pages[i]] = text[: (i + 1) * PAGE]
            cache.publish(text, pages)
            owned.append(pages)
        references = [sum(page in pages for pages in owned) for page in range(1, num_pages + 1)]
        assert references == [pool.references(page) for page in range(1, num_pages + 1)]
        assert pool.num_owned == sum(count > 0 for count in references)
    for pages in owned:
        pool.release(pages)
    assert pool.num_available == num_pages
