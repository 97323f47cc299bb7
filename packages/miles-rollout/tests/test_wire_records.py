"""Wire records: every bit survives a round trip, golden JSON holds, what does not fit is refused by name."""

import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_rollout import wire
from miles_rollout.wire import (
    Completion,
    EngineInfo,
    GenerateChunk,
    GenerateRequest,
    GenerateResult,
    Sample,
    SamplingParams,
    TensorSpec,
    WeightManifest,
    WeightSpan,
    WireError,
    decode_json,
    encode_json,
    read_samples,
    write_samples,
)

fp32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
ids = st.lists(st.integers(0, 2**31), max_size=6).map(tuple)
text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
spans = st.builds(WeightSpan, version=st.integers(0, 2**40), start=st.integers(0, 99), stop=st.integers(0, 99))
reasons = st.sampled_from(["stop", "length", "abort"])
matched = st.one_of(st.none(), st.integers(0, 99), text)
sampling = st.builds(SamplingParams, temperature=fp32, stop=st.lists(text, max_size=2).map(tuple), seed=st.integers(0, 2**63 - 1))
floats = st.lists(fp32, max_size=6).map(tuple)
completions = st.builds(
    Completion,
    sample_id=st.integers(0, 2**60),
    index=st.integers(0, 99),
    token_ids=ids,
    logprobs=floats,
    sampled_logprobs=floats,
    text=text,
    finish_reason=reasons,
    matched_stop=matched,
    weight_spans=st.lists(spans, max_size=2).map(tuple),
)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | fp32 | text,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(text, inner, max_size=2),
    max_leaves=4,
)
specs = st.builds(TensorSpec, name=text, dtype=text, shape=ids, hash=text)
records = st.one_of(
    sampling,
    completions,
    st.builds(GenerateRequest, request_id=text, input_ids=ids, sampling=sampling, sample_ids=ids),
    st.builds(GenerateRequest, request_id=text, input_ids=ids, return_prompt_logprobs=st.booleans()),
    st.builds(GenerateResult, request_id=text, completions=st.lists(completions, max_size=2).map(tuple)),
    st.builds(GenerateResult, request_id=text, completions=st.just(()), prompt_logprobs=st.none() | floats),
    st.builds(
        GenerateChunk, request_id=text, sample_id=st.integers(0, 9), index=st.integers(0, 9), token_ids=ids, logprobs=floats,
        sampled_logprobs=floats, text=text, weight_version=st.integers(0, 9), finish_reason=st.none() | reasons,
        matched_stop=matched,
    ),
    st.builds(
        Sample, sample_id=st.integers(0, 9), group_id=st.integers(0, 9), prompt_id=text, token_ids=ids,
        loss_mask=st.lists(st.booleans(), max_size=4).map(tuple), rollout_logprobs=floats, reward=st.none() | fp32, text=text,
        metadata=st.dictionaries(text, json_values, max_size=3), label=st.none() | text,
    ),
    st.builds(WeightManifest, version=st.integers(0, 9), tensors=st.lists(specs, max_size=2).map(tuple), contract_digest=text),
    st.builds(
        EngineInfo, model=text, contract_digest=text, weight_version=st.integers(0, 9), vocab_size=st.integers(1, 9),
        max_context=st.integers(1, 9), max_running=st.integers(1, 9), eos_token_ids=ids,
    ),
)  # fmt: skip


@given(records)
def test_json_and_msgpack_round_trips(record: Any) -> None:
    assert decode_json(encode_json(record), type(record)) == record
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(record), type=type(record)) == record


@given(st.integers(0, 2**32 - 1))
def test_every_finite_fp32_keeps_its_bits(bits: int) -> None:
    value = struct.unpack("<f", struct.pack("<I", bits))[0]
    if not math.isfinite(value):
        return
    again = decode_json(encode_json(SamplingParams(temperature=value)), SamplingParams).temperature
    assert struct.pack("<f", again) == struct.pack("<f", value)


GOLDEN = [
    (
        GenerateRequest(request_id="g7", input_ids=(5, 9), sampling=SamplingParams(n=2, temperature=0.5), sample_ids=(14, 15)),
        b'{"request_id":"g7","input_ids":[5,9],"sampling":{"temperature":0.5,"n":2},"sample_ids":[14,15]}',
    ),
    (
        Sample(
            sample_id=3, group_id=1, prompt_id="t:1", token_ids=(5, 7), loss_mask=(False, True), rollout_logprobs=(0.0, -1.25)
        ),
        b'{"sample_id":3,"group_id":1,"prompt_id":"t:1","token_ids":[5,7],"loss_mask":[false,true],"rollout_logprobs":[0.0,-1.25]}',
    ),
    (
        WeightManifest(
            version=4, tensors=(TensorSpec(name="w", dtype="float32", shape=(2, 3), hash="00ff"),), contract_digest="mk1-0"
        ),
        b'{"version":4,"tensors":[{"name":"w","dtype":"float32","shape":[2,3],"hash":"00ff"}],"contract_digest":"mk1-0"}',
    ),
    (WeightSpan(version=1, start=0, stop=9), b'{"version":1,"start":0,"stop":9}'),
]


