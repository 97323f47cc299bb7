"""The transformers adapter and streamed text, over small tokenizers trained on the spot."""

import json
import random

import pytest
import tokenizers as tk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from miles_rollout.extras import MissingExtraError, require
from miles_rollout.text import CharTokenizer, HFTokenizer, IncrementalDecoder, Tokenizer, load_tokenizer

SPECIALS = ["<|end|>", "<|turn|>", "<|pad|>"]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'bad' %}{{ raise_exception('role bad is unknown') }}{% endif %}"
    "<|turn|>{{ m['role'] }}:{{ m['content'] }}<|end|>{% endfor %}"
    "{% if tools %}tools={{ tools | length }}{% endif %}{% if shout %}!{% endif %}"
    "{% if add_generation_prompt %}<|turn|>{% endif %}"
)
TEXT = "the quick brown fox jumps over the lazy dog 0123456789 déjà vu 世界 😀 "


def write(path, inner: tk.Tokenizer, **config) -> None:
    path.mkdir()
    inner.save(str(path / "tokenizer.json"))
    base = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIALS[0], "pad_token": SPECIALS[2]}
    (path / "tokenizer_config.json").write_text(json.dumps(base | config))


@pytest.fixture(scope="module")
def byte_dir(tmp_path_factory):
    inner = tk.Tokenizer(tk.models.BPE())
    inner.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tk.decoders.ByteLevel()
    alphabet = tk.pre_tokenizers.ByteLevel.alphabet()
    trainer = tk.trainers.BpeTrainer(vocab_size=330, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator([TEXT] * 10, trainer)
    inner.add_tokens(["käse brot"])
    path = tmp_path_factory.mktemp("hf") / "bytes"
    write(path, inner, chat_template=TEMPLATE)
    (path / "generation_config.json").write_text('{"eos_token_id": [0, 1]}')
    (path / "config.json").write_text('{"eos_token_id": 0, "model_type": "llama"}')
    return path


@pytest.fixture(scope="module")
def fallback_dir(tmp_path_factory):
    """A SentencePiece-like vocabulary: words with a leading space mark, single bytes as fallback."""
    vocab = {token: i for i, token in enumerate([*SPECIALS, "<unk>", *[f"<0x{b:02X}>" for b in range(256)]])}
    for token in ["▁", *"abcdefghijklmnopqrstuvwxyz", "▁th", "▁a"]:
        vocab[token] = len(vocab)
    merges = [("▁", "a")]
    inner = tk.Tokenizer(tk.models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    inner.normalizer = tk.normalizers.Sequence([tk.normalizers.Prepend("▁"), tk.normalizers.Replace(" ", "▁")])
    steps = [tk.decoders.Replace("▁", " "), tk.decoders.ByteFallback(), tk.decoders.Fuse(), tk.decoders.Strip(" ", 1, 0)]
    inner.decoder = tk.decoders.Sequence(steps)
    inner.add_special_tokens(SPECIALS)
    path = tmp_path_factory.mktemp("hf") / "fallback"
    write(path, inner)
    return path


@pytest.fixture(scope="module")
def by_bytes(byte_dir) -> HFTokenizer:
    return HFTokenizer.load(byte_dir)


@pytest.fixture(scope="module")
def by_window(fallback_dir) -> HFTokenizer:
    return HFTokenizer.load(fallback_dir)


def test_ids_specials_and_end_of_sequence(by_bytes: HFTokenizer) -> None:
    assert isinstance(by_bytes, Tokenizer)
    assert by_bytes.eos_token_ids == (0, 1)
    assert by_bytes.pad_token_id == 2
    ids = by_bytes.encode(TEXT)
    assert max(ids) < by_bytes.vocab_size and by_bytes.decode(ids) == TEXT
    assert by_bytes.decode([0, *ids, 0]) == TEXT
    assert by_bytes.decode([*ids, 0], skip_special_tokens=False) == TEXT + "<|end|>"


def test_chat_template(by_bytes: HFTokenizer, by_window: HFTokenizer) -> None:
    messages = [{"role": "user", "content": "the fox"}]
    ids = by_bytes.apply_chat_template(messages)
    assert ids == [1, *by_bytes.encode("user:the fox"), 0, 1]
    with_tools = by_bytes.apply_chat_template(messages, tools=[{"type": "function"}], add_generation_prompt=False, shout=True)
    assert by_bytes.decode(with_tools) == "user:the foxtools=1!"
    with pytest.raises(ValueError, match="role bad is unknown"):
        by_bytes.apply_chat_template([{"role": "bad", "content": ""}])
    with pytest.raises(ValueError, match="no chat template"):
        by_window.apply_chat_template(messages)


def test_save_and_load_keep_ids_template_and_eos(by_bytes: HFTokenizer, by_window: HFTokenizer, tmp_path) -> None:
    by_bytes.save(tmp_path / "a")
    again = load_tokenizer(tmp_path / "a")
    assert again.encode(TEXT) == by_bytes.encode(TEXT)
    assert again.eos_token_ids == (0, 1)
    messages = [{"role": "user", "content": "x"}]
    assert again.apply_chat_template(messages) == by_bytes.apply_chat_template(messages)
    by_window.save(tmp_path / "b")
    assert load_tokenizer(tmp_path / "b").eos_token_ids == by_window.eos_token_ids == (0,)


def test_broken_files_are_named(byte_dir, tmp_path) -> None:
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=str(tmp_path)):
        load_tokenizer(tmp_path)
    bad = tmp_path / "eos"
    bad.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bad / name).write_bytes((byte_dir / name).read_bytes())
    for content in ('{"eos_token_id": "two"}', "[", '{"eos_token_id": [-1]}'):
        (bad / "generation_config.json").write_text(content)
        with pytest.raises(ValueError, match="generation_config.json"):
            load_tokenizer(bad)


