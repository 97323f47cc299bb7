"""The toolchain backend against a folder of elan's shape whose programs are the embedded Lean; Mathlib's paths by contract."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from miles_lean.backends.discover import find_backend
from miles_lean.backends.toolchain import NoToolchain, ToolchainBackend, toolchain_folder, toolchain_name
from miles_lean.cli import main
from miles_lean.embedded.elan import assemble
from miles_lean.honest import honest_proofs
from miles_lean.reward.connect import audit_function, connect
from miles_lean.statement import Statement

NAME = "leanprover/lean4:v4.35.0"


@pytest.fixture(scope="module")
def elan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("elan")
    assemble(home)
    return home


@pytest.fixture
def project(elan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lake project on that toolchain, with a dependency; nothing else on PATH."""
    monkeypatch.setenv("ELAN_HOME", str(elan))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    folder = tmp_path / "project"
    (folder / ".lake" / "build" / "lib" / "lean").mkdir(parents=True)
    (folder / ".lake" / "packages" / "mathlib" / ".lake" / "build" / "lib" / "lean").mkdir(parents=True)
    (folder / "lean-toolchain").write_text(NAME + "\n")
    (folder / "lakefile.toml").write_text('name = "project"\n')
    return folder


@pytest.fixture
def backend(project: Path) -> Iterator[ToolchainBackend]:
    found = ToolchainBackend(project)
    yield found
    found.close()


def test_the_record(backend: ToolchainBackend, elan: Path) -> None:
    record = backend.capabilities
    assert (record.name, record.version, len(record.githash)) == ("toolchain", "4.35.0", 40)
    assert record.can_olean and record.can_lsp and not record.can_replay and not record.has_mathlib
    assert backend.lean == elan / "toolchains" / "leanprover--lean4---v4.35.0" / "bin" / "lean"
    assert backend.search_path[-1] == backend.lean.parent.parent / "lib" / "lean"


def test_verdicts_are_those_of_lean(backend: ToolchainBackend, tmp_path: Path) -> None:
    good = backend.compile("theorem t : 2 + 2 = 4 := rfl", out=tmp_path / "T.olean", deadline=60.0)
    assert good.outcome == "ok" and good.olean is not None and good.olean.read_bytes().startswith(b"olean")
    bad = backend.compile("example : 2 + 2 = 5 := rfl", out=tmp_path / "T.olean", deadline=60.0)
    assert bad.outcome == "rejected" and "Type mismatch" in bad.errors[0].text and not (tmp_path / "T.olean").exists()
    assert backend.elaborate("example : 2 + 2 = 5 := rfl", deadline=60.0).outcome == "rejected"
    hang = backend.elaborate("theorem h (p : Prop) (h : p) : p := by repeat (have h2 := h)", deadline=0.6)
    assert hang.outcome == "timeout"


def test_honest_proofs_pass_on_a_toolchain(backend: ToolchainBackend) -> None:
    refused = {}
    for proof in honest_proofs()[::8]:
        result = backend.elaborate(proof.source, deadline=60.0)
        if result.outcome != "ok":
            refused[proof.name] = result
    assert not refused


def test_a_project_imports_its_own_and_its_dependencies_modules(backend: ToolchainBackend, project: Path) -> None:
    own = project / ".lake" / "build" / "lib" / "lean"
    other = project / ".lake" / "packages" / "mathlib" / ".lake" / "build" / "lib" / "lean"
    assert backend.search_path[:2] == (own, other)
    for folder, name in ((own, "Own"), (other, "Mathlib")):
        source = f"theorem {name}.fact : 2 + 2 = 4 := rfl"
        assert backend.compile(source, out=folder / f"{name}.olean", deadline=60.0).outcome == "ok"
    source = "import Own\nimport Mathlib\nexample : 2 + 2 = 4 ∧ 2 + 2 = 4 := ⟨Own.fact, Mathlib.fact⟩"
    assert backend.elaborate(source, deadline=60.0).outcome == "ok"
    fresh = ToolchainBackend(project, default_header="import Mathlib")
    assert fresh.capabilities.has_mathlib and fresh.capabilities.default_header == "import Mathlib"


def test_without_lake_the_build_folders_are_found(project: Path, elan: Path) -> None:
    (project / ".lake" / "build" / "lib" / "lean" / "Own.olean").write_bytes(b"olean")
    lake = elan / "toolchains" / "leanprover--lean4---v4.35.0" / "bin" / "lake"
    aside = lake.rename(lake.with_name("lake-aside"))
    try:
        assert ToolchainBackend(project).search_path[0] == project / ".lake" / "build" / "lib" / "lean"
    finally:
        aside.rename(lake)


def test_the_identity_follows_manifest_and_toolchain(project: Path) -> None:
    before = ToolchainBackend(project).capabilities.identity
    assert ToolchainBackend(project).capabilities.identity == before
    (project / "lake-manifest.json").write_text('{"packages": []}')
    assert ToolchainBackend(project).capabilities.identity != before


