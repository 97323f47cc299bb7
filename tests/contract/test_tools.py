"""The maintainer's tools tell right from wrong."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
KNOWN_HOSTS = {"www.apache.org", "arxiv.org", "www.w3.org", "127.0.0.1"}
"""Hosts with a dot in their name that a file may mention, beside *.example."""


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tools_{name}", ROOT / "tools" / f"{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tracked_texts() -> dict[str, str]:
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    texts = {}
    for name in names:
        data = (ROOT / name).read_bytes() if (ROOT / name).is_file() else b"\0"
        if b"\0" not in data:
            texts[name] = data.decode("utf-8")
    return texts


def test_no_file_names_a_foreign_host_or_a_private_path() -> None:
    places = []
    folders = ["wo" + r"rk(?![\w-])", "ro" + r"ot(?![\w-])", "ho" + "me/[a-z]", "op" + "t/(?:wheels|py)"]
    private = re.compile("(?<![\\w.])/(?:" + "|".join(folders) + ")/?")
    for name, text in tracked_texts().items():
        for number, line in enumerate(text.splitlines(), 1):
            hosts = {host.rstrip(".") for host in re.findall(r"https?://([\w-]+\.[\w.-]+)", line)}
            foreign = {host for host in hosts - KNOWN_HOSTS if not host.endswith(".example")}
            if foreign or private.search(line):
                places.append(f"{name}:{number}: {line.strip()[:100]}")
    assert not places, "\n".join(places)


def test_scrubbing_a_lock_removes_every_address_and_nothing_else() -> None:
    lock = load("lock")
    address = "https" + "://files.example/a/b"
    text = (
        f'source = {{ registry = "{address}/simple" }}\n'
        f'sdist = {{ url = "{address}/x-1.tar.gz", hash = "sha256:aa", size = 3 }}\n'
        f'    {{ url = "{address}/x-1%2Bcpu-py3-none-any.whl", hash = "sha256:bb" }},\n'
    )
    clean = lock.scrubbed(text)
    assert clean.splitlines() == [
        'source = { registry = "wheelhouse" }',
        'sdist = { path = "x-1.tar.gz", hash = "sha256:aa", size = 3 }',
        '    { path = "x-1+cpu-py3-none-any.whl", hash = "sha256:bb" },',
    ]
    assert lock.scrubbed(clean) == clean
    assert not lock.addresses(clean)
    assert lock.addresses(text) == [f"line {n}: {line.strip()[:100]}" for n, line in enumerate(text.splitlines(), 1)]


def test_the_lock_of_the_repository_holds_no_address_and_only_hashed_files() -> None:
    text = (ROOT / "uv.lock").read_text()
    assert "://" not in text
    files = re.findall(r"^\s*(?:sdist = )?\{ path = .*$", text, flags=re.MULTILINE)
    assert len(files) > 100
    assert all('hash = "sha256:' in line for line in files)


def test_bounds_that_exclude_the_present_version_are_found() -> None:
    bounds = load("bounds")
    projects = bounds.read_projects(ROOT)
    python = projects["miles-kernels"]["requires-python"]
    assert bounds.problems(projects, python) == []
    projects["miles-kernels"] = {**projects["miles-kernels"], "version": "0.9.0"}
    assert any("write miles-kernels>=0.9,<0.10" in line for line in bounds.problems(projects, python))
    projects["miles-spec"] = {**projects["miles-spec"], "dependencies": ["torch>=1"]}
    assert any("torch is bounded differently" in line for line in bounds.problems(projects, python))


def test_sizes_measure_files_and_functions(tmp_path: Path) -> None:
    sizes = load("sizes")
    path = tmp_path / "long.py"
    path.write_text("async def f():\n" + "    pass\n" * 120)
    assert [(lines, limit) for lines, limit, _ in sizes.measure(path)] == [(121, 600), (121, 100)]


@pytest.mark.parametrize(
    ("bounds", "version", "allowed"),
    [
        ("torch>=2.11,<2.14", "2.13.0+cpu", True),
        ("torch>=2.11,<2.14", "2.11.0+cu130", True),
        ("torch>=2.11,<2.14", "2.14.0", False),
        ("torch>=2.11,<2.14", "2.9.1", False),
        ("==2.13.0", "2.13.0+cpu", True),
        ("==2.13.0", "2.13.1", False),
        ("!=2.12.0", "2.12.0", False),
    ],
)
def test_setup_knows_which_torch_fits(bounds: str, version: str, allowed: bool) -> None:
    assert load("setup").allows(bounds, version) is allowed


def test_setup_reads_the_range_of_torch_from_the_packages() -> None:
    assert load("setup").torch_range().startswith("torch>=")
