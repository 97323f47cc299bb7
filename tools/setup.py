"""Make `.venv`: uv, the locked packages (hash-checked), a torch that fits this machine, and our five packages, editable.

    python3 tools/setup.py            (that is `make setup`)

Needs only Python 3.11 to 3.13 with venv. A second run with nothing changed does nothing and takes well under a second.

torch is not in the lock, because the right build depends on the machine. In this order:
  1. TORCH, when set: a version ("2.13.0"), a range (">=2.12,<2.13") or the path of a wheel;
  2. the torch already in `.venv`, when its version is one the packages allow;
  3. without a GPU on Linux: a CPU build from pip's configured find-links, else from torch's own CPU wheels (uv knows where);
  4. the registry's build.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
VENV = os.path.join(ROOT, ".venv")
STAMP = os.path.join(VENV, ".miles-setup.json")
PYTHONS = ((3, 11), (3, 14))
EXPORT = (
    "export",
    "--quiet",
    "--frozen",
    "--all-packages",
    "--all-extras",
    "--no-extra",
    "lean-dojo",  # ray and seventy more, for a library that only traces repositories
    "--all-groups",
    "--no-emit-workspace",
    "--no-annotate",
)


class SetupError(Exception):
    """Something the user can act on; the message says how."""


def say(text, started=None):
    """Print one line at once, with the seconds since `started`."""
    print("setup: " + text + (f" ({time.monotonic() - started:.1f} s)" if started is not None else ""), flush=True)


def program(name):
    """Path of a program inside .venv."""
    return os.path.join(VENV, "bin", name)


def environment(**extra):
    """The variables for uv: this project's environment, nothing about another active one."""
    env = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONPATH", "UV_PROJECT_ENVIRONMENT")}
    env.update({"VIRTUAL_ENV": VENV, "UV_PROJECT_ENVIRONMENT": VENV, "UV_NO_PROGRESS": "1", "UV_PYTHON": program("python")})
    index = pip_setting("index-url")
    if index and not (env.get("UV_DEFAULT_INDEX") or env.get("UV_INDEX_URL")):
        env["UV_DEFAULT_INDEX"] = index  # uv does not read pip's configuration
    env.update(extra)
    return env


_PIP_SETTINGS = {}


def pip_setting(name):
    """A setting of the user's pip ("find-links"), from its environment or its files; "" when there is none."""
    if not _PIP_SETTINGS:
        listed = subprocess.run([program("python"), "-m", "pip", "config", "list"], capture_output=True, text=True).stdout
        for line in listed.splitlines():
            key, _, value = line.partition("=")
            scope, _, setting = key.strip().rpartition(".")
            if setting not in _PIP_SETTINGS or scope == ":env:":
                _PIP_SETTINGS[setting] = value.strip().strip("'\"").replace("\\n", " ")
        _PIP_SETTINGS.setdefault("", "")
    return _PIP_SETTINGS.get(name, "")