@pytest.mark.parametrize(("record", "golden"), GOLDEN)
def test_golden_json(record: Any, golden: bytes) -> None:
    assert encode_json(record) == golden
    assert decode_json(golden, type(record)) == record


def test_another_schema_is_refused_with_a_remedy() -> None:
    assert wire.SCHEMA == 1
    for type_, record in ((GenerateRequest, GOLDEN[0][1]), (Sample, GOLDEN[1][1]), (WeightManifest, GOLDEN[2][1])):
        with pytest.raises(WireError, match="schema 2, this build reads schema 1; use matching versions"):
            decode_json(record[:-1] + b',"schema":2}', type_)
        assert decode_json(record[:-1] + b',"schema":1}', type_) == decode_json(record, type_)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"{", "truncated"),
        (b"[]", "Expected `object`"),
        (b'{"request_id":"a","input_ids":[5],"colour":1}', "colour"),
        (b'{"request_id":"a","input_ids":["5"]}', r"input_ids\[0?(\.\.\.)?\]"),
        (b'{"request_id":"a"}', "input_ids"),
        (b'{"request_id":"a","input_ids":[5],"sampling":{"top_k":1.5}}', "sampling.top_k"),
    ],
)
def test_what_does_not_fit_is_named(data: bytes, words: str) -> None:
    with pytest.raises(WireError, match=words):
        decode_json(data, GenerateRequest)


def test_records_are_frozen() -> None:
    with pytest.raises(AttributeError):
        SamplingParams().n = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"min_new_tokens": 200}, "min_new_tokens=200"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": math.nan}, "top_p=nan"),
        ({"top_k": 0}, "top_k=0"),
        ({"min_p": 1.0}, "min_p=1.0"),
        ({"n": 0}, "n=0"),
        ({"seed": 2**63}, "seed="),
        ({"stop": ("a", "")}, "empty string"),
        ({"n": 0, "top_k": -3}, "top_k=-3.*n=0"),
    ],
)
def test_sampling_out_of_range_is_named(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SamplingParams(**fields).validate()
    SamplingParams(temperature=0.0, top_k=1, seed=2**63 - 1).validate()


def sample(**fields: Any) -> Sample:
    """Two tokens, one trained."""
    base: dict[str, Any] = {"token_ids": (5, 7), "loss_mask": (False, True), "rollout_logprobs": (0.0, -1.0)}
    return Sample(sample_id=3, group_id=1, prompt_id="t:1", **base | fields)


def test_samples_check_their_lengths_and_masks() -> None:
    sample().validate()
    with pytest.raises(WireError, match="sample 3: loss_mask has 1 entries, token_ids has 2"):
        sample(loss_mask=(True,)).validate()
    with pytest.raises(WireError, match="rollout_logprobs has 3"):
        sample(rollout_logprobs=(0.0, 0.0, 0.0)).validate()
    with pytest.raises(WireError, match=r"not 0.0 at \[0\]"):
        sample(rollout_logprobs=(-1.0, -1.0)).validate()


def test_what_a_sample_says_about_itself() -> None:
    both = (WeightSpan(version=4, start=0, stop=1), WeightSpan(version=3, start=1, stop=2))
    assert sample().num_trained_tokens == 1
    assert sample().oldest_version is None and sample(weight_spans=both).oldest_version == 3


def test_sample_files(tmp_path: Path) -> None:
    file = tmp_path / "step.jsonl"
    samples = [sample(reward=0.5, metadata={"a": [1, None]}), sample(text="é\n\u2028")]
    write_samples(file, samples)
    assert read_samples(file) == samples
    assert [path.name for path in tmp_path.iterdir()] == ["step.jsonl"]
    with file.open("ab") as out:
        out.write(b'{"sample_id":1}\n')
    with pytest.raises(WireError, match="step.jsonl:3: not a Sample"):
        read_samples(file)
    write_samples(file, [sample(loss_mask=())])
    with pytest.raises(WireError, match="step.jsonl:1: sample 3: loss_mask has 0"):
        read_samples(file)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    file = tmp_path / "step.jsonl"
    write_samples(file, [sample()])

    def broken() -> Any:
        yield sample(text="new")
        raise RuntimeError("producer died")

    with pytest.raises(RuntimeError):
        write_samples(file, broken())
    assert read_samples(file) == [sample()]


BASE = ("wire", "engine", "client", "cli", "text", "text.hf", "testing", "extras")
PROBE = "import sys; import {module}; print(sorted(set(sys.modules) & {heavy!r}))"
HEAVY = {
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "safetensors",
    "jinja2",
    "starlette",
    "uvicorn",
    "miles_kernels",
    "miles_spec",
}


@pytest.mark.parametrize("module", BASE)
def test_the_base_imports_no_torch(module: str) -> None:
    code = PROBE.format(module=f"miles_rollout.{module}", heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_the_server_imports_no_torch() -> None:
    code = PROBE.format(module="miles_rollout.server", heavy=HEAVY - {"starlette", "uvicorn"})
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"
