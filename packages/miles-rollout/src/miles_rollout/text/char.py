"""The built-in character tokenizer: one token per character, one small JSON file, no dependency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from miles_rollout.text.base import Message

FILE_NAME = "char_tokenizer.json"
PAD, BOS, EOS, UNK = range(4)
SPECIAL_NAMES = ("<pad>", "<bos>", "<eos>", "<unk>")
REPLACEMENT = "\ufffd"


class _File(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    alphabet: str
    allow_unknown: bool = False
    schema: int = 1


class CharTokenizer:
    """Ids 0 pad, 1 bos, 2 eos, 3 unk, then the characters of `alphabet` in order.

    A character outside the alphabet is an error that names it, unless `allow_unknown` maps it to unk.

    Example: CharTokenizer("0123456789+=").encode("1+2=") == [5, 14, 6, 15]
    """

    def __init__(self, alphabet: str, *, allow_unknown: bool = False) -> None:
        repeated = sorted({char for char in alphabet if alphabet.count(char) > 1})
        if repeated:
            raise ValueError(f"alphabet holds {', '.join(map(repr, repeated))} more than once")
        if not alphabet:
            raise ValueError("alphabet is empty; give the characters the texts are made of")
        try:
            alphabet.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"alphabet: {alphabet[error.start]!r} is half a surrogate pair, not a character") from None
        self.alphabet = alphabet
        self.allow_unknown = allow_unknown
        self._ids = {char: 4 + i for i, char in enumerate(alphabet)}
        self._plain = ["", "", "", REPLACEMENT, *alphabet]
        self._marked = [*SPECIAL_NAMES, *alphabet]

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Always (2,)."""
        return (EOS,)

    @property
    def bos_token_id(self) -> int:
        """Always 1."""
        return BOS

    @property
    def pad_token_id(self) -> int:
        """Always 0."""
        return PAD

    @property
    def vocab_size(self) -> int:
        """Four special tokens and the alphabet."""
        return 4 + len(self.alphabet)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """One id per character; nothing is added around it. Raises ValueError naming unknown characters and their places."""
        ids = self._ids
        try:
            return [ids[char] for char in text]
        except KeyError:
            if self.allow_unknown:
                return [ids.get(char, UNK) for char in text]
        unknown = [f"{char!r} at {i}" for i, char in enumerate(text) if char not in ids]
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise ValueError(
            f"characters outside the tokenizer's alphabet: {', '.join(unknown[:5])}{more}; "
            f"the alphabet is {self.alphabet!r} (allow_unknown would map others to <unk>)"
        )

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Characters of `ids`; unk and ids past the vocabulary read U+FFFD. Raises ValueError for a negative id."""
        pieces = self._plain if skip_special_tokens else self._marked
        size = len(pieces)
        if ids and min(ids) < 0:
            raise ValueError(f"token id {min(ids)} is negative")
        return "".join([pieces[i] if i < size else REPLACEMENT for i in ids])

    def token_bytes(self, token_id: int, *, skip_special_tokens: bool = True) -> bytes | None:
        """UTF-8 bytes of one token."""
        return self.decode((token_id,), skip_special_tokens=skip_special_tokens).encode()

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> list[int]:
        """Every turn is bos, its content, eos; a generation prompt is one more bos. Roles are told by turn taking only."""
        if tools:
            raise ValueError("the character tokenizer has no way to write tools; use a tokenizer with a chat template")
        if options:
            raise ValueError(f"the character tokenizer's chat format has no option {', '.join(sorted(options))}")
        ids: list[int] = []
        for i, message in enumerate(messages):
            content = message.get("content")
            if not isinstance(content, str):
                raise ValueError(f"messages[{i}].content is {type(content).__name__}; the character tokenizer needs text")
            ids += [BOS, *self.encode(content), EOS]
        return [*ids, BOS] if add_generation_prompt else ids

    def save(self, directory: str | Path) -> None:
        """Write `char_tokenizer.json`, creating the directory."""
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        record = _File(alphabet=self.alphabet, allow_unknown=self.allow_unknown)
        (path / FILE_NAME).write_bytes(msgspec.json.format(msgspec.json.encode(record)) + b"\n")

    @classmethod
    def load(cls, directory: str | Path) -> CharTokenizer:
        """Read `char_tokenizer.json`; raises ValueError naming the file and the field that is wrong."""
        path = Path(directory) / FILE_NAME
        try:
            record = msgspec.json.decode(path.read_bytes(), type=_File)
        except (OSError, msgspec.MsgspecError) as error:
            raise ValueError(f"{path}: {error}") from error
        if record.schema != 1:
            raise ValueError(f"{path}: schema {record.schema}, this build reads schema 1")
        try:
            return cls(record.alphabet, allow_unknown=record.allow_unknown)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CharTokenizer) and (self.alphabet, self.allow_unknown) == (other.alphabet, other.allow_unknown)

    def __hash__(self) -> int:
        return hash((self.alphabet, self.allow_unknown))

    def __repr__(self) -> str:
        return f"CharTokenizer({self.alphabet!r}, allow_unknown={self.allow_unknown})"
