"""Keep `uv.lock` free of addresses and prove that it fits the workspace.

    tools/lock.py update [--upgrade] [NAME ...]   resolve again (online), then scrub; names limit --upgrade
    tools/lock.py scrub                           replace every address in uv.lock by a bare file name
    tools/lock.py check                           no address left, and the lock matches every pyproject.toml (offline)
    tools/lock.py restore                         put addresses back, for tools that need them; do not commit the result
    tools/lock.py setup                           install from the lock, hash-checked (the same as `make setup`)

A scrubbed lock says which versions and which file hashes, never where from: that is the user's own configuration.
It stays a valid uv lock (`uv export`, `uv tree`, `uv lock --check` work); only a bare `uv sync` cannot download from it.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "uv.lock"
PLACE = "wheelhouse"
_REGISTRY = re.compile(r'registry = "[a-z+]+://[^"]*"')
_FILE = re.compile(r'\{ url = "[a-z+]+://[^"]*/([^"/#?]+)(?:[#?][^"]*)?"')


def scrubbed(text: str) -> str:
    """The lock's text with registries named "wheelhouse" and files by their bare names. Idempotent."""
    text = _REGISTRY.sub(f'registry = "{PLACE}"', text)
    return _FILE.sub(lambda match: '{ path = "' + match.group(1).replace("%2B", "+") + '"', text)


def addresses(text: str) -> list[str]:
    """Lines of a lock that still hold an address, as "line N: ..."."""
    return [f"line {number}: {line.strip()[:100]}" for number, line in enumerate(text.splitlines(), 1) if "://" in line]


def uv(*arguments: str, quiet: bool = False) -> int:
    """Run the environment's uv in the workspace; its exit code. Raises SystemExit when it fails, unless quiet."""
    program = ROOT / ".venv" / "bin" / "uv"
    command = [str(program) if program.exists() else "uv", *arguments]
    try:
        code = subprocess.run(command, cwd=ROOT, stderr=subprocess.DEVNULL if quiet else None).returncode
    except FileNotFoundError:
        raise SystemExit("no uv found: run `make setup` first") from None
    if code and not quiet:
        raise SystemExit(f"`uv {' '.join(arguments)}` failed with exit code {code}")
    return code


def scrub() -> None:
    """Rewrite uv.lock in its address-free form; raises SystemExit when an address survives."""
    text = scrubbed(LOCK.read_text())
    if left := addresses(text):
        raise SystemExit("uv.lock: an address of a form tools/lock.py does not know:\n  " + "\n  ".join(left[:5]))
    LOCK.write_text(text)


def restore() -> None:
    """Let uv look up the addresses of exactly the locked versions."""
    with tempfile.TemporaryDirectory() as empty:
        uv("lock", "--find-links", empty)


def update(names: list[str], upgrade: bool) -> None:
    """Resolve what the pyprojects ask for, keep every other pin, and scrub."""
    chosen = [part for name in names for part in ("--upgrade-package", name)] if names else ["--upgrade"] * upgrade
    uv("lock", *chosen)
    scrub()


def check() -> None:
    """Raise SystemExit when the lock names an address or does not fit the pyprojects."""
    if left := addresses(LOCK.read_text()):
        raise SystemExit(f"uv.lock holds {len(left)} addresses, for example {left[0]}\nrun: .venv/bin/python tools/lock.py scrub")
    if uv("lock", "--check", "--offline", "--quiet", quiet=True):
        raise SystemExit("uv.lock does not fit the pyproject.toml files\nrun: .venv/bin/python tools/lock.py update")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=["update", "scrub", "check", "restore", "setup"])
    parser.add_argument("names", nargs="*", help="packages to upgrade (update only)")
    parser.add_argument("--upgrade", action="store_true", help="with update and no names: take the newest of everything")
    options = parser.parse_args()
    if options.action == "update":
        update(options.names, options.upgrade)
    elif options.action == "scrub":
        scrub()
    elif options.action == "check":
        check()
        print("uv.lock: no addresses, fits the workspace")
    elif options.action == "restore":
        restore()
    else:
        raise SystemExit(subprocess.run([sys.executable, str(ROOT / "tools" / "setup.py")]).returncode)


if __name__ == "__main__":
    main()
