"""The command line, in process; only what must precede torch is run in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import miles_kernels.parity
from miles_kernels import Contract, cli
from miles_kernels.nn.checkpoint import random_decoder
from miles_kernels.nn.config import DecoderConfig
from miles_kernels.parity import Workload, compare, run_packed, run_parity


def test_contract_prints_the_digest(capsys):
    assert cli.main(["contract", "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out.startswith(Contract.reference("bfloat16").digest)
    assert cli.main(["contract", "--json"]) == 0
    assert Contract.from_json(capsys.readouterr().out) == Contract.reference("float32")
    assert cli.main(["contract", "--precision", "fp8"]) == 0
    assert "float8 e4m3" in capsys.readouterr().out


def test_probe_prints_mode_and_failures(capsys, monkeypatch):
    assert cli.main(["probe"]) == 0
    assert capsys.readouterr().out.startswith("mode ")
    import miles_kernels.probe as probe_module

    report = probe_module.ProbeReport("exact", "abc", 4, 4, 2, ("mm K=64 N=192 rows=1 threads=2",), 0.01)
    monkeypatch.setattr(probe_module, "probe", lambda: report)
    assert cli.main(["probe"]) == 0
    out = capsys.readouterr().out
    assert "native differs: mm K=64" in out and "exact mode" in out


def test_wrong_arguments_exit_with_2(capsys):
    for arguments in (["parity", "--family", "gpt2"], ["parity", "--threads", "0"], ["contract", "--dtype", "int8"], []):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2
    capsys.readouterr()


def test_a_value_error_is_a_message_and_exit_2(capsys, monkeypatch):
    def fail(dtype, **_):
        raise ValueError("precision is wrong")

    monkeypatch.setattr(Contract, "reference", fail)
    assert cli.main(["contract"]) == 2
    assert capsys.readouterr().err == "miles-kernels: precision is wrong\n"


def small(family):
    return DecoderConfig(
        family=family,
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        attention_bias=family == "qwen2",
        **({"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16} if family == "qwen3_moe" else {}),
    )


def test_parity_table_and_exit_code(capsys, monkeypatch):
    monkeypatch.setattr(miles_kernels.parity, "tiny_config", small)
    assert cli.main(["parity", "--family", "qwen2", "--threads", "1"]) == 0
    out = capsys.readouterr().out
    assert "random mixture" in out and out.endswith("bitwise equal\n")

    assert cli.main(["parity", "--family", "qwen3_moe", "--dtype", "bfloat16", "--threads", "1", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(rows) >= 12 and all(row["equal"] and row["max_abs"] == 0.0 for row in rows)


class Neighbourly:
    """A model whose hidden states depend on how many tokens share the forward pass."""

    def __init__(self, decoder):
        self.decoder, self.config, self.parameters = decoder, decoder.config, decoder.parameters
        self.logits, self.logprob = decoder.logits, decoder.logprob

    def __call__(self, token_ids, positions, kv):
        return self.decoder(token_ids, positions, kv) * (1 + 1e-6 * len(token_ids))


def test_parity_notices_a_model_that_is_not_aligned(capsys, monkeypatch):
    rows = list(run_parity(Neighbourly(random_decoder(small("llama"), 0)), num_threads=(1,)))
    assert not any(row.equal for row in rows)
    assert all(row.unequal_hidden > 0.5 * row.num_tokens and row.max_abs > 0 for row in rows)
    monkeypatch.setattr(miles_kernels.parity, "run_parity", lambda *a, **k: iter(rows[:2]))
    assert cli.main(["parity", "--family", "llama"]) == 1
    assert capsys.readouterr().out.endswith("UNEQUAL in 2 schedules\n")


@pytest.mark.parametrize("mode", ["tile", "exact"])
def test_the_other_tiers_are_aligned_too(mode):
    decoder = random_decoder(small("llama"), 0, contract=Contract.reference(matmul=mode))
    rows = list(run_parity(decoder, num_threads=(1,)))
    assert rows and all(row.equal for row in rows)


def test_one_changed_bit_is_counted():
    decoder = random_decoder(small("llama"), 1)
    work = Workload.random(50, 3, groups=2, group_size=2)
    alone = run_packed(decoder, work, range(4), per_forward=1, share_prompts=False)
    other = run_packed(decoder, work, range(4), per_forward=4, share_prompts=True)
    assert compare(other, alone, "x", 1).equal
    other.hidden[3, 5] = torch_next_after(other.hidden[3, 5])
    other.logprob[9] = torch_next_after(other.logprob[9])
    row = compare(other, alone, "x", 1)
    assert (row.unequal_hidden, row.unequal_logprob) == (1, 1) and row.max_abs > 0


def torch_next_after(x):
    return x.nextafter(x + 1)


def test_version_and_help_need_no_torch():
    code = "import sys; from miles_kernels.cli import main\ntry: main(['--help'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        miles_kernels.nothing  # noqa: B018
