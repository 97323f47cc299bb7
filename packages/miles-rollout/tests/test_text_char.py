"""The character tokenizer: ids, files, errors, chat turns."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_rollout.text import CharTokenizer, Tokenizer, load_tokenizer

ALPHABET = "0123456789+= \nabcé世😀"


@pytest.fixture
def tokenizer() -> CharTokenizer:
    return CharTokenizer(ALPHABET)


@given(st.text(alphabet=ALPHABET))
def test_every_text_of_the_alphabet_round_trips(text: str) -> None:
    tokenizer = CharTokenizer(ALPHABET)
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert all(4 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.decode(ids) == text


def test_special_ids_are_fixed_and_hidden_from_text(tokenizer: CharTokenizer) -> None:
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_ids) == (0, 1, (2,))
    ids = [1, *tokenizer.encode("1+1"), 2, 0]
    assert tokenizer.decode(ids) == "1+1"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<bos>1+1<eos><pad>"
    assert isinstance(tokenizer, Tokenizer)


def test_ids_a_padded_model_can_sample_decode_and_negative_ones_do_not(tokenizer: CharTokenizer) -> None:
    assert tokenizer.decode([3, tokenizer.vocab_size + 7]) == "\ufffd\ufffd"
    with pytest.raises(ValueError, match="-4 is negative"):
        tokenizer.decode([5, -4])


def test_unknown_characters_are_named_with_their_places(tokenizer: CharTokenizer) -> None:
    with pytest.raises(ValueError, match=r"'x' at 1, 'y' at 3"):
        tokenizer.encode("1x2y")
    with pytest.raises(ValueError, match="and 2 more"):
        tokenizer.encode("xxxxxxx")
    assert CharTokenizer("12", allow_unknown=True).encode("1x2") == [4, 3, 5]


def test_bad_alphabets_are_refused() -> None:
    with pytest.raises(ValueError, match="'a' more than once|'a', 'b' more than once"):
        CharTokenizer("abab")
    with pytest.raises(ValueError, match="empty"):
        CharTokenizer("")
    with pytest.raises(ValueError, match="surrogate"):
        CharTokenizer("a\ud800")


def test_save_and_load(tokenizer: CharTokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path / "model")
    loaded = load_tokenizer(tmp_path / "model")
    assert loaded == tokenizer and hash(loaded) == hash(tokenizer)
    assert loaded != CharTokenizer(ALPHABET, allow_unknown=True)
    assert ALPHABET[0] in repr(loaded)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "char_tokenizer.json"),
        (b'{"alphabet": 5}', "alphabet"),
        (b'{"alphabet": "ab", "colour": 1}', "colour"),
        (b'{"alphabet": "aa"}', "more than once"),
        (b'{"alphabet": "ab", "schema": 9}', "schema 9"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, content: bytes, words: str) -> None:
    (tmp_path / "char_tokenizer.json").write_bytes(content)
    with pytest.raises(ValueError, match=words) as caught:
        load_tokenizer(tmp_path)
    assert "char_tokenizer.json" in str(caught.value)


def test_the_file_is_plain_json(tokenizer: CharTokenizer, tmp_path) -> None:
    tokenizer.save(tmp_path)
    record = msgspec.json.decode((tmp_path / "char_tokenizer.json").read_bytes())
    assert record == {"alphabet": ALPHABET, "allow_unknown": False, "schema": 1}


def test_chat_turns_are_bracketed(tokenizer: CharTokenizer) -> None:
    messages = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    one, two = tokenizer.encode("1+1="), tokenizer.encode("2")
    assert tokenizer.apply_chat_template(messages) == [1, *one, 2, 1, *two, 2, 1]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=False) == [1, *one, 2, 1, *two, 2]
    with pytest.raises(ValueError, match="tools"):
        tokenizer.apply_chat_template(messages, tools=[{}])
    with pytest.raises(ValueError, match="enable_thinking"):
        tokenizer.apply_chat_template(messages, enable_thinking=True)
    with pytest.raises(ValueError, match=r"messages\[0\].content is list"):
        tokenizer.apply_chat_template([{"role": "user", "content": []}])


def test_a_directory_without_tokenizer_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="looked for char_tokenizer.json, tokenizer.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="not a directory"):
        load_tokenizer(tmp_path / "nowhere")
