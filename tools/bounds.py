"""Check what a workspace resolver does not: our packages' bounds on each other, on torch and on Python.

    tools/bounds.py

uv takes a workspace member whatever its version, so a bound that excludes it would only show after publishing.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def read_projects(root: Path) -> dict[str, dict]:
    """The [project] tables of all packages, by name."""
    tables = [tomllib.loads(path.read_text())["project"] for path in sorted(root.glob("packages/*/pyproject.toml"))]
    return {table["name"]: table for table in tables}


def requirements(project: dict) -> list[str]:
    """Every requirement line of a package, extras included."""
    extras = project.get("optional-dependencies", {})
    return [*project.get("dependencies", []), *(line for lines in extras.values() for line in lines)]


def problems(projects: dict[str, dict], root_python: str) -> list[str]:
    """One line for each bound that is missing, excludes the present version or differs between packages."""
    found = []
    torch_bounds: dict[str, str] = {}
    for name, project in projects.items():
        if project["requires-python"] != root_python:
            found.append(f"{name}: requires-python {project['requires-python']} differs from the root's {root_python}")
        for line in requirements(project):
            match = re.match(r"([A-Za-z0-9-]+)(?:\[[\w,-]+\])?\s*(.*)", line)
            assert match, line
            target, bounds = match.group(1), match.group(2)
            if target == "torch":
                torch_bounds[name] = bounds
            if target in projects and target != name:
                version = projects[target]["version"]
                major, minor = version.split(".")[:2]
                if bounds != (right := f">={major}.{minor},<{major}.{int(minor) + 1}"):
                    found.append(f"{name}: {line!r}, but {target} is at {version}: write {target}{right}")
    if len(set(torch_bounds.values())) > 1:
        found.append("torch is bounded differently: " + ", ".join(f"{name} {bounds}" for name, bounds in torch_bounds.items()))
    return found


def main() -> None:
    root_python = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    projects = read_projects(ROOT)
    if found := problems(projects, root_python):
        sys.exit("\n".join(found))
    print(f"bounds: {len(projects)} packages agree")


if __name__ == "__main__":
    main()
