"""The suite against our server, against recorded SGLang replies, and against replies that are wrong in one place."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from replay import listening, mutated, recorded, replay_app
from typer.testing import CliRunner

from miles_rollout.cli import app as cli
from miles_rollout.conformance import Options, Report, run_suite
from miles_rollout.conformance.suite import CHECKS
from miles_rollout.server import ServerConfig
from miles_rollout.testing import ScriptedEngine, serving
from miles_rollout.text import CharTokenizer
from miles_rollout.wire import TensorSpec, WeightManifest

TOKENIZER = CharTokenizer("0123456789+= abcdefghijklmnopqrstuvwxyz")
RECORDED = recorded()
SENT = Options(
    prompt_ids=tuple(RECORDED["options"]["prompt_ids"]),
    texts=tuple(RECORDED["options"]["texts"]),
    chat=tuple(RECORDED["options"]["chat"]),
    timeout_s=10.0,
)


def load_weights(directory: str, version: int, digest: str) -> Any:
    if directory != "good":
        raise ValueError(f"{directory}: not a directory")
    spec = TensorSpec(name="a", dtype="float32", shape=(2,), hash="0")
    return WeightManifest(version=version, tensors=(spec,), contract_digest=digest), [("a", None)]


def replay(cases: list[dict[str, Any]], only: str = "*") -> tuple[Report, Any]:
    async def main() -> tuple[Report, Any]:
        app = replay_app(cases)
        async with listening(app) as url:
            return await run_suite(url, SENT, only=only), app.state

    return asyncio.run(main())


def outcomes(report: Report) -> dict[str, str]:
    return {result.name: result.status for result in report.results}


def test_our_server_conforms() -> None:
    async def main() -> Report:
        config = ServerConfig(admin_token="secret")
        engine = ScriptedEngine(TOKENIZER, max_context=2048)
        async with serving(engine, TOKENIZER, config, load_weights=load_weights) as url:
            return await run_suite(url, Options(admin_token="secret", weights="good", timeout_s=10.0))

    report = asyncio.run(main())
    assert report.flavour == "miles" and len(report.results) == len(CHECKS)
    others = {r.name: (r.status, r.detail) for r in report.results if r.status != "pass"}
    assert {name: status for name, (status, _) in others.items()} == {"admin/flush": "unsupported"}, report.text()


def test_recorded_replies_of_sglang_conform() -> None:
    report, state = replay(RECORDED["cases"])
    assert not state.missed and {case["name"] for case in RECORDED["cases"]} == state.seen
    assert report.flavour == "sglang" and report.count("fail") == 0, report.text()
    assert {name for name, status in outcomes(report).items() if status == "unsupported"} == {
        "native/seed_repeats", "admin/killers", "admin/update", "admin/authorisation",
    }  # fmt: skip


def put(path: str, value: Any) -> Callable[[Any], None]:
    def change(case: Any) -> None:
        *steps, last = [int(step) if step.isdigit() else step for step in path.split(".")]
        for step in steps:
            case = case[step]
        assert case[last] != value
        case[last] = value

    return change


MUTANTS = [
    ("native/health", "meta/health", put("status", 503)),
    ("native/health_head", "meta/HEAD health", put("status", 200)),
    ("native/model_info", "meta/model_info", put("json.weight_version", 3)),
    ("native/server_info", "meta/get_server_info", put("json.model_path", None)),
    ("native/unknown_route", "err/unknown route GET", put("json", {"error": "?"})),
    ("native/wrong_method", "err/method not allowed", put("status", 404)),
    ("native/token_ids_in", "generate/input_ids greedy", put("json.meta_info.completion_tokens", 7)),
    ("native/token_ids_in", "generate/input_ids greedy", put("json.output_ids", "464")),
    ("native/explicit_rid", "generate/explicit rid", put("json.meta_info.id", "other")),
    ("native/prompt_logprobs", "generate/logprob_start_len 0", put("json.meta_info.input_token_logprobs.0.0", -1.0)),
    ("native/prompt_logprobs", "generate/logprob_start_len 3", put("json.meta_info.output_token_logprobs.2.1", 1)),
    ("native/several_completions", "generate/n=2 single", put("json.1.meta_info.id", "x_1")),
    ("native/batch", "generate/batch rid string", put("json.0.meta_info.id", "pre_1")),
    ("native/stop_token", "generate/stop_token_ids", put("json.meta_info.finish_reason.matched", 300)),
    ("native/stop_string", "generate/stop string", put("json.text", "ber")),
    ("native/stream", "generate/stream", put("sse.1.output_ids", [300])),
    ("native/stream", "generate/stream", put("sse.2.output_ids", [7, 7, 7])),
    ("native/stream_batch", "generate/stream batch", put("sse.1.index", 0)),
    ("native/metrics", "metrics", put("text", "")),
    ("openai/models", "meta/v1/models", put("json.object", "models")),
    ("openai/completion", "v1/completions greedy", put("json.usage.total_tokens", 9)),
    ("openai/completion", "v1/completions greedy", put("json.metadata", None)),
    ("openai/completion_batch", "v1/completions list n=2", put("json.choices.3.index", 2)),
    ("openai/completion_logprobs", "v1/completions logprobs echo", put("json.choices.0.logprobs.token_logprobs.1", 0.5)),
    ("openai/completion_stream", "v1/completions stream usage", put("sse.0.object", "chat.completion")),
    ("openai/chat", "v1/chat greedy", put("json.choices.0.message.role", "user")),
    ("openai/chat_logprobs", "v1/chat logprobs top 2 n=2", put("json.choices.1.logprobs", None)),
    ("openai/chat_stream", "v1/chat stream", put("sse.0.choices.0.delta.role", None)),
    ("openai/refusals", "v1/err max_tokens 0", put("status", 200)),
    ("admin/malformed", "err/bad json", put("json", {"message": 1})),
    ("admin/bad_prompts", "generate/err prompt equals context", put("status", 500)),
    ("admin/bad_sampling", "generate/err sampling_params top_p=2", put("status", 200)),
    ("admin/bad_types", "generate/err sampling_params stop=5", put("status", 200)),
    ("admin/abort", "control/abort: victim stream", put("sse.0.meta_info.id", 5)),
    ("admin/flush", "control/flush_cache POST idle", put("status", 400)),
    ("admin/pause", "control/pause_generation bad mode", put("status", 200)),
    ("admin/bad_update", "weights/update_from_disk bad path", put("json.success", True)),
]  # fmt: skip


@pytest.mark.parametrize(("check", "case", "change"), MUTANTS, ids=[f"{i}-{m[0]}" for i, m in enumerate(MUTANTS)])
def test_a_wrong_reply_fails_the_check_of_that_name(check: str, case: str, change: Callable[[Any], None]) -> None:
    report, _ = replay(mutated(RECORDED["cases"], case, change), only=check)
    assert outcomes(report) == {check: "fail"}, report.text()


def test_every_check_that_passes_on_recorded_replies_has_a_mutant() -> None:
    unsupported = {"native/seed_repeats", "admin/killers", "admin/update", "admin/authorisation"}
    covered = {check for check, _, _ in MUTANTS} | unsupported | {"native/text_in", "openai/alternatives"}
    assert covered == set(CHECKS)


def test_a_stream_cut_short_fails() -> None:
    def cut(case: Any) -> None:
        case["sse"] = case["sse"][:2]

    report, _ = replay(mutated(RECORDED["cases"], "generate/stream", cut), only="native/stream")
    assert outcomes(report) == {"native/stream": "fail"}


def test_the_command() -> None:
    runner = CliRunner()
    refused = runner.invoke(cli, ["conformance", "http://127.0.0.1:9", "--timeout-s", "2"])
    assert refused.exit_code == 2 and "does not answer" in refused.output
    for arguments, message in (
        (["--text", "a"], "two prompts"),
        (["--prompt-ids", "a"], "integers"),
        (["--prompt-ids", "5"], "5"),
    ):
        bad = runner.invoke(cli, ["conformance", "http://127.0.0.1:9", *arguments])
        assert bad.exit_code == 2 and message in bad.output

    async def main() -> list[Any]:
        async with listening(replay_app(RECORDED["cases"])) as url:
            common = ["conformance", url, "--only", "native/[hmu]*"]
            bad = ["conformance", url, "--only", "native/token_ids_in"]  # our default prompt was not recorded
            return [
                await asyncio.to_thread(runner.invoke, cli, args)
                for args in (common, [*common, "--json"], bad, ["conformance", url, "--only", "nothing"])
            ]

    text, as_json, bad, nothing = asyncio.run(main())
    assert text.exit_code == 0 and "5 pass, 0 fail, 0 unsupported" in text.output
    assert [each["status"] for each in json.loads(as_json.output)["results"]] == ["pass"] * 5
    assert bad.exit_code == 1 and "fail        native/token_ids_in" in bad.output
    assert nothing.exit_code == 2 and "no check matches" in nothing.output
