"""What a checking process does: the library's declarations once, then one solution against one challenge."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from miles_lean.judge.compare import BadChallenge, Base, Refused, Rules, base_axioms, compare
from miles_lean.judge.kernel import Builder, Kernel, KernelError
from miles_lean.judge.names import Name, show_name
from miles_lean.judge.olean import Module
from miles_lean.judge.region import Malformed
from miles_lean.judge.replay import replay
from miles_lean.judge.terms import Terms


class Library:
    """Every module below the search path, replayed from an empty environment by the kernel.

    Raises KernelError or Malformed when the library itself does not hold up.
    """

    def __init__(self, library: Path, search_path: list[Path]) -> None:
        self.kernel = Kernel(library)
        self.terms = Terms()
        self.builder = Builder(self.kernel, self.terms)
        modules = {}
        for folder in search_path:
            for path in sorted(folder.rglob("*.olean")):
                name: Name = path.relative_to(folder).with_suffix("").parts
                modules.setdefault(name, Module(path.read_bytes(), self.terms))
        done: set[Name] = set()
        self.count = 0
        for name in sorted(modules):
            self._replay(name, modules, done)
        names = {constant for module in modules.values() for constant in module}
        self.base = Base(names=names, modules=set(modules), axioms=base_axioms(modules))

    def _replay(self, root: Name, modules: dict[Name, Module], done: set[Name]) -> None:
        stack = [root]
        while stack:
            name = stack[-1]
            waiting = [other for other in modules[name].imports if other in modules and other not in done]
            if name not in done and not waiting:
                self.count += replay(modules[name], self.builder)
                done.add(name)
            if name in done:
                stack.pop()
            else:
                stack.extend(waiting)


def run(library: Library, message: dict[str, Any], blobs: list[bytes]) -> bytes:
    """The verdict's core as JSON, for the challenge's and the solution's `.olean` bytes."""
    return json.dumps(_run(library, Rules(**message["rules"]), blobs)).encode()


def _run(library: Library, rules: Rules, blobs: list[bytes]) -> dict[str, Any]:
    started = time.monotonic()
    result: dict[str, Any] = {"accepted": False, "axioms": [], "targets": [], "holes": [], "replayed": 0}
    try:
        challenge = Module(blobs[0], library.terms)
    except (Malformed, ValueError) as error:
        return result | {"failed": f"the challenge's .olean: {error}"}
    try:
        solution = Module(blobs[1], library.terms)
        for name in solution:
            solution[name]
        task, axioms = compare(challenge, solution, library.base, rules)
        result |= {"targets": [show_name(name) for name in task.targets], "holes": [show_name(name) for name in task.holes]}
        result["axioms"] = [show_name(name) for name in axioms]
        result["compared_s"] = time.monotonic() - started
        result["replayed"] = replay(solution, library.builder)
    except BadChallenge as error:
        return result | {"failed": str(error)}
    except Refused as error:
        return result | {"reason": error.reason, "detail": error.detail}
    except KernelError as error:
        return result | {"reason": "kernel", "detail": str(error)}
    except (Malformed, ValueError, MemoryError) as error:
        return result | {"reason": "malformed_olean", "detail": str(error)}
    return result | {"accepted": True, "checked_s": time.monotonic() - started}
