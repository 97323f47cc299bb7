"""What a model directory says of the model."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec


class ModelShape(msgspec.Struct, frozen=True):
    """What a model's config.json says of it."""

    vocab_size: int
    max_position_embeddings: int = 1 << 30
    eos_token_ids: tuple[int, ...] = ()
    num_moe_layers: int = 0
    experts_top_k: int = 0
    draft_prefixes: tuple[str, ...] = ()
    """How names of tensors begin that are of layers behind the policy's last, for multi-token prediction: a policy has none."""


def model_shape(directory: Path) -> ModelShape:
    """Raises ValueError when there is no config.json: without the vocabulary's size, ids that end the server get through."""
    file = directory / "config.json"
    if not file.exists():
        raise ValueError(f"{directory}: no config.json there; name the model's directory on this machine (MODEL beside the URL)")
    config = json.loads(file.read_text())
    given = config.get("eos_token_id")
    eos = given if isinstance(given, list) else [] if given is None else [given]
    layers = config.get("num_hidden_layers", 0) if config.get("num_experts") or config.get("n_routed_experts") else 0
    return ModelShape(
        vocab_size=config["vocab_size"],
        max_position_embeddings=config.get("max_position_embeddings", 1 << 30),
        eos_token_ids=tuple(eos),
        num_moe_layers=layers,
        experts_top_k=config.get("num_experts_per_tok") or 0,
        draft_prefixes=tuple(
            f"model.layers.{config['num_hidden_layers'] + k}." for k in range(config.get("num_nextn_predict_layers") or 0)
        ),
    )
