"""The code of the packages' READMEs runs as it stands: every Python block, requests by hand, the options of commands."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import shlex
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from miles_rollout.testing import ScriptedEngine, serving
from miles_rollout.text import CharTokenizer
from miles_rollout.wire import TensorSpec, WeightManifest

ROOT = Path(__file__).parents[2]
TOKENIZER = CharTokenizer("0123456789+= ")
ADDRESS = "http://127.0.0.1:30000"
Scope = dict[str, Any]


def readme(package: str) -> str:
    return (ROOT / "packages" / package / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [code for tag, code in fenced if tag == language]


def run(code: str, scope: Scope) -> Scope:
    """Run a block; one that awaits at its top level is awaited."""
    made = eval(compile(code, "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), scope)  # noqa: S307  our own text
    if inspect.iscoroutine(made):
        asyncio.run(made)
    return scope


def bound(code: str) -> set[str]:
    """Names that a block binds, outside of its functions, classes and comprehensions."""
    inner = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.comprehension)

    def of(node: ast.AST) -> Iterator[str]:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((each.asname or each.name).partition(".")[0] for each in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        if not isinstance(node, inner):
            for child in ast.iter_child_nodes(node):
                yield from of(child)

    return set(of(ast.parse(code)))


@contextmanager
def server(**options: Any) -> Iterator[str]:
    """The address of a scripted engine, served by a thread."""
    found: list[str] = []
    up, stop = threading.Event(), threading.Event()

    async def main() -> None:
        async with serving(ScriptedEngine(TOKENIZER), TOKENIZER, **options) as url:
            found.append(url)
            up.set()
            while not stop.is_set():
                await asyncio.sleep(0.02)

    thread = threading.Thread(target=lambda: asyncio.run(main()))
    thread.start()
    try:
        assert up.wait(60), "the server did not start"
        yield found[0]
    finally:
        stop.set()
        thread.join(60)


# ------------------------------------------------------------------ what the texts take for granted


def policy() -> Any:
    from miles_kernels.nn.checkpoint import random_decoder
    from miles_kernels.nn.config import DecoderConfig

    shape = DecoderConfig(
        family="qwen3", vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=128,
    )  # fmt: skip
    return random_decoder(shape, 0)


def kernels_models(code: str) -> Scope:
    """A torch model of the caller's, and one of transformers built from a configuration."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    linear, rows, ids = torch.nn.Linear(24, 100), torch.randn(40, 24), torch.tensor([[3, 5, 7]])
    scope = run(code, {"model": linear, "x": rows, "hf_model": Qwen3ForCausalLM(config).eval(), "input_ids": ids})
    invariant = scope["miles_kernels"].invariant
    with invariant():
        assert torch.equal(linear(rows[:1]), scope["logits"][:1]), "a row is a row, alone and in a batch"
    with pytest.raises(scope["miles_kernels"].mode.UnprovenReduction), invariant():
        rows.cumsum(0)
    return scope


def spec_verify(code: str) -> Scope:
    scope: Scope = {"prompt_ids": [3, 1, 2, 3, 1], "model": lambda ids: torch.randn(len(ids), 40)}
    scope = run(code, scope)
    assert 1 <= len(scope["verified"].token_ids) <= len(scope["proposed"]) + 1
    return scope


def spec_unroll(code: str) -> Scope:
    from miles_spec.models import MtpDraft
    from miles_spec.models.unroll import UnrollPlan
    from miles_spec.targets import draft_targets

    lengths = [5, 7]
    targets = draft_targets(torch.randint(40, (12,)), torch.ones(12, dtype=torch.bool), lengths, num_depths=3)
    scope: Scope = {"MtpDraft": MtpDraft, "UnrollPlan": UnrollPlan, "policy": policy(), "targets": targets, "lengths": lengths}
    scope = run(code, scope | {"policy_hidden": torch.randn(12, 32)})
    assert [tuple(each.shape) for each in scope["states"]] == [(12, 32)] * 3
    return scope


def spec_loss(code: str) -> Scope:
    from miles_spec.losses import draft_loss
    from miles_spec.targets import context_slots, draft_targets

    lengths = [8, 8]
    scope: Scope = {"draft_targets": draft_targets, "context_slots": context_slots, "draft_loss": draft_loss}
    scope |= {"token_ids": torch.randint(40, (16,)), "loss_mask": torch.ones(16, dtype=torch.bool), "lengths": lengths}
    scope |= {"rank": 0, "ranks": 1, "head": policy().head, "policy_hidden": torch.randn(16, 32)}
    scope = run(code, scope | {"hidden_by_depth": [torch.randn(16, 32, requires_grad=True) for _ in range(3)]})
    assert scope["loss"].isfinite() and scope["loss"] > 0
    return scope


def spec_train(code: str) -> Scope:
    from miles_spec import models, train

    sequences = [
        train.Rollout(token_ids=torch.randint(40, (9,)), loss_mask=torch.arange(9) > 2, sample_id=number) for number in range(2)
    ]
    names = ("DraftTrainer", "DraftTrainConfig", "DraftStream", "Policy")
    scope: Scope = {name: getattr(train, name) for name in names} | {"MtpDraft": models.MtpDraft, "policy": policy()}
    scope = run(code, scope | {"rollouts": sequences, "policy_hidden": torch.randn(16, 32)})
    assert "accept_length_estimate" in " ".join(scope["made"].metrics())
    return scope


