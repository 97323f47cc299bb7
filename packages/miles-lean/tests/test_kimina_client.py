"""Kimina's own client, as it is published, against `miles-lean serve` on the embedded Lean."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

KEY = "a-key-of-the-test"
FILES = {
    "right": "theorem t : 2 + 2 = 4 := rfl",
    "right-too": "theorem u (p q : Prop) (h : p ∧ q) : q ∧ p := ⟨h.2, h.1⟩\n#check u",
    "wrong": "theorem t : 2 + 2 = 5 := rfl",
    "open": "theorem t : 2 + 2 = 5 := by sorry",
    "axiom": "axiom c : False\ntheorem t : 2 + 2 = 5 := c.elim",
    "forged": "theorem t : 2 + 2 = 5 := by set_option debug.skipKernelTC true in decide +kernel",
    "hang": "theorem t : 2 + 2 = 4 := by repeat (have h := True.intro)",
}
"""The axiom and the forgery get no word of complaint from Lean; the server's audit says it."""

CLIENT = """
import asyncio, json, sys, typing
if sys.version_info < (3, 12):  # pydantic wants this TypedDict there; the client takes typing's, see test_kimina_client.py
    import typing_extensions
    typing.TypedDict = typing_extensions.TypedDict
from kimina_client import AsyncKiminaClient, KiminaClient, Snippet

address, key, files = json.loads(sys.stdin.read())
snippets = [Snippet(id=name, code=code) for name, code in files.items()]
client = KiminaClient(api_url=address, api_key=key, n_retries=1)
found = {"health": client.health()}
client.test()
def analysed(response):
    return {row.id: row.analyze().status.value for row in response.results}
found["sync"] = analysed(client.check(snippets, timeout=2, show_progress=False, max_workers=2, debug=True))
async def main():
    other = AsyncKiminaClient(api_url=address, api_key=key, n_retries=1)
    try:
        await other.test()
        return analysed(await other.check(snippets, timeout=2, show_progress=False)), await other.health()
    finally:
        await other.close()
found["async"], found["async_health"] = asyncio.run(main())
said = {row.id: row for row in client.check(snippets[2:3] + snippets[5:6], timeout=5, show_progress=False).results}
found["messages"] = {name: [m["data"] for m in row.response["messages"]] for name, row in said.items()}
found["summary"] = client.check([snippets[0], snippets[2]], timeout=5, show_progress=False).analyze(1.0)
try:
    KiminaClient(api_url=address, api_key="wrong", n_retries=1).api_check(snippets[:1])
    found["wrong_key"] = "answered"
except Exception as error:
    found["wrong_key"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    command = [sys.executable, "-c", "from miles_lean.cli import main; raise SystemExit(main())", "serve", "--port", "0"]
    environment = os.environ | {"MILES_LEAN_API_KEY": KEY}
    with subprocess.Popen([*command, "--workers", "2"], stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        yield next(line for line in process.stderr if "serving on" in line).split()[-1]
        process.terminate()
        assert process.wait(30) == 0


def test_kimina_client_runs_unmodified(server: str) -> None:
    asked = json.dumps([server, KEY, FILES])
    done = subprocess.run([sys.executable, "-c", CLIENT], input=asked, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["health"]["status"] == found["async_health"]["status"] == "ok"
    statuses = {"right": "valid", "right-too": "valid", "wrong": "lean_error", "open": "sorry", "hang": "timeout_error"}
    assert found["sync"] == found["async"] == statuses | {"axiom": "lean_error", "forged": "lean_error"}
    assert any("but is expected to have type\n  2 + 2 = 5" in text for text in found["messages"]["wrong"])
    assert any(text.startswith("judge: kernel") for text in found["messages"]["forged"])
    assert found["wrong_key"] == "RuntimeError: Request failed after 1 retries"  # its word for a 401
