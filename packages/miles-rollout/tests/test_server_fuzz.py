"""A few hundred cases of both fuzzers, which are tools; and that they find what is there to be found."""

import asyncio
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from miles_rollout.testing import ScriptedEngine
from miles_rollout.text import CharTokenizer

TOOLS = Path(__file__).parent.parent / "tools"


def tool(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class Broken(ScriptedEngine):
    """Fails in a way nobody foresaw, and never answers one prompt."""

    async def stream(self, request: Any) -> Any:
        if request.input_ids == (5, 6):
            raise KeyError("a bug")
        if len(request.input_ids) > 4:
            await asyncio.sleep(60)
        async for chunk in super().stream(request):
            yield chunk


def test_damaged_bytes() -> None:
    statuses, findings = asyncio.run(tool("fuzz_http").fuzz(400, 7))
    assert not findings, findings[:5]
    assert statuses[200] > 20 and statuses[400] > 100 and statuses[0] > 20, statuses


def test_the_byte_fuzzer_finds_a_bug() -> None:
    tokenizer = CharTokenizer("0123456789+=")
    _, findings = asyncio.run(tool("fuzz_http").fuzz(60, 7, Broken(tokenizer), tokenizer))
    assert any("HTTP 500" in finding for finding in findings), findings


def test_requests_drawn_from_the_openapi_document() -> None:
    pytest.importorskip("schemathesis")
    served, findings, text = asyncio.run(tool("fuzz_openapi").fuzz(100, 3))
    assert served > 100 and not findings, (findings, text[-3000:])
    assert "25 selected" in text


def test_the_schema_fuzzer_finds_a_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("schemathesis")
    module = tool("fuzz_openapi")
    monkeypatch.setattr(module, "ScriptedEngine", lambda tokenizer, **_: ScriptedEngine(tokenizer, max_context=64, fail_after=0))
    _, findings, _ = asyncio.run(module.fuzz(8, 3))
    assert any("500" in finding or "Server error" in finding for finding in findings), findings