def lean_text(code: str) -> Scope:
    scope = run(code, {})
    assert scope["source"] == "theorem add_zero' (n : Nat) : n + 0 = n := by\n  rfl\n"
    assert scope["forbidden"](scope["source"]) == []
    return scope


def lean_judge(code: str) -> Scope:
    scope = run(code, {})
    assert scope["verdict"].accepted
    return scope


def lean_dojo(code: str) -> Scope:
    scope = run(code, {})
    assert len(scope["state"].goals_text) == 2
    return scope


def rollout_client(code: str) -> Scope:
    assert code.count(ADDRESS) == 1
    with server() as url:
        return run(code.replace(ADDRESS, url), {})


def rollout_serve(code: str) -> Scope:
    """The block serves until it is told to stop: here, once it has answered."""
    from miles_rollout.child import free_port

    port = free_port()
    assert code.count("30000") == 1
    served: list[dict[str, Any]] = []
    scope: Scope = {}

    async def main() -> None:
        scope.update({"engine": ScriptedEngine(TOKENIZER), "tokenizer": TOKENIZER})
        made = eval(compile(code.replace("30000", str(port)), "README.md", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), scope)  # noqa: S307
        task = asyncio.ensure_future(made)
        async with asyncio.timeout(60), httpx.AsyncClient() as http:
            while not served:
                assert not task.done(), task
                try:
                    served.append((await http.get(f"http://127.0.0.1:{port}/v1/models")).json())
                except httpx.TransportError:
                    await asyncio.sleep(0.02)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    asyncio.run(main())
    assert served[0]["data"][0]["id"] == "policy"
    return scope


def alone(code: str) -> Scope:
    return run(code, {})


CODE: dict[str, tuple[Callable[[str], Scope], ...]] = {
    "miles-kernels": (alone, kernels_models, alone),
    "miles-spec": (spec_verify, spec_unroll, spec_loss, spec_train),
    "miles-rollout": (rollout_client, rollout_serve),
    "miles-core": (),
    "miles-lean": (lean_text, lean_judge, lean_dojo),
}
"""What runs each Python block of a README, in order, and gives the names that are then there."""


def test_every_block_of_every_package_is_run() -> None:
    packages = sorted(page.parent.name for page in ROOT.glob("packages/*/README.md"))
    assert {package: len(blocks(readme(package), "python")) for package in packages} == {
        package: len(CODE[package]) for package in packages
    }
    assert {tag for package in packages for tag in re.findall(r"^```(\w+)$", readme(package), re.MULTILINE)} <= {"python", "toml"}


@pytest.mark.parametrize(
    ("package", "number"), [(package, number) for package, runners in CODE.items() for number in range(len(runners))]
)
def test_a_block_runs(package: str, number: int) -> None:
    code = blocks(readme(package), "python")[number]
    names = bound(code)
    assert names, "a block that binds nothing shows nothing"
    assert names <= CODE[package][number](code).keys()


# ------------------------------------------------------------------ miles-rollout by hand


def load_weights(directory: str, version: int, digest: str) -> Any:
    assert directory == "/models/step_7"
    spec = TensorSpec(name="a", dtype="float32", shape=(2,), hash="0")
    return WeightManifest(version=version, tensors=(spec,), contract_digest=digest), [("a", None)]


def curl(line: str, url: str, token: str) -> httpx.Response:
    """What curl would send for a line of the README."""
    words = shlex.split(line.replace("TOKEN", token))
    assert words[:2] == ["curl", "-s"] and words[2].startswith("localhost:30000/"), line
    options = list(zip(words[3::2], words[4::2], strict=True))
    assert {option for option, _ in options} <= {"-H", "-d"}, line
    headers = dict(value.split(": ", 1) for option, value in options if option == "-H")
    body = next((value for option, value in options if option == "-d"), None)
    return httpx.request(
        "GET" if body is None else "POST", words[2].replace("localhost:30000", url), headers=headers, content=body
    )


def test_the_requests_by_hand_are_answered() -> None:
    from miles_rollout.server import ServerConfig

    joined = [code.replace("\\\n", " ") for code in blocks(readme("miles-rollout"), "")]
    lines = [line for code in joined for line in code.splitlines() if line.startswith("curl ")]
    with server(config=ServerConfig(admin_token="secret"), load_weights=load_weights) as url:
        replies = {re.findall(r"30000(/\S+)", line)[0]: curl(line, url, "secret") for line in lines}
        assert {path: reply.status_code for path, reply in replies.items()} == dict.fromkeys(replies, 200), replies
        assert len(replies) == len(lines) >= 4
        assert "updated to 7" in replies["/update_weights_from_disk"].json()["message"]
        assert replies["/v1/chat/completions"].text.rstrip().endswith("data: [DONE]")
        update = next(line for line in lines if "update_weights" in line)
        assert curl(update, url, "wrong").status_code == 401


def test_the_commands_have_the_options_that_are_shown() -> None:
    from typer.main import get_command

    from miles_rollout.cli import app

    commands = getattr(get_command(app), "commands")  # noqa: B009  of a group, which the type does not say
    shown = 0
    for page in (readme("miles-rollout"), (ROOT / "README.md").read_text(encoding="utf-8")):
        for line in re.findall(r"^(?:\.venv/bin/)?miles-rollout (.*)$", page, re.MULTILINE):
            name, *words = shlex.split(line, comments=True)
            own = words[: words.index("--")] if "--" in words else words
            known = {option for param in commands[name].params for option in param.opts}
            assert {word for word in own if word.startswith("-")} <= known, line
            shown += 1
    assert shown > 12
