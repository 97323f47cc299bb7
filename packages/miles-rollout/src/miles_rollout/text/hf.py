"""Adapter to Hugging Face tokenizers and chat templates. transformers is imported when one is loaded, not before."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from miles_rollout.extras import require
from miles_rollout.text.base import Message

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
GENERATION_CONFIG = "generation_config.json"


class HFTokenizer:
    """A transformers tokenizer behind the `Tokenizer` protocol; code from the model directory is never run.

    `eos_token_ids` joins what tokenizer, `generation_config.json` and `config.json` name.
    """

    def __init__(self, inner: Any, *, eos_token_ids: Sequence[int] = (), source: Path | None = None) -> None:
        own = () if inner.eos_token_id is None else (int(inner.eos_token_id),)
        self.inner = inner
        self._source = source
        self._eos_token_ids = tuple(sorted({*own, *eos_token_ids}))
        added = {i for i, token in inner.added_tokens_decoder.items() if token.special}
        self._special_ids = frozenset({*inner.all_special_ids, *added})
        self._pieces = _byte_pieces(inner)

    @classmethod
    def load(cls, directory: str | Path) -> HFTokenizer:
        """Load from a local directory; raises ValueError naming it, MissingExtraError without transformers."""
        path = Path(directory)
        if not any((path / name).is_file() for name in FILES):
            raise ValueError(f"{path}: no tokenizer there; looked for char_tokenizer.json, {', '.join(FILES)}")
        transformers = require("transformers", extra="text", purpose="a Hugging Face tokenizer")
        try:
            inner = transformers.AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: transformers cannot load the tokenizer: {error}") from error
        return cls(inner, eos_token_ids=(*_eos_ids(path / GENERATION_CONFIG), *_eos_ids(path / "config.json")), source=path)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a completion, ascending."""
        return self._eos_token_ids

    @property
    def pad_token_id(self) -> int:
        """The tokenizer's own pad id, else its smallest end-of-sequence id, else 0."""
        if self.inner.pad_token_id is not None:
            return int(self.inner.pad_token_id)
        return self._eos_token_ids[0] if self._eos_token_ids else 0

    @property
    def vocab_size(self) -> int:
        """Largest id and one, added tokens included."""
        return len(self.inner)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`."""
        return list(self.inner.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`, byte for byte: spaces are not tidied up."""
        text = self.inner.decode(list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def token_bytes(self, token_id: int, *, skip_special_tokens: bool = True) -> bytes | None:
        """Bytes of one token of a byte-level BPE, None for other kinds of vocabulary."""
        if self._pieces is None or (skip_special_tokens and token_id in self._special_ids):
            return None if self._pieces is None else b""
        return self._pieces[token_id] if 0 <= token_id < len(self._pieces) else b""

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> list[int]:
        """Ids of a conversation under the model's own template; `options` reach the template as variables."""
        if not self.inner.chat_template:
            raise ValueError("this tokenizer has no chat template; send a plain prompt, or add chat_template.jinja to the model")
        jinja2 = require("jinja2", extra="text", purpose="a chat template")
        try:
            text = self.inner.apply_chat_template(
                [dict(message) for message in messages],
                tools=None if tools is None else [dict(tool) for tool in tools],
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **options,
            )
        except (jinja2.exceptions.TemplateError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"the chat template refuses these messages: {error}") from error
        return self.encode(text, add_special_tokens=False)

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer's files, and the `generation_config.json` that names end-of-sequence ids unless one is there."""
        path = Path(directory)
        path.mkdir(parents=True, exist_ok=True)
        self.inner.save_pretrained(str(path))
        target = path / GENERATION_CONFIG
        if target.exists():
            return
        if self._source is not None and (self._source / GENERATION_CONFIG).is_file():
            shutil.copyfile(self._source / GENERATION_CONFIG, target)
        elif self._eos_token_ids:
            target.write_text(json.dumps({"eos_token_id": list(self._eos_token_ids)}) + "\n")


def _eos_ids(path: Path) -> tuple[int, ...]:
    """`eos_token_id` of a JSON file, an id or a list of ids; empty when the file or the key is missing."""
    if not path.is_file():
        return ()
    try:
        value = json.loads(path.read_bytes()).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: not a JSON object: {error}") from error
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise ValueError(f"{path}: eos_token_id is {value!r}; it must be a token id or a list of token ids")
    return tuple(ids)


def _byte_pieces(inner: Any) -> list[bytes] | None:
    """Bytes of every token when the vocabulary is a byte-level BPE, else None."""
    backend = getattr(inner, "backend_tokenizer", None)
    if backend is None:
        return None
    tokenizers = require("tokenizers", extra="text", purpose="a Hugging Face tokenizer")
    if not isinstance(backend.decoder, tokenizers.decoders.ByteLevel):
        return None
    to_byte = {ord(char): byte for byte, char in _byte_alphabet().items()}
    pieces = [b""] * backend.get_vocab_size(with_added_tokens=True)
    for token, token_id in backend.get_vocab(with_added_tokens=True).items():
        if token_id >= len(pieces):
            pieces.extend([b""] * (token_id + 1 - len(pieces)))
        try:
            pieces[token_id] = bytes([to_byte[ord(char)] for char in token])
        except KeyError:  # an added token, written in plain text
            pieces[token_id] = token.encode()
    return pieces


def _byte_alphabet() -> dict[int, str]:
    """The visible character that byte-level BPE vocabularies write for each byte (Radford et al. 2019, GPT-2)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {byte: chr(byte) for byte in visible} | {byte: chr(256 + i) for i, byte in enumerate(hidden)}
