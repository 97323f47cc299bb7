"""The commands about one model: eval and export."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from miles_core.config.schema import RunConfig


def evaluate_model(model: str, recipe: str | None, settings: Sequence[str]) -> None:
    """Print the metrics of a model on held-out prompts as JSON."""
    from miles_kernels.env import prepare_process

    prepare_process()
    from miles_core.compose import evaluate_once

    folder, run = find_model(model)
    config = _eval_config(model, run, recipe, settings)
    source = config.model.model_copy(
        update={"path": str(folder) if folder else model, "source": None, "architecture": None, "alphabet": None}
    )
    result = evaluate_once(config.model_copy(update={"model": source}), _say)
    typer.echo(json.dumps(result.metrics, indent=1, sort_keys=True))


def export_model(source: str, out: Path) -> None:
    """Write OUT and compare what loads from it with the checkpoint, tensor by tensor."""
    from miles_core.trainer.hashing import tensor_hash
    from miles_kernels.contract import Contract
    from miles_kernels.nn.checkpoint import iter_tensors, load_decoder
    from miles_rollout.text import load_tokenizer

    folder, _ = find_model(source)
    if folder is None:
        raise ValueError(f"{source}: not a run or a checkpoint; a packaged model is a folder already")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not empty; choose another folder")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    out.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(folder, partial)
    try:
        wanted = {name: tensor_hash(tensor) for name, tensor in iter_tensors(folder)}
        dtype = json.loads((partial / "config.json").read_text(encoding="utf-8")).get("dtype", "float32")
        contract = Contract.reference(dtype=dtype)
        decoder = load_decoder(partial, contract, contract.torch_dtype)
        load_tokenizer(partial)
        wrong = [name for name, tensor in decoder.hf_state() if tensor_hash(tensor.detach().contiguous()) != wanted.get(name)]
        if wrong:
            raise ValueError(f"{out}: {len(wrong)} tensors read back differently, the first is {wrong[0]}; nothing was exported")
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    typer.echo(
        f"{out}: {len(wanted)} tensors, {sum(p.stat().st_size for p in out.iterdir()) / 2**20:.1f} MiB, read back and equal"
    )


def find_model(name: str) -> tuple[Path | None, Path | None]:
    """The model folder and the run directory behind a run, a checkpoint or a model folder.

    Checkpoints are verified against their hashes. (None, None) is a packaged model. Raises ValueError when there is nothing.
    """
    from miles_core.checkpoint import CheckpointStore, read_checkpoint
    from miles_core.recipes.catalog import MODEL_PREFIX, packaged_model

    if name.startswith(MODEL_PREFIX):
        packaged_model(name)
        return None, None
    for path in (Path(name), Path("runs") / name):
        if (path / "config.toml").is_file():
            return CheckpointStore(path).load().part("trainer") / "model", path
        if (path / "config.json").is_file():
            return path, None
        if path.is_dir() and path.name.startswith("step_"):
            run = path.resolve().parent.parent
            return read_checkpoint(path).part("trainer") / "model", run if (run / "config.toml").is_file() else None
    raise ValueError(
        f"{name}: no run, checkpoint or model folder of that name here or in runs/ (current directory: {Path.cwd()})"
    )


def _eval_config(model: str, run: Path | None, recipe: str | None, settings: Sequence[str]) -> RunConfig:
    from miles_core.config.load import load_config

    if recipe is None and run is not None:
        recipe = str(run / "config.toml")
    if recipe is None and model.startswith("recipe:"):
        recipe = model.removeprefix("recipe:")
    if recipe is None:
        raise ValueError(
            f"{model}: which prompts? name a recipe or file that has data.eval: miles eval {model} --recipe quickstart"
        )
    return load_config(recipe, settings)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
