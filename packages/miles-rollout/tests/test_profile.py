"""Traces: taken of the engine's own work, kept in one place, ended by themselves."""

from __future__ import annotations

import asyncio
import gzip
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from engine_cases import TOKENIZER, ask, build, run

from miles_rollout.server import ServerConfig, create_app, profile
from miles_rollout.testing import ScriptedEngine


def client(engine: Any, **config: Any) -> httpx.AsyncClient:
    app = create_app(engine, TOKENIZER, ServerConfig(**config))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, client=("127.0.0.1", 5)), base_url="http://t")


def test_a_profile_shows_the_work_between_start_and_stop(tmp_path: Path) -> None:
    async def main() -> None:
        async with build() as engine, client(engine, profile_dir=str(tmp_path / "traces")) as http:
            assert (await http.post("/stop_profile")).status_code == 400
            started = await http.post("/start_profile", json={"activities": ["CPU", "GPU"]})
            assert started.status_code == 200, started.text
            again = await http.post("/start_profile", json={})
            assert again.status_code == 400 and "stop it first" in again.text
            before = (await engine.generate(ask("a", seed=1))).completions
            stopped = await http.post("/stop_profile")
            assert stopped.status_code == 200 and str(tmp_path) not in stopped.text
            with gzip.open(tmp_path / "traces" / stopped.json()["file"], "rt") as file:
                events = json.load(file)["traceEvents"]
            assert any(str(event.get("name", "")).startswith("aten::") for event in events), "no operator of the engine thread"
            assert (await engine.generate(ask("b", seed=1))).completions == before
            assert (await http.post("/start_profile")).status_code == 200, "a second one after the first"
            assert (await http.post("/stop_profile")).status_code == 200

    run(main())


def test_what_cannot_be_profiled_says_so(tmp_path: Path) -> None:
    async def main() -> None:
        async with build() as engine, client(engine) as http:
            reply = await http.post("/start_profile", json={})
            assert reply.status_code == 400 and "--profile-dir" in reply.text
        async with client(ScriptedEngine(TOKENIZER), profile_dir=str(tmp_path)) as http:
            assert "cannot be profiled" in (await http.post("/start_profile", json={})).text
        (tmp_path / "file").write_text("")
        async with build() as engine, client(engine, profile_dir=str(tmp_path / "file")) as http:
            wrong = await http.post("/start_profile", json={})
            assert wrong.status_code == 400 and str(tmp_path) not in wrong.text
            steps = await http.post("/start_profile", json={"num_steps": 3})
            assert steps.status_code == 400 and "num_steps" in steps.text

    run(main())


def test_a_profile_nobody_stops_ends_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "LONGEST_S", 0.05)

    async def main() -> None:
        async with build() as engine, client(engine, profile_dir=str(tmp_path)) as http:
            assert (await http.post("/start_profile", json={})).status_code == 200
            while not list(tmp_path.glob("*.gz")):  # `run` has a deadline
                await asyncio.sleep(0.02)
            assert (await http.post("/stop_profile")).status_code == 400

    run(main())