def run(command, what, env=None, quiet=False):
    """Run a command in the workspace; True on success. Raises SetupError with its output, unless quiet."""
    done = subprocess.run(
        command, cwd=ROOT, env=env or environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if done.returncode and not quiet:
        raise SetupError(f"{what} failed (exit code {done.returncode}):\n{done.stdout.strip()}")
    return done.returncode == 0


def pip_install(*arguments, what, quiet=False, **extra):
    """`uv pip install` into .venv, blind to the workspace's own uv configuration (which excludes torch)."""
    return run(
        [program("uv"), "pip", "install", "--quiet", "--no-config", *arguments], what, env=environment(**extra), quiet=quiet
    )


# ------------------------------------------------------------------ what is asked for, what is there


def wanted():
    """Everything that decides what gets installed, as one dictionary of hashes."""
    files = ["uv.lock", "pyproject.toml", "tools/setup.py", *sorted(glob.glob("packages/*/pyproject.toml", root_dir=ROOT))]
    hashes = {}
    for name in files:
        with open(os.path.join(ROOT, name), "rb") as file:
            hashes[name] = hashlib.sha256(file.read()).hexdigest()
    return {"files": hashes, "root": ROOT, "python": platform.python_version(), "torch": os.environ.get("TORCH", "")}


def is_current():
    """True when the last complete setup was for exactly this, and torch is still there."""
    try:
        with open(STAMP) as file:
            return json.load(file) == wanted() and bool(installed_torch()) and os.path.exists(program("miles"))
    except (OSError, ValueError):
        return False


def torch_range():
    """The versions of torch the packages allow, as written in miles-kernels ("torch>=2.11,<2.14")."""
    import tomllib

    with open(os.path.join(ROOT, "packages", "miles-kernels", "pyproject.toml"), "rb") as file:
        dependencies = tomllib.load(file)["project"]["dependencies"]
    return next(line for line in dependencies if re.match(r"torch\b", line))


def installed_torch():
    """Version of the torch in .venv, "" when there is none."""
    found = glob.glob(os.path.join(VENV, "lib", "python3*", "site-packages", "torch-*.dist-info"))
    return os.path.basename(found[0])[len("torch-") : -len(".dist-info")] if found else ""


def allows(bounds, version):
    """Whether a version lies in bounds like ">=2.11,<2.14" or "==2.13.0"; build suffixes ("+cpu") do not count."""

    def key(text):
        numbers = [int(part) for part in re.findall(r"\d+", text.partition("+")[0])][:3]
        return tuple(numbers + [0] * (3 - len(numbers)))

    compare = {
        ">=": lambda a, b: a >= b,
        "<=": lambda a, b: a <= b,
        "==": lambda a, b: a == b,
        "!=": lambda a, b: a != b,
        "<": lambda a, b: a < b,
        ">": lambda a, b: a > b,
    }
    terms = re.findall(r"(>=|<=|==|!=|<|>)\s*([\w.+]+)", bounds)
    return all(compare[sign](key(version), key(bound)) for sign, bound in terms)


def has_gpu():
    """Whether this machine shows an NVIDIA or AMD GPU driver."""
    return bool(shutil.which("nvidia-smi")) or os.path.exists("/proc/driver/nvidia") or os.path.exists("/dev/kfd")


# ------------------------------------------------------------------ phases


def make_venv():
    """Create .venv with pip in it, or keep a working one of the same Python."""
    started = time.monotonic()
    version = ".".join(platform.python_version_tuple()[:2])
    if os.path.exists(program("python")):
        check = f"import sys, pip; sys.exit(sys.version_info[:2] != {sys.version_info[:2]})"
        if subprocess.run([program("python"), "-c", check], stderr=subprocess.DEVNULL).returncode == 0:
            return
        raise SetupError(f"{VENV} is broken or made for another Python than {version}; remove it and run make setup again")
    if os.path.exists(VENV) and os.listdir(VENV):
        raise SetupError(f"{VENV} is there but holds no environment; remove it and run make setup again")
    done = subprocess.run([sys.executable, "-m", "venv", VENV], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        shutil.rmtree(VENV, ignore_errors=True)
        raise SetupError(
            f"`{sys.executable} -m venv` failed. On Debian and Ubuntu install python{version}-venv; "
            f"elsewhere use a Python with ensurepip (PYTHON=/path/to/python3 make setup).\n{done.stdout.strip()}"
        )
    say(f"made .venv with Python {platform.python_version()}", started)


def install_uv():
    """Install the locked uv with pip, checked against the lock's hashes."""
    import tomllib

    started = time.monotonic()
    with open(os.path.join(ROOT, "uv.lock"), "rb") as file:
        package = next(item for item in tomllib.load(file)["package"] if item["name"] == "uv")
    version = package["version"]
    if os.path.exists(program("uv")):
        have = subprocess.run([program("uv"), "--version"], capture_output=True, text=True).stdout
        if have.split()[1:2] == [version]:
            return
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write(f"uv=={version} " + " ".join("--hash=" + wheel["hash"] for wheel in package["wheels"]) + "\n")
        file.flush()
        command = [program("python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary=:all:"]
        run([*command, "--require-hashes", "-r", file.name], "installing uv with pip", env=dict(os.environ))
    say(f"uv {version}", started)


def locked_requirements():
    """(with wheels, without wheels): two lists of the lock's requirement blocks, hashes included."""
    import tomllib

    with open(os.path.join(ROOT, "uv.lock"), "rb") as file:
        sourceonly = {item["name"] for item in tomllib.load(file)["package"] if "sdist" in item and not item.get("wheels")}
    done = subprocess.run([program("uv"), *EXPORT], cwd=ROOT, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise SetupError(f"uv export failed:\n{done.stderr.strip()}")
    blocks = re.findall(r"^[A-Za-z0-9].*(?:\n[ \t].*)*", done.stdout, flags=re.MULTILINE)
    wheels = [block for block in blocks if block.split("==")[0] not in sourceonly]
    return wheels, [block for block in blocks if block.split("==")[0] in sourceonly]


def install_locked(scratch):
    """Install every locked package; what ships no wheel is built from its hash-checked source with the locked setuptools."""
    started = time.monotonic()
    wheels, sources = locked_requirements()
    files = {}
    for name, blocks in (("wheels", wheels), ("sources", sources)):
        files[name] = os.path.join(scratch, name + ".txt")
        with open(files[name], "w") as file:
            file.write("\n".join(blocks) + "\n")
    pip_install("--require-hashes", "--no-deps", "--no-build", "-r", files["wheels"], what="installing the locked packages")
    say(f"{len(wheels)} locked packages, hashes checked", started)
    started = time.monotonic()
    names = ", ".join(block.split("==")[0] for block in sources)
    build = ("--require-hashes", "--no-deps", "--no-build-isolation", "-r", files["sources"])
    if pip_install(*build, what="building " + names, quiet=True):
        say(f"built from source: {names}", started)
    else:
        say(f"could not build {names} (no C compiler?): reasoning-gym tasks will not load; everything else works", started)


def install_torch():
    """Keep, find or fetch a torch, in the order this file's docstring gives."""
    started = time.monotonic()
    bounds, asked, have = torch_range(), os.environ.get("TORCH", "").strip(), installed_torch()
    if asked.endswith(".whl"):
        if not os.path.exists(asked):
            raise SetupError(f"TORCH={asked}: no such file")
        pip_install(os.path.abspath(asked), what=f"installing TORCH={asked}")
        say(f"torch {installed_torch()} from TORCH={asked}", started)
    else:
        terms = re.sub(r"^(torch)?(?=\d)", "==", re.sub(r"^torch(?!\d)", "", asked))
        if have and allows(terms or bounds, have):
            return say(f"torch {have} kept")
        fetch_torch("torch" + terms if asked else bounds, started)
    if not allows(bounds, installed_torch()):
        say(f"warning: torch {installed_torch()} is outside {bounds}, the versions the packages were tested with")


def fetch_torch(requirement, started):
    """Install a torch that satisfies `requirement`: a CPU build when there is no GPU and one can be had."""
    if platform.system() == "Linux" and not has_gpu():
        links = [part for item in pip_setting("find-links").split() for part in ("--find-links", item)]
        if links and pip_install("--no-index", "--no-deps", *links, requirement, what="torch", quiet=True):
            return say(f"torch {installed_torch()} from pip's find-links (no GPU here)", started)
        if pip_install("--torch-backend=cpu", requirement, what="torch", quiet=True, UV_HTTP_TIMEOUT="20", UV_HTTP_RETRIES="0"):
            return say(f"torch {installed_torch()}, CPU build (no GPU here)", started)
        say(f"no CPU build of {requirement} found; taking the registry's, which is large", started)
    pip_install(requirement, what=f"installing {requirement}")
    say(f"torch {installed_torch()} from the registry", started)


def install_ours():
    """Our packages, editable, and a last look at whether all installed versions go together."""
    started = time.monotonic()
    folders = sorted(glob.glob(os.path.join(ROOT, "packages", "*")))
    editable = [part for folder in folders if os.path.exists(folder + "/pyproject.toml") for part in ("--editable", folder)]
    pip_install("--no-deps", "--offline", *editable, what="installing the packages of this repository")
    done = subprocess.run([program("uv"), "pip", "check", "--no-config"], env=environment(), capture_output=True, text=True)
    for line in (done.stdout + done.stderr).splitlines():
        if "requires" in line:
            say("warning: " + line.strip())
    say(f"{len(editable) // 2} packages of this repository, editable", started)


def main():
    """Run all phases, or none when nothing changed."""
    if not PYTHONS[0] <= sys.version_info[:2] < PYTHONS[1]:
        raise SetupError(f"Python 3.11 to 3.13 is needed, this is {platform.python_version()}; try PYTHON=python3.12 make setup")
    if is_current():
        return
    started = time.monotonic()
    make_venv()
    if os.path.exists(STAMP):
        os.remove(STAMP)
    install_uv()
    with tempfile.TemporaryDirectory() as scratch:
        install_locked(scratch)
    install_torch()
    install_ours()
    with open(STAMP, "w") as file:
        json.dump(wanted(), file, indent=1)
    say("ready", started)


if __name__ == "__main__":
    try:
        main()
    except SetupError as error:
        sys.exit(f"setup: {error}")
