"""Dataset shapes: each recognised from its columns, described, converted; mixes refused by name."""

from __future__ import annotations

import json

import pytest

from miles_core.data import DataConfig, DataError, RawRow, Row, detect_format
from miles_core.data.formats import convert_rows

CHAT = [{"role": "user", "content": "hi"}]
ANSWERED = [*CHAT, {"role": "assistant", "content": "ho"}]


def convert(*columns: dict, config: DataConfig | None = None) -> tuple[list[Row], str, str]:
    raws = [RawRow(origin=f"t.jsonl:{i}", columns=c) for i, c in enumerate(columns, 1)]
    rows, fmt, line = convert_rows(raws, config or DataConfig(), where="t.jsonl")
    return rows, fmt.name, line


@pytest.mark.parametrize(
    ("columns", "name", "prompt", "completion", "label", "metadata"),
    [
        ({"prompt": "p"}, "prompt", "p", None, None, {}),
        ({"prompt": "p", "answer": 7, "level": "easy"}, "prompt", "p", None, "7", {"level": "easy"}),
        ({"prompt": CHAT, "solution": "s"}, "prompt", tuple(CHAT), None, "s", {}),
        ({"prompt": "p", "completion": "c"}, "prompt_completion", "p", "c", None, {}),
        ({"prompt": CHAT, "completion": ANSWERED[1:]}, "prompt_completion", tuple(CHAT), tuple(ANSWERED[1:]), None, {}),
        ({"messages": ANSWERED}, "messages", tuple(CHAT), tuple(ANSWERED[1:]), None, {}),
        ({"messages": json.dumps(CHAT), "answer": "a"}, "messages", tuple(CHAT), None, "a", {}),
        ({"input": "p", "label": "l", "metadata": {"k": 1}}, "slime", "p", None, "l", {"k": 1}),
        ({"input": CHAT, "label": None, "metadata": None}, "slime", tuple(CHAT), None, None, {}),
        (
            {
                "data_source": "d",
                "prompt": CHAT,
                "ability": "math",
                "reward_model": {"style": "rule", "ground_truth": "42"},
                "extra_info": {"i": 1},
            },
            "verl",
            tuple(CHAT),
            None,
            "42",
            {
                "data_source": "d",
                "ability": "math",
                "extra_info": {"i": 1},
                "reward_model": {"style": "rule", "ground_truth": "42"},
            },
        ),
        (
            {
                "prompt": json.dumps(CHAT),
                "reward_spec": json.dumps({"method": "rule", "ground_truth": [1, 2]}),
                "extra_info": '{"i": 1}',
            },
            "verl",
            tuple(CHAT),
            None,
            "[1,2]",
            {"extra_info": {"i": 1}, "reward_spec": {"method": "rule", "ground_truth": [1, 2]}},
        ),
    ],
)
def test_known_shapes(columns: dict, name: str, prompt: object, completion: object, label: object, metadata: dict) -> None:
    (row,), found, line = convert(columns)
    assert (found, row.prompt, row.completion, row.label, row.metadata) == (name, prompt, completion, label, metadata)
    assert line.startswith("t.jsonl: ") and "prompt = " in line
    if "level" in columns:
        assert line.endswith("to metadata: level")


def test_text_that_looks_like_a_list_stays_text() -> None:
    for text in ("[1, 2, 3] sorted is", '["a"]', "[unclosed", "[]", '[{"no": "role"}]'):
        assert convert({"prompt": text})[0][0].prompt == text


