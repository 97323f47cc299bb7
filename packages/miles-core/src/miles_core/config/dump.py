"""Write a resolved configuration as TOML and read it back."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from miles_core.config.schema import RunConfig


def config_toml(config: RunConfig) -> str:
    """Every value in force, defaults included; what is unset (None) is left out, because TOML has no null."""
    import tomli_w

    return tomli_w.dumps(_without_none(config.model_dump(mode="json")))


def read_config(run_dir: Path) -> RunConfig:
    """The configuration a run recorded. Raises ValueError when the folder is no run directory."""
    path = run_dir / "config.toml"
    if not path.is_file():
        raise ValueError(f"{run_dir}: no config.toml; a run directory is what miles train writes, for example runs/quickstart")
    return RunConfig.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))


def differences(old: RunConfig, new: RunConfig) -> list[str]:
    """One line per key with two values: "optimizer.lr: 0.001 -> 0.002"."""
    before, after = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
    keys = sorted(before.keys() | after.keys())
    return [f"{key}: {before.get(key)!r} -> {after.get(key)!r}" for key in keys if before.get(key) != after.get(key)]


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    out: dict[str, Any] = {}
    for key, item in value.items():
        out |= _flatten(item, f"{prefix}.{key}" if prefix else key)
    return out


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    return [_without_none(item) for item in value] if isinstance(value, list) else value
