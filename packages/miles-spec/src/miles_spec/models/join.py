"""A policy's folder with its MTP layers in it, as their families publish them: what an engine that serves both reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch

from miles_kernels.nn.checkpoint import INDEX, SINGLE, iter_tensors, load_config, read_json, write_model
from miles_kernels.nn.decoder import stored_dtype
from miles_spec.models.config import MtpConfig, count_field, layout_of
from miles_spec.models.mtp import MtpDraft
from miles_spec.models.store import draft_tensors


def join_policy(policy: str | Path, draft: MtpDraft, out: str | Path, *, dtype: torch.dtype) -> list[Path]:
    """Write the policy of a folder and `draft`, as `dtype`, to the new folder `out`; returns the weight files.

    The policy's files are copied byte for byte. Raises ValueError when `out` exists, when the policy carries MTP layers already,
    or when a reader of its model_type would not look for the draft's names.
    """
    policy, out = Path(policy), Path(out)
    config, data = draft.config, read_json(policy / "config.json")
    assert isinstance(config, MtpConfig)
    _check(policy, config, str(data.get("model_type", "")), out)
    indexed = (policy / INDEX).is_file()  # one file alone is small enough to be read for its names
    where = read_json(policy / INDEX)["weight_map"] if indexed else {name: SINGLE for name, _ in iter_tensors(policy)}
    if any(map(draft_tensors(config), where)):
        raise ValueError(f"{policy}: it carries MTP layers already; write the policy alone first (miles export)")
    names = sorted(set(where.values()))
    count = len(names) + 1
    titles = dict(zip(names, (f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count)), strict=True))
    out.mkdir(parents=True)
    for file in policy.iterdir():
        if file.is_file() and file.name not in ("config.json", INDEX):
            shutil.copyfile(file, out / titles.get(file.name, file.name))
    last = f"model-{count:05d}-of-{count:05d}.safetensors"
    state = {n: t.to(stored_dtype(n, dtype)) if t.is_floating_point() else t for n, t in draft.named_state()}
    write_model(out / "mtp", state, {})
    (out / "mtp" / SINGLE).replace(out / last)
    shutil.rmtree(out / "mtp")
    weight_map = {name: titles[file] for name, file in where.items()} | dict.fromkeys(state, last)
    files = [*titles.values(), last]
    total = sum((out / file).stat().st_size for file in files)
    _write(out / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write(out / "config.json", data | {count_field(config.layout): config.block.num_hidden_layers})
    return [out / file for file in files]


def _check(policy: Path, config: MtpConfig, model_type: str, out: Path) -> None:
    if out.exists():
        raise ValueError(f"{out} exists; name a directory that does not")
    if layout_of(model_type) != config.layout:
        raise ValueError(
            f"{policy}: readers of a {model_type} model look for MTP layers of layout {layout_of(model_type)!r}, the draft has "
            f"{config.layout!r}; write it with --layout {layout_of(model_type)} first"
        )
    shape = load_config(policy)
    if (shape.num_hidden_layers, shape.hidden_size, shape.vocab_size) != (
        config.trunk_layers, config.block.hidden_size, config.block.vocab_size
    ):  # fmt: skip
        raise ValueError(f"{policy}: the draft does not fit this policy: it was made for {config.trunk_layers} layers")


def _write(file: Path, data: dict[str, object]) -> None:
    file.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