@pytest.mark.parametrize("name", [NAME, "v4.35.0", "4.35.0", "leanprover/lean4:4.35.0"])
def test_names_of_toolchains(project: Path, name: str) -> None:
    if name.endswith(":4.35.0"):
        assert toolchain_folder(name) is None
    else:
        assert toolchain_folder(name) is not None
    (project / "deep" / "er").mkdir(parents=True)
    assert toolchain_name(project / "deep" / "er") == NAME


def test_what_is_missing_is_named(project: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (project / "lean-toolchain").write_text("leanprover/lean4:v4.20.0")
    with pytest.raises(NoToolchain, match=r"toolchain leanprover/lean4:v4\.20\.0 of .*elan toolchain install"):
        _ = ToolchainBackend(project).capabilities
    programs = tmp_path / "programs"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    for version, problem in (("4.35.0", "is another Lean"), ("4.20.0", "")):
        (programs / "lean").write_text(f"#!/bin/sh\n[ $1 = --version ] && echo 'Lean (version {version}, x86_64)'\n")
        (programs / "lean").chmod(0o755)
        if problem:
            with pytest.raises(NoToolchain, match=problem):
                _ = ToolchainBackend(project).capabilities
        else:
            assert ToolchainBackend(project).capabilities.version == version
    (programs / "lean").write_text("#!/bin/sh\necho 'Lean (version 4.8.0, commit x)'\n")
    with pytest.raises(NoToolchain, match=r"4\.9 or newer"):
        _ = ToolchainBackend().capabilities


def test_a_lean_without_a_server_still_elaborates(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An older Lean may refuse our server options; a process per check serves then."""
    real = ToolchainBackend(project).lean
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "lean").write_text(
        f'#!/bin/sh\n[ "$1" = --worker ] && exit 1\n[ "$1" = --print-prefix ] && exit 1\nexec {real} "$@"\n'
    )
    (programs / "lean").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:/usr/bin:/bin")
    monkeypatch.setenv("ELAN_HOME", str(tmp_path / "none"))
    backend = ToolchainBackend()
    assert backend.elaborate("example : 2 + 2 = 5 := rfl", deadline=60.0).outcome == "rejected"
    backend.close()


def test_the_command_line_takes_a_project(project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.lean").write_text("example : 2 + 2 = 4 := rfl\n")
    assert isinstance(find_backend(project=project), ToolchainBackend)
    assert main(["check", "--json", "--project", str(project), str(tmp_path / "a.lean")]) == 0
    entry = json.loads(capsys.readouterr().out)
    assert entry["outcome"] == "ok" and entry["identity"] == ToolchainBackend(project).capabilities.identity


CHECKER = """
import os, sys
from pathlib import Path
from miles_lean.judge.check import Library
from miles_lean.judge.kernel import KernelError
from miles_lean.judge.olean import Module
from miles_lean.judge.replay import replay
from miles_lean.embedded.wheel import find_wheel
own, *library = map(Path, os.environ["LEAN_PATH"].split(":"))
base = Library(find_wheel().library, [folder for folder in library if folder.is_dir()])
try:
    replay(Module((own / f"{sys.argv[1]}.olean").read_bytes(), base.terms), base.builder)
except KernelError as error:
    sys.exit(str(error))
"""


def test_verdicts_on_a_toolchain_come_from_its_checker(project: Path) -> None:
    """The reward's whole road: elaborate, compare modules, let a checker program replay; here one with the real kernel."""
    right, wrong = "theorem t : 2 + 2 = 4 := by sorry", "theorem t : 2 + 2 = 5 := by sorry"
    forged = "set_option debug.skipKernelTC true in decide +kernel"
    asked = [(right, "rfl"), (wrong, forged), (wrong, "rfl"), (wrong, "sorry")]

    async def outcomes() -> list[tuple[str, str]]:
        async with connect(f"toolchain:{project}", workers=1, retries=0) as verifier:
            found = [await verifier.verify(Statement.parse(statement), proof) for statement, proof in asked]
            audit = audit_function(verifier)
            assert audit is not None
            audits = [await asyncio.to_thread(audit, f"{statement}{proof}", 30.0) for statement, proof in AUDITED]
            return [*((row.status, row.reason) for row in found), *(("audit", text) for text in audits)]

    checker = ToolchainBackend(project).lean.with_name("leanchecker")
    with pytest.raises(RuntimeError, match="no checker program found"):
        asyncio.run(outcomes())
    checker.write_text(f"#!/bin/sh\nexec {sys.executable} -c '{CHECKER}' \"$@\"\n")
    checker.chmod(0o755)
    try:
        found = asyncio.run(outcomes())
    finally:
        checker.unlink()
    assert [status for status, _ in found[:4]] == ["accepted", "rejected", "rejected", "rejected"], found
    assert found[1][1].startswith("kernel: ") and found[3][1].startswith("sorry"), found
    assert found[4] == ("audit", "") and found[5][1].startswith("axiom: "), found


AUDITED = (("theorem t : 1 = 1 := ", "rfl"), ("axiom c : False\ntheorem t : 1 = 2 := ", "c.elim"))
