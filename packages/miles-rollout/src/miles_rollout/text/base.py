"""What everybody may ask of a tokenizer, and how one is found in a model directory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

Message = Mapping[str, Any]
"""One chat turn, {"role": ..., "content": ...} and whatever else the template reads."""


@runtime_checkable
class Tokenizer(Protocol):
    """Text to token ids and back. Ids are the record; text is derived from them."""

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a completion."""
        ...

    @property
    def pad_token_id(self) -> int:
        """An id that may fill unused places."""
        ...

    @property
    def vocab_size(self) -> int:
        """Ids are smaller than this. A model's own vocabulary may be padded to more."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`; `add_special_tokens` puts around it what the tokenizer puts around a prompt, often nothing."""
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`. Never fails for what a model can sample: an id without text reads U+FFFD or nothing."""
        ...

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **options: Any,
    ) -> list[int]:
        """Ids of a conversation. Raises ValueError when the tokenizer has no template or the template refuses."""
        ...

    def save(self, directory: str | Path) -> None:
        """Write files from which `load_tokenizer(directory)` builds an equal tokenizer."""
        ...


@runtime_checkable
class ByteTokenizer(Protocol):
    """A tokenizer whose tokens are byte strings, so text can be streamed in constant time per token."""

    def token_bytes(self, token_id: int, *, skip_special_tokens: bool = True) -> bytes | None:
        """UTF-8 bytes this token adds to the text; None when that depends on its neighbours."""
        ...


def load_tokenizer(directory: str | Path) -> Tokenizer:
    """The tokenizer of a model directory: `char_tokenizer.json` if present, else what transformers finds there.

    Raises ValueError naming the directory and the files looked for.
    """
    from miles_rollout.text.char import FILE_NAME, CharTokenizer
    from miles_rollout.text.hf import HFTokenizer

    path = Path(directory)
    if not path.is_dir():
        raise ValueError(f"{path}: not a directory; a tokenizer is loaded from a local model directory")
    if (path / FILE_NAME).is_file():
        return CharTokenizer.load(path)
    return HFTokenizer.load(path)
