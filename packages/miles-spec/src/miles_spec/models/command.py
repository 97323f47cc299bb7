"""`miles-spec inspect` and `miles-spec export`: what a draft directory holds, and the same draft under other names."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from miles_spec.models.config import LAYOUTS


def add_arguments(commands: Any) -> None:
    """Describe the commands to argparse."""
    inspect = commands.add_parser(
        "inspect",
        help="say what a draft directory holds, and whether it is whole",
        description="DIRECTORY is a draft's, or a policy's that carries MTP layers. Every tensor is read and checked against its "
        "checksum; a missing, unexpected or misshaped one is named, with exit code 2.",
    )
    inspect.add_argument("directory", type=Path)
    inspect.add_argument("--policy", type=Path, help="directory of the policy that the draft must fit")
    export = commands.add_parser(
        "export",
        help="write a draft under another family's names, or in another precision",
        description="Reads the draft in DIRECTORY, or the MTP layers of a policy there, and writes it to OUT.",
    )
    export.add_argument("directory", type=Path)
    export.add_argument("out", type=Path, help="must not exist")
    export.add_argument("--layout", choices=LAYOUTS, help="MTP drafts only; default: as it is")
    export.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: as it is stored")
    export.add_argument("--policy", type=Path, help="directory of the policy that the draft must fit")
    export.add_argument(
        "--join", action="store_true", help="write policy and draft into one directory, as MTP models are published"
    )


def run(options: argparse.Namespace) -> int:
    """Carry out either command. Raises ValueError for what does not fit."""
    from miles_kernels.nn.checkpoint import iter_tensors, load_config
    from miles_kernels.nn.decoder import CORRECTION
    from miles_spec.models.store import load_draft, make_draft, save_draft

    stored = {name: tensor.dtype for name, tensor in iter_tensors(options.directory)}
    policy = load_config(options.policy) if options.policy else None
    draft = load_draft(options.directory, policy)
    mine = dict(draft.named_state())
    mixed = {name: tensor for name, tensor in mine.items() if tensor.is_floating_point() and not name.endswith(CORRECTION)}
    kinds = sorted({str(stored[name]).removeprefix("torch.") for name in mixed})
    if options.command == "inspect":
        print("\n".join(_described(draft, kinds)))
        for name, tensor in mine.items():
            print(f"  {name}  {list(tensor.shape)}  {str(stored[name]).removeprefix('torch.')}")
        return 0
    import torch

    if options.out.exists():
        raise ValueError(f"{options.out} exists; name a directory that does not")
    if len(kinds) > 1 and options.dtype is None:
        raise ValueError(f"{options.directory} stores {' and '.join(kinds)}; say which to write with --dtype")
    if options.layout is not None:
        if draft.config.kind != "mtp":
            raise ValueError(f"--layout is for MTP drafts; {options.directory} holds one of kind {draft.config.kind}")
        other = make_draft(dataclasses.replace(draft.config, layout=options.layout))
        other.load_state_dict(draft.state_dict())
        draft = other
    dtype = getattr(torch, options.dtype or kinds[0])
    for file in _join(draft, options, dtype) if options.join else save_draft(draft, options.out, dtype=dtype):
        print(file)
    return 0


def _join(draft: Any, options: argparse.Namespace, dtype: Any) -> list[Path]:
    from miles_spec.models.join import join_policy

    if options.policy is None or draft.config.kind != "mtp":
        raise ValueError("--join writes an MTP draft into a copy of a policy's directory: name that with --policy")
    return join_policy(options.policy, draft, options.out, dtype=dtype)


def _described(draft: Any, kinds: list[str]) -> list[str]:
    """A few lines on a draft, for people."""
    from miles_spec.models.config import MtpConfig

    config, block = draft.config, draft.config.block
    count = sum(parameter.numel() for parameter in draft.parameters())
    lines = [f"{config.kind}: {count:,} parameters of its own, stored as {' and '.join(kinds)}"]
    if isinstance(config, MtpConfig):
        use = "recycled at every depth" if config.recycled else f"distinct, for drafts of up to {config.max_depth} tokens"
        lines.append(
            f"layers: {block.num_hidden_layers}, {use}; names of layout {config.layout}, behind {config.trunk_layers} layers"
        )
        lines.append("reads: the policy's state after its final norm; embedding and head are the policy's")
    else:
        share = config.draft_vocab_size / block.vocab_size
        lines.append(f"reads: the residual stream before layers {', '.join(map(str, config.feature_layers))} of the policy")
        lines.append(
            f"vocabulary: {config.draft_vocab_size:,} of {block.vocab_size:,} tokens ({share:.1%}); the embedding is the policy's"
        )
    heads = f"{block.num_attention_heads} query and {block.num_key_value_heads} key/value heads of {block.head_dim}"
    lines.append(f"block: {block.family}, hidden {block.hidden_size}, {heads}")
    return lines