def test_parquets_null_filled_turns_and_tools() -> None:
    turns = [
        {"role": "user", "content": "x", "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
    ]
    schema = [{"type": "function", "function": {"name": "f"}}]
    rows, _, _ = convert(
        {"messages": turns, "tools": json.dumps(schema)}, {"messages": turns, "tools": schema}, {"messages": turns, "tools": None}
    )
    assert rows[0].prompt == ({"role": "user", "content": "x"},)
    assert rows[0].completion == ({"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},)
    assert [row.tools for row in rows] == [schema, schema, None]
    assert convert({"prompt": CHAT[0]})[0][0].prompt == tuple(CHAT)  # one turn without its list


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"question": "q", "answer": "a"},
            r'no known shape; columns are answer, question\. Known shapes:(.|\n)*data.prompt_column = "question"',
        ),
        ({"prompt": "p", "messages": CHAT}, "several shapes at once; columns are messages, prompt"),
        ({"messages": CHAT, "completion": "c"}, "several shapes"),
        ({"instruction": "i", "input": "x", "output": "o"}, "several shapes"),
        ({"prompt": "p", "chosen": "c", "rejected": "r"}, "preference pairs"),
        ({"prompt": "p", "completion": "c", "label": True}, "KTO"),
        ({"prompt": "p", "label": "1", "answer": "1"}, "label and answer could each be the label; choose one"),
        ({"prompt": CHAT, "reward_model": {}, "reward_spec": {}}, "one of reward_model and reward_spec"),
        ({"prompt": CHAT, "reward_model": {"style": "rule"}}, "reward_model has no ground_truth; it has style"),
        ({"prompt": CHAT, "reward_model": "rule"}, "t.jsonl:1: column 'reward_model' is text that is not a JSON object"),
        ({"prompt": CHAT, "reward_model": 3}, "'reward_model' is int; it must be a dictionary"),
        ({"prompt": 3}, "t.jsonl:1: column 'prompt' is int; it must be text or a list of messages"),
        ({"prompt": [{"content": "x"}]}, r"prompt\[0\] is not a message"),
        ({"input": "p", "metadata": {"k": 1}, "k": 2}, "k stands both in column 'metadata' and beside it"),
        ({"messages": CHAT, "tools": "{not json"}, "tools is text that is not JSON"),
        ({"messages": CHAT, "tools": '{"a": 1}'}, "tools must be a list"),
        ({}, "columns are none"),
    ],
)
def test_refused_shapes_name_columns_and_remedy(columns: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        convert(columns)


def test_a_row_without_a_needed_column_is_named() -> None:
    with pytest.raises(DataError, match=r"t.jsonl:2: column 'label' is missing; this row has input, note"):
        convert({"input": "a", "label": "1"}, {"input": "b", "note": "x"})
    with pytest.raises(DataError, match=r"t.jsonl:1: column 'answer' is missing"):
        convert({"prompt": "a"}, {"prompt": "b", "answer": "2"})


def test_columns_chosen_by_hand() -> None:
    config = DataConfig(prompt_column="question", label_column="final")
    (row,), _, _ = convert({"question": "q", "final": 1.5, "input": "i", "messages": []}, config=config)
    assert (row.prompt, row.label, row.metadata) == ("q", "1.5", {"input": "i", "messages": []})
    both = DataConfig(prompt_column="instruction", completion_column="output")
    (row,), _, _ = convert({"instruction": "q", "output": "a", "input": ""}, config=both)
    assert (row.prompt, row.completion, row.completion_is_apart) == ("q", "a", True)
    (row,), name, _ = convert({"question": "q", "completion": "c"}, config=DataConfig(prompt_column="question"))
    assert (name, row.completion) == ("prompt_completion", "c")
    with pytest.raises(DataError, match="data.prompt_column = 'quest', but the columns are question"):
        convert({"question": "q"}, config=DataConfig(prompt_column="quest"))
    with pytest.raises(DataError, match="the slime shape needs column 'input'; columns are prompt"):
        detect_format(["prompt"], DataConfig(format="slime"))
    assert detect_format({"input", "prompt", "label"}, DataConfig(format="slime")).prompt == "input"
    own = DataConfig(prompt_column="prompt", metadata_column="info", tools_column="fns")
    (row,), _, _ = convert({"prompt": "p", "info": '{"a": 1}', "fns": [{"t": 1}]}, config=own)
    assert (row.metadata, row.tools) == ({"a": 1}, [{"t": 1}])
