"""Text of a growing completion: half characters and possible stop strings are held back, work per token is constant."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Protocol

from miles_rollout.text.base import ByteTokenizer, Tokenizer

_UNSTABLE_TAIL = 3
"""Most bytes of a UTF-8 character that may be waiting for the rest."""
_MAX_PENDING = 8
"""More tokens than this without a finished character are broken bytes, not a character in the making."""


class _Stream(Protocol):
    def feed(self, ids: Sequence[int]) -> str: ...
    def flush(self) -> str: ...


class IncrementalDecoder:
    """Feed token ids, get the text that is safe to show; tells when a stop string is complete.

    The parts returned by `push` and `finish`, joined, are `text`. Without a stop string that equals
    `tokenizer.decode(ids)` for byte-level vocabularies and for valid UTF-8 everywhere; with one, the text ends before it.
    Of several stop strings the one that is complete first counts, the longer one on a tie.

    Example:
        decoder = IncrementalDecoder(tokenizer, stop=("END",))
        decoder.push([7, 8]); decoder.matched  # None, or "END"
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), *, skip_special_tokens: bool = True) -> None:
        if any(not text for text in stop):
            raise ValueError("stop holds an empty string, which would stop every completion at once")
        self.matched: str | None = None
        self._stop = tuple(stop)
        self._prefixes = frozenset(text[:size] for text in self._stop for size in range(1, len(text)))
        self._longest = max((len(text) for text in self._stop), default=1) - 1
        self._held = ""
        self._parts: list[str] = []
        by_bytes = isinstance(tokenizer, ByteTokenizer) and tokenizer.token_bytes(0) is not None
        self._stream: _Stream
        if by_bytes:
            assert isinstance(tokenizer, ByteTokenizer)
            self._stream = _ByteStream(tokenizer, skip_special_tokens)
        else:
            self._stream = _WindowStream(tokenizer, skip_special_tokens)

    @property
    def text(self) -> str:
        """Everything released so far."""
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def push(self, token_ids: Sequence[int], *, can_stop: bool = True) -> str:
        """Add tokens; returns the text they release. With `can_stop` False their text takes no part in a stop string."""
        if self.matched is not None:
            return ""
        return self._release(self._stream.feed(token_ids), can_stop=can_stop, last=False)

    def finish(self) -> str:
        """Release what was held back, because no token follows. Half a character reads U+FFFD."""
        if self.matched is not None:
            return ""
        return self._release(self._stream.flush(), can_stop=True, last=True)

    def _release(self, new: str, *, can_stop: bool, last: bool) -> str:
        text = self._held + new if self._held else new
        if not self._stop or not can_stop:
            self._held = ""
        else:
            hit = self._find(text) if new else None
            if hit is not None:
                start, self.matched = hit
                self._held = ""
                text = text[:start]
            else:
                keep = 0 if last else self._open_suffix(text)
                cut = len(text) - keep
                text, self._held = text[:cut], text[cut:]
        if text:
            self._parts.append(text)
        return text

    def _find(self, text: str) -> tuple[int, str] | None:
        """Start and stop string of the earliest completed match in text not yet released."""
        hits = [(start + len(stop), start, stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if not hits:
            return None
        _, start, stop = min(hits)
        return start, stop

    def _open_suffix(self, text: str) -> int:
        """Length of the longest end of `text` that could still grow into a stop string."""
        for size in range(min(self._longest, len(text)), 0, -1):
            if text[-size:] in self._prefixes:
                return size
        return 0


class _ByteStream:
    """Exact and constant time: tokens are bytes, Python's own incremental UTF-8 decoder does the rest."""

    def __init__(self, tokenizer: ByteTokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, ids: Sequence[int]) -> str:
        return self._utf8.decode(b"".join([self._bytes(i) for i in ids]))

    def flush(self) -> str:
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text

    def _bytes(self, token_id: int) -> bytes:
        piece = self._tokenizer.token_bytes(token_id, skip_special_tokens=self._skip)
        assert piece is not None, f"token {token_id} has no bytes of its own in a byte-level vocabulary"
        return piece


class _WindowStream:
    """For vocabularies whose tokens read differently by neighbour: decode a short window again, take what is new.

    The window is a few tokens of context whose text is out already, and the tokens that wait; `_out` counts the
    characters of the window's text that are out.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window: list[int] = []
        self._num_context = 0
        self._out = 0

    def feed(self, ids: Sequence[int]) -> str:
        # One by one: byte-fallback decoders spoil a whole run of bytes until its last character is complete.
        return "".join([self._feed_one(i) for i in ids])

    def _feed_one(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        unfinished = len(text) - len(text.rstrip("\ufffd"))
        broken = unfinished > _UNSTABLE_TAIL and len(self._window) - self._num_context > _MAX_PENDING
        stable = len(text) - (min(unfinished, _UNSTABLE_TAIL) if broken else unfinished)
        new = text[self._out : stable]
        self._out = max(self._out, stable)
        if broken:
            self._slide(self._window[-_UNSTABLE_TAIL:], num_context=0, hidden=len(text) - stable)
        elif new and not unfinished:
            self._slide(self._window[self._num_context :][-_MAX_PENDING:], num_context=_MAX_PENDING, hidden=0)
        return new

    def flush(self) -> str:
        text = self._decode(self._window)
        new = text[self._out :]
        self._out = max(self._out, len(text))
        return new

    def _slide(self, window: list[int], *, num_context: int, hidden: int) -> None:
        """Start a new window of which all but the last `hidden` characters are out."""
        self._window = window
        self._num_context = min(num_context, len(window))
        self._out = max(0, len(self._decode(window)) - hidden)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip)