def test_a_missing_library_names_the_extra() -> None:
    with pytest.raises(MissingExtraError, match=r'pip install "miles-rollout\[text\]"'):
        require("surely_not_installed.part", extra="text", purpose="this test")


def stream(tokenizer, ids, sizes, **options) -> tuple[list[str], IncrementalDecoder]:
    """Feed `ids` in steps of `sizes` (repeated), return the parts."""
    decoder = IncrementalDecoder(tokenizer, **options)
    parts, at, k = [], 0, 0
    while at < len(ids):
        parts.append(decoder.push(ids[at : at + sizes[k % len(sizes)]]))
        at, k = at + sizes[k % len(sizes)], k + 1
    parts.append(decoder.finish())
    return parts, decoder


RELAXED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


@RELAXED
@given(st.lists(st.integers(0, 330), max_size=40), st.lists(st.integers(1, 5), min_size=1, max_size=4), st.booleans())
def test_byte_streams_equal_decode_for_any_ids(by_bytes: HFTokenizer, ids, sizes, skip) -> None:
    parts, decoder = stream(by_bytes, ids, sizes, skip_special_tokens=skip)
    assert "".join(parts) == decoder.text == by_bytes.decode(ids, skip_special_tokens=skip)


@RELAXED
@given(st.text(alphabet="ab th é世😀", max_size=30), st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_window_streams_equal_decode_for_text(by_window: HFTokenizer, text, sizes) -> None:
    ids = by_window.encode(text)
    parts, decoder = stream(by_window, ids, sizes)
    assert "".join(parts) == decoder.text == by_window.decode(ids)
    assert not any("\ufffd" in part for part in parts), "half a character was shown"


def test_window_streams_survive_broken_bytes_and_hidden_tokens(by_window: HFTokenizer) -> None:
    rng = random.Random()
    broken = [4 + 0x80 + rng.randrange(64) for _ in range(60)]
    parts, _ = stream(by_window, broken, [1])
    assert "".join(parts) == by_window.decode(broken)
    assert sum(bool(part) for part in parts) > 3, "broken bytes must not be held back for ever"
    word = by_window.encode("a th")
    parts, _ = stream(by_window, [*word, 0, 0, *word], [1])
    assert "".join(parts) == by_window.decode([*word, 0, 0, *word])


def first_stop(text_parts: list[str], stops: list[str]) -> tuple[str, str | None]:
    """Naive oracle: add one character at a time, look at the whole text every time."""
    text = ""
    for char in "".join(text_parts):
        text += char
        ends = [stop for stop in stops if text.endswith(stop)]
        if ends:
            longest = max(ends, key=len)
            return text[: -len(longest)], longest
    return text, None


@given(
    st.text(alphabet="abc", max_size=30),
    st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
)
def test_stop_strings_match_the_naive_search(text, stops, sizes) -> None:
    tokenizer = CharTokenizer("abc")
    parts, decoder = stream(tokenizer, tokenizer.encode(text), sizes, stop=stops)
    assert ("".join(parts), decoder.matched) == first_stop([text], stops)
    assert decoder.text == "".join(parts)


def test_text_is_held_back_only_while_it_can_become_a_stop_string() -> None:
    tokenizer = CharTokenizer("abcxyz")
    decoder = IncrementalDecoder(tokenizer, stop=("abcx",))
    assert [decoder.push(tokenizer.encode(c)) for c in "zabcyabcx"] == ["z", "", "", "", "abcy", "", "", "", ""]
    assert decoder.matched == "abcx"
    assert decoder.push(tokenizer.encode("z")) == "" and decoder.finish() == "" and decoder.text == "zabcy"


def test_a_stop_string_before_min_new_tokens_does_not_count() -> None:
    tokenizer = CharTokenizer("abc")
    decoder = IncrementalDecoder(tokenizer, stop=("ab",))
    assert decoder.push(tokenizer.encode("ab"), can_stop=False) == "ab"
    assert decoder.push(tokenizer.encode("a"), can_stop=False) == "a"
    assert decoder.push(tokenizer.encode("b")) == "b", "a match may not begin before stopping is allowed"
    assert decoder.push(tokenizer.encode("cab")) == "c" and decoder.matched == "ab"
    with pytest.raises(ValueError, match="empty string"):
        IncrementalDecoder(tokenizer, stop=("",))
