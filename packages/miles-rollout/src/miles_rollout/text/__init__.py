"""Tokenizers: text to token ids and back, chat templates, and text streamed token by token. No torch."""

from miles_rollout.text.base import ByteTokenizer, Message, Tokenizer, load_tokenizer
from miles_rollout.text.char import CharTokenizer
from miles_rollout.text.hf import HFTokenizer
from miles_rollout.text.incremental import IncrementalDecoder

__all__ = ["ByteTokenizer", "CharTokenizer", "HFTokenizer", "IncrementalDecoder", "Message", "Tokenizer", "load_tokenizer"]
