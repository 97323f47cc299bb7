"""Prompts: template, worked examples, chat templates, limits, empty and duplicate rows, SFT masks."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from miles_core.data import DataConfig, DataError, FewShot, SFTExample, load_prompts, load_sft
from miles_rollout.text import CharTokenizer

CHARS = CharTokenizer("".join(chr(c) for c in range(32, 127)) + "\n")


class MarkedTokenizer(CharTokenizer):
    """Chat turns as `<role>content$` and a line break, `$` being end-of-sequence; may forget thoughts of earlier turns."""

    def __init__(self, *, forget: bool = False, end: bool = True, eos: bool = True) -> None:
        super().__init__("".join(chr(c) for c in range(32, 127)) + "\n")
        self.forget, self.end, self.eos = forget, end, eos

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return tuple(self.encode("$")) if self.eos else ()

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], tools: Any = None, add_generation_prompt: bool = True, **options: Any
    ) -> list[int]:
        text = f"T{len(tools)};" if tools else ""
        text += "".join(f"{key}={value};" for key, value in options.items())
        for i, turn in enumerate(messages):
            content = turn["content"]
            if self.forget and i < len(messages) - 1 and turn["role"] == "assistant":
                content = content.split("|")[-1]
            text += f"<{turn['role']}>{content}" + ("$\n" if self.end or turn["role"] != "assistant" else "")
        return self.encode(text + ("<assistant>" if add_generation_prompt else ""))


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def trained_text(example: SFTExample, tokenizer: CharTokenizer) -> str:
    """Untrained tokens as dots."""
    pairs = zip(example.token_ids, example.loss_mask, strict=True)
    return "".join(tokenizer.decode([i], skip_special_tokens=False) if on else "." for i, on in pairs)


def test_plain_prompt_with_template_prefix_and_shots(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", {"prompt": "1+2", "answer": "3"})
    shots = (FewShot(prompt="0+1", answer="1"), FewShot(prompt="2+2", answer="4"))
    config = DataConfig(template="Q{prompt}=", prefix="Add.\n", fewshot=shots, fewshot_separator="\n")
    (prompt,), report = load_prompts(spec, CHARS, config)
    assert prompt.text == "Add.\nQ0+1=1\nQ2+2=4\nQ1+2="
    assert prompt.input_ids == tuple(CHARS.encode(prompt.text))
    assert (prompt.prompt_id, prompt.label, prompt.messages) == ("a.jsonl:1", "3", None)
    assert report.num_rows == report.num_kept == 1 and "TRL prompt-only" in report.lines()[0]


def test_braces_in_text_are_text(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", {"prompt": "\\frac{1}{2} {prompt}"})
    assert load_prompts(spec, CHARS, DataConfig(template="<{prompt}>"))[0][0].text == "<\\frac{1}{2} {prompt}>"


def test_conversation_with_system_shots_template_tools_and_options(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", {"messages": [{"role": "user", "content": "1+2"}], "tools": [{"n": 1}]})
    config = DataConfig(
        template="{prompt}?",
        system_prompt="Be terse",
        fewshot=(FewShot(prompt="a", answer="b"),),
        chat_template_options={"think": 0},
    )
    (prompt,), _ = load_prompts(spec, MarkedTokenizer(), config)
    assert prompt.text == "T1;think=0;<system>Be terse$\n<user>a?$\n<assistant>b$\n<user>1+2?$\n<assistant>"
    assert prompt.messages is not None and prompt.messages[-1] == {"role": "user", "content": "1+2?"}
    own = write(tmp_path / "b.jsonl", {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "x"}]})
    assert (
        load_prompts(own, MarkedTokenizer(), DataConfig(system_prompt="other"))[0][0].text == "<system>S$\n<user>x$\n<assistant>"
    )


def test_chat_template_always_and_never(tmp_path: Path) -> None:
    text = write(tmp_path / "a.jsonl", {"prompt": "hi"})
    chat = write(tmp_path / "b.jsonl", {"prompt": [{"role": "user", "content": "hi"}]})
    tools = write(tmp_path / "d.jsonl", {"prompt": "hi", "tools": [{"n": 1}]})
    assert load_prompts(tools, MarkedTokenizer(), DataConfig(chat_template="never"))[0][0].text == "hi"
    assert load_prompts(text, MarkedTokenizer(), DataConfig(chat_template="always"))[0][0].text == "<user>hi$\n<assistant>"
    assert load_prompts(text, MarkedTokenizer(), DataConfig(chat_template="never"))[0][0].text == "hi"
    for config, spec, message in [
        (DataConfig(chat_template="never"), chat, 'b.jsonl:1: the prompt is a conversation, but data.chat_template = "never"'),
        (DataConfig(prefix="x"), chat, "data.prefix is plain text"),
        (DataConfig(system_prompt="x"), text, "system_prompt needs a conversation"),
        (DataConfig(chat_template_options={"think": 0}), text, "a.jsonl:1: chat_template_options needs a conversation"),
        (DataConfig(), tools, "d.jsonl:1: tools needs a conversation; set data.chat_template"),
    ]:
        with pytest.raises(DataError, match=message):
            load_prompts(spec, MarkedTokenizer(), config)
    multimodal = write(tmp_path / "c.jsonl", {"prompt": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]})
    with pytest.raises(DataError, match="data.template needs a conversation that ends with a user turn of text"):
        load_prompts(multimodal, MarkedTokenizer(), DataConfig(template="{prompt}!"))


def test_config_refuses_contradictions() -> None:
    for settings, message in [
        ({"template": "no place"}, "exactly once"),
        ({"template": "{prompt}{prompt}"}, "exactly once"),
        ({"chat_template": "never", "system_prompt": "x"}, "use prefix"),
        ({"chat_template": "always", "prefix": "x"}, "use system_prompt"),
        ({"colour": 1}, "colour"),
    ]:
        with pytest.raises(ValueError, match=message):
            DataConfig(**settings)
    assert DataConfig(train="a.jsonl", eval=["b", "c"]).train == ("a.jsonl",)


def test_tokenizer_errors_name_the_row(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", {"prompt": "fine"}, {"prompt": "caf\u00e9"})
    with pytest.raises(DataError, match=r"a.jsonl:2: characters outside the tokenizer's alphabet: '\u00e9' at 3"):
        load_prompts(spec, CHARS, DataConfig())


def test_long_prompts(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", *[{"prompt": "x" * n} for n in (3, 9, 4, 5, 8)])
    for config, limit, why in [
        (DataConfig(max_prompt_tokens=4), None, "data.max_prompt_tokens"),
        (DataConfig(max_prompt_tokens=7), 4, "what the context leaves for a prompt"),
    ]:
        with pytest.raises(DataError) as caught:
            load_prompts(spec, CHARS, config, max_tokens=limit)
        text = str(caught.value)
        assert f"a.jsonl:2: the prompt has 9 tokens, the limit is 4 ({why}); change the row, or set data.long_prompts" in text
        assert "a.jsonl:4" in text and "a.jsonl:5" in text and "a.jsonl:3" not in text
    prompts, report = load_prompts(spec, CHARS, DataConfig(max_prompt_tokens=4, long_prompts="drop"))
    assert [prompt.prompt_id for prompt in prompts] == ["a.jsonl:1", "a.jsonl:3"]
    assert report.dropped == {"prompt over 4 tokens": ["a.jsonl:2", "a.jsonl:4", "a.jsonl:5"]}
    assert "3 rows dropped, prompt over 4 tokens: a.jsonl:2, a.jsonl:4, a.jsonl:5" in report.lines()
    with pytest.raises(DataError, match="no row is left(.|\n)*5 rows dropped"):
        load_prompts(spec, CHARS, DataConfig(max_prompt_tokens=1, long_prompts="drop"))


def test_more_than_five_bad_rows_are_counted(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", *[{"prompt": "x" * 9} for _ in range(8)])
    with pytest.raises(DataError, match=r"\.\.\. and 3 more rows"):
        load_prompts(spec, CHARS, DataConfig(max_prompt_tokens=2))


def test_empty_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": "x"}, {"prompt": " \n"}, {"prompt": ""}]
    spec = write(tmp_path / "a.jsonl", *rows)
    with pytest.raises(
        DataError, match=r'a.jsonl:2: the prompt holds no text; change the row, or set data.empty_prompts = "drop"'
    ):
        load_prompts(spec, CHARS, DataConfig(template="Q: {prompt}"))  # a template does not hide it
    prompts, report = load_prompts(spec, CHARS, DataConfig(empty_prompts="drop"))
    assert len(prompts) == 1 and report.dropped == {"empty prompt": ["a.jsonl:2", "a.jsonl:3"]}
    chat = write(tmp_path / "b.jsonl", {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": ""}]})
    with pytest.raises(DataError, match="b.jsonl:1: the prompt holds no text"):
        load_prompts(chat, MarkedTokenizer(), DataConfig())


def test_duplicates_are_kept_dropped_or_refused_and_always_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "x", "label": "1"},
        {"prompt": "x", "label": "2"},
        {"prompt": "x", "label": "1"},
        {"prompt": "y", "label": "1"},
    ]
    spec = write(tmp_path / "a.jsonl", *rows)
    prompts, report = load_prompts(spec, CHARS, DataConfig())
    assert len(prompts) == 4 and report.duplicates == ["a.jsonl:3"]
    assert "1 rows repeat an earlier prompt and label: a.jsonl:3" in report.lines()
    prompts, report = load_prompts(spec, CHARS, DataConfig(duplicate_prompts="drop"))
    assert len(prompts) == 3 and report.dropped == {"duplicate": ["a.jsonl:3"]} and report.num_kept == 3
    with pytest.raises(DataError, match="a.jsonl:3: same prompt and label as a.jsonl:1"):
        load_prompts(spec, CHARS, DataConfig(duplicate_prompts="error"))
    _, report = load_prompts([spec, spec], CHARS, DataConfig())
    assert len(report.duplicates) == 5 and report.duplicates[-1] == f"{spec}:4"  # one name for two sources: the whole path tells


def test_several_sources_of_different_shapes(tmp_path: Path) -> None:
    a = write(tmp_path / "a.jsonl", {"prompt": "x", "label": "1"})
    b = write(tmp_path / "b.jsonl", {"input": "y", "label": "2"})
    prompts, report = load_prompts([a, b, "task:addition?size=2"], CHARS, DataConfig())
    assert [p.prompt_id for p in prompts] == ["a.jsonl:1", "b.jsonl:1", "task:addition:1", "task:addition:2"]
    assert len(report.formats) == 3 and report.num_rows == 4
    with pytest.raises(DataError, match="no data: give at least one source"):
        load_prompts([], CHARS, DataConfig())


def test_sft_text(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", {"prompt": "1+2", "completion": "3"})
    (example,), _ = load_sft(spec, CHARS, DataConfig(template="{prompt}="))
    assert trained_text(example, CHARS) == "....3<eos>"
    assert example.num_trained_tokens == 2 and len(example.token_ids) == len(example.loss_mask)
    (example,), _ = load_sft(spec, CHARS, DataConfig(eos_token_id=1))
    assert example.token_ids[-1] == 1
    with pytest.raises(DataError, match="names no end-of-sequence token; set data.eos_token_id"):
        load_sft(spec, MarkedTokenizer(eos=False), DataConfig())
    (example,), _ = load_sft(spec, MarkedTokenizer(), DataConfig(chat_template="always"))
    assert trained_text(example, CHARS) == "." * len("<user>1+2$\n<assistant>") + "3$"


TURNS = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "u1"},
    {"role": "assistant", "content": "t|a1"},
    {"role": "user", "content": "u2"},
    {"role": "assistant", "content": "a2"},
]


def test_sft_conversation_masks_only_assistant_turns_with_their_end(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", {"messages": TURNS})
    tokenizer = MarkedTokenizer()
    (example,), _ = load_sft(spec, tokenizer, DataConfig())
    head = "." * len("<system>S$\n<user>u1$\n<assistant>")
    middle = "." * len("\n<user>u2$\n<assistant>")
    assert trained_text(example, tokenizer) == f"{head}t|a1${middle}a2$"  # the line break after an end is the template's
    (example,), _ = load_sft(spec, tokenizer, DataConfig(sft_turns="last"))
    assert trained_text(example, tokenizer).replace(".", "") == "a2$"
    shots = DataConfig(fewshot=(FewShot(prompt="q", answer="shot"),), system_prompt="S")
    (example,), _ = load_sft(spec, tokenizer, shots)
    assert trained_text(example, tokenizer).replace(".", "") == "t|a1$a2$"  # a worked example is context, not a target


def test_sft_completion_column_is_imitated_alone(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", {"prompt": TURNS[:4], "completion": TURNS[4:]})
    (example,), _ = load_sft(spec, MarkedTokenizer(), DataConfig())
    assert trained_text(example, CHARS).replace(".", "") == "a2$"
    mixed = write(tmp_path / "b.jsonl", {"prompt": "text", "completion": TURNS[4:]})
    with pytest.raises(DataError, match="use one kind for both"):
        load_sft(mixed, MarkedTokenizer(), DataConfig())


def test_sft_template_that_rewrites_history_is_refused(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", {"messages": TURNS})
    with pytest.raises(DataError, match=r'a.jsonl:1: the chat template writes turn 2 differently.*data.sft_turns = "last"'):
        load_sft(spec, MarkedTokenizer(forget=True), DataConfig())
    (example,), _ = load_sft(spec, MarkedTokenizer(forget=True), DataConfig(sft_turns="last"))
    assert trained_text(example, CHARS).replace(".", "") == "a2$"


def test_sft_end_of_sequence_is_added_where_the_template_has_none(tmp_path: Path) -> None:
    spec = write(tmp_path / "a.jsonl", {"messages": TURNS[1:3]})
    (example,), _ = load_sft(spec, MarkedTokenizer(end=False), DataConfig())
    assert trained_text(example, CHARS) == "." * len("<user>u1$\n<assistant>") + "t|a1$"


def test_sft_refuses_what_it_cannot_imitate_and_counts_what_is_too_long(tmp_path: Path) -> None:
    for row in ({"prompt": "x", "label": "1"}, {"messages": TURNS[:2]}):
        with pytest.raises(DataError, match="a.jsonl:1: nothing to imitate"):
            load_sft(write(tmp_path / "a.jsonl", row), MarkedTokenizer(), DataConfig())
    user_only = {"prompt": TURNS[:2], "completion": TURNS[1:2]}
    with pytest.raises(DataError, match="no assistant turn to imitate"):
        load_sft(write(tmp_path / "a.jsonl", user_only), MarkedTokenizer(), DataConfig())
    spec = write(tmp_path / "b.jsonl", {"prompt": "x", "completion": "y" * 9}, {"prompt": "x", "completion": "y"})
    with pytest.raises(DataError, match=r"b.jsonl:1: the example has 11 tokens, the limit is 5"):
        load_sft(spec, CHARS, DataConfig(max_sequence_tokens=5))
    examples, report = load_sft(spec, CHARS, DataConfig(max_sequence_tokens=5, long_prompts="drop"))
    assert len(examples) == 1 and report.dropped == {"example over 5 tokens": ["b.jsonl:1"]}
    empty = write(tmp_path / "c.jsonl", {"prompt": "", "completion": "y"})
    with pytest.raises(DataError, match="c.jsonl:1: the prompt holds no text"):
        load_sft(empty, CHARS, DataConfig())
    foreign = write(tmp_path / "d.jsonl", {"prompt": "x", "completion": "\u00e9"})
    with pytest.raises(DataError, match="d.jsonl:1: characters outside"):
        load_sft(foreign, CHARS, DataConfig())
