"""The maintainer's tools tell right from wrong."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace

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


# ---------------------------------------------------------------- allocation failures
@pytest.fixture(name="oom")
def oom_tool(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    return load("inject_oom")


def test_a_part_without_the_sites_asked_for_names_its_own(oom: ModuleType) -> None:
    assert oom.choose("trainer", None) == oom.TRAINER_SITES
    assert oom.choose("all", "publish, forward") == ("forward", "publish")
    for part, sites, named in (
        ("trainer", "publish", "forward, backward"),
        ("engine", "publish,save", "'save'"),
        ("all", "", "''"),
    ):
        with pytest.raises(SystemExit, match=f"--part {part} has no .*{named}"):
            oom.choose(part, sites)
    bench = SimpleNamespace(options=SimpleNamespace(part="trainer", sites="publish", seconds=1.0))
    with pytest.raises(SystemExit, match="its sites are forward, backward, logits, optimizer, save, load, wake"):
        oom.run(bench)


@pytest.mark.parametrize(
    ("counts", "code"),
    [
        ({}, 1),
        ({"fitted": 3}, 1),
        ({"recovered": 1, "fitted": 3}, 0),
        ({"refused": 2}, 0),
        ({"recovered": 5, "OTHER BITS": 1}, 1),
    ],
)
def test_failures_that_were_never_thrown_show_nothing(oom: ModuleType, counts: dict[str, int], code: int) -> None:
    bench = SimpleNamespace(note=lambda name, value: None)
    assert oom.conclude(bench, {"forward": Counter(counts), "backward": Counter()}) == code


class Nvml(SimpleNamespace):
    """NVML of two GPUs, the second of which has an id."""

    class NVMLError(Exception):
        pass

    nvmlMemory_v2 = 2

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByIndex(self, number: int) -> int:
        return number

    def nvmlDeviceGetHandleByUUID(self, name: str) -> int:
        if name not in ("GPU-1b2c", "MIG-77"):
            raise self.NVMLError("Not Found")
        return 1

    def nvmlDeviceGetMemoryInfo(self, handle: int, version: int) -> SimpleNamespace:
        return SimpleNamespace(used=(handle + 1) << 30)


@pytest.mark.parametrize(
    ("visible", "index", "gib"),
    [(None, 0, 1), ("", 1, 2), ("1,0", 0, 2), ("0, 1", 1, 2), ("GPU-1b2c", 0, 2), ("GPU-zz,MIG-77", 1, 2), ("GPU-zz", 0, None)],
)
def test_a_card_is_the_one_that_is_visible(
    visible: str | None, index: int, gib: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())  # type: ignore[arg-type]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    tool = load("measure_memory")
    if gib is None:
        with pytest.raises(SystemExit, match="CUDA_VISIBLE_DEVICES names 'GPU-zz', unknown to NVML"):
            tool.Card(index)
    else:
        assert tool.Card(index).others == gib << 30
