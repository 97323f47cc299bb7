"""Where a draft's tensors are in checkpoints of each family, and how they are stored there.

| layout | prefix of layer k | join | its order | norms |
|---|---|---|---|---|
| deepseek, glm | model.layers.{N + k}. | eh_proj | embedding, hidden | enorm, hnorm, shared_head.norm |
| mimo | model.mtp_layers.{k}. | input_proj | hidden, embedding | token_layernorm, hidden_layernorm, final_layernorm |
| qwen3_next | mtp. (block: mtp.layers.0.) | fc | embedding, hidden | pre_fc_norm_embedding, pre_fc_norm_hidden, norm; minus 1 |
| EAGLE-3 | midlayer. | fc (of the features) | | hidden_norm, input_layernorm; norm; lm_head, d2t, t2d |
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from miles_kernels.nn.decoder import layer_state

if TYPE_CHECKING:
    from miles_spec.models.eagle3 import Eagle3Draft
    from miles_spec.models.mtp import MtpDraft


@dataclass(frozen=True)
class Entry:
    """One tensor of a checkpoint. `stored` reads it out of the model, `take` writes it in, `wrong` says what is amiss."""

    stored: Callable[[], Tensor]
    take: Callable[[Tensor], None] | None
    """None: it only repeats what others say, or the policy's tensor `shared`."""
    shape: tuple[int, ...]
    wrong: Callable[[Tensor], str | None] = lambda _: None
    optional: bool = False
    shared: str = ""
    """"embed_tokens" or "lm_head": a copy of the policy's."""


def _plain(tensor: Tensor) -> Entry:
    tensor = tensor.detach()

    def take(value: Tensor) -> None:
        tensor.copy_(value)

    return Entry(lambda: tensor, take, tuple(tensor.shape))


def _swapped(tensor: Tensor) -> Entry:
    """Halves of the columns in the other order."""
    tensor = tensor.detach()

    def swap(value: Tensor) -> Tensor:
        return torch.cat(value.chunk(2, 1)[::-1], 1)

    def take(value: Tensor) -> None:
        tensor.copy_(swap(value))

    return Entry(lambda: swap(tensor), take, tuple(tensor.shape))


def _from_one(tensor: Tensor) -> Entry:
    """A norm's weight stored as its distance from 1."""
    tensor = tensor.detach()

    def take(value: Tensor) -> None:
        tensor.copy_(value.float() + 1.0)

    return Entry(lambda: (tensor.float() - 1.0).to(tensor.dtype), take, tuple(tensor.shape))


def _policy_copy(shape: tuple[int, ...], of: str) -> Entry:
    return Entry(lambda: torch.empty(0), None, shape, optional=True, shared=of)


_MTP = {
    "deepseek": ("enorm", "hnorm", "eh_proj", "shared_head.norm"),
    "glm": ("enorm", "hnorm", "eh_proj", "shared_head.norm"),
    "mimo": ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm"),
    "qwen3_next": ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm"),
}


def mtp_names(model: MtpDraft) -> dict[str, Entry]:
    """Every tensor of an MTP draft by its name in a checkpoint of its layout."""
    config, layout = model.config, model.config.layout
    norm = _from_one if layout == "qwen3_next" else _plain
    join = _swapped if layout == "mimo" else _plain
    vocab = (config.block.vocab_size, config.block.hidden_size)
    out: dict[str, Entry] = {}
    for k in range(config.block.num_hidden_layers):
        prefix = {"mimo": f"model.mtp_layers.{k}.", "qwen3_next": "mtp."}.get(layout, f"model.layers.{config.trunk_layers + k}.")
        names = [f"{prefix}{name}.weight" for name in _MTP[layout]]
        own = (norm(model.embed_norm[k]), norm(model.hidden_norm[k]), join(model.join_proj[k]), norm(model.final_norm[k]))
        out |= dict(zip(names, own, strict=True))
        inner = f"{prefix}layers.{k}." if layout == "qwen3_next" else prefix
        for name, view in layer_state(model.block(k)):
            out[inner + name] = norm(view) if "norm" in name else _plain(view)
        if layout in ("deepseek", "glm"):
            out[f"{prefix}embed_tokens.weight"] = _policy_copy(vocab, "embed_tokens")
            out[f"{prefix}shared_head.head.weight"] = _policy_copy(vocab, "lm_head")
    return out


def eagle3_names(model: Eagle3Draft) -> dict[str, Entry]:
    """Every tensor of an EAGLE-3 draft by its name."""
    ids, vocab = model.draft_ids, model.config.block.vocab_size
    rows = torch.arange(len(ids), device=ids.device)

    def take_d2t(value: Tensor) -> None:
        model.use_vocabulary(value.to(ids.device, torch.int64) + rows)

    def wrong_d2t(value: Tensor) -> str | None:
        found = value.to(ids.device, torch.int64) + rows
        fits = bool((found.diff() > 0).all()) and 0 <= int(found[0]) and int(found[-1]) < vocab
        return None if fits else f"does not name ascending ids of 0..{vocab - 1}"

    def members() -> Tensor:
        mask = torch.zeros(vocab, dtype=torch.bool, device=ids.device)
        mask[model.draft_ids] = True
        return mask

    out = {"fc.weight": _plain(model.fc), "midlayer.hidden_norm.weight": _plain(model.hidden_norm)}
    out |= {f"midlayer.{name}": _plain(view) for name, view in layer_state(model.block(0))}
    out |= {"norm.weight": _plain(model.final_norm), "lm_head.weight": _plain(model.lm_head)}
    out["d2t"] = Entry(lambda: model.draft_ids - rows, take_d2t, tuple(ids.shape), wrong_d2t)
    out["t2d"] = Entry(members, None, (vocab,))
    out["embed_tokens.weight"] = _policy_copy((vocab, model.config.block.hidden_size), "embed_tokens")
    return out


@torch.no_grad()
def load_state(entries: dict[str, Entry], tensors: Iterable[tuple[str, Tensor]], what: str, shared: dict[str, Tensor]) -> None:
    """Copy tensors to where `entries` say, once all have been found right.

    Raises ValueError naming every tensor that is missing, unexpected, repeated, misshaped or not what it must be.
    """
    found: dict[str, Tensor] = {}
    wrong: list[str] = []
    for name, tensor in tensors:
        entry = entries.get(name)
        if entry is None:
            wrong.append(f"unexpected {name}")
        elif name in found:
            wrong.append(f"repeated {name}")
        elif tuple(tensor.shape) != entry.shape:
            wrong.append(f"misshaped {name}: {list(tensor.shape)} instead of {list(entry.shape)}")
        elif (reason := entry.wrong(tensor)) is not None:
            wrong.append(f"{name} {reason}")
        elif entry.shared in shared and not torch.equal(tensor.to(shared[entry.shared]), shared[entry.shared]):
            wrong.append(f"{name} differs from the policy's {entry.shared}, which this draft shares")
        found[name] = tensor
    missing = [f"missing {name}" for name, entry in entries.items() if name not in found and not entry.optional]
    if "t2d" in found and "d2t" in found and not wrong:
        ids = found["d2t"].to(torch.int64) + torch.arange(len(found["d2t"]), device=found["d2t"].device)
        if not torch.equal(found["t2d"].bool().nonzero().view(-1), ids):
            wrong.append("t2d marks other tokens than d2t names")
    if wrong or missing:
        raise ValueError(f"weights do not fit the {what}: " + "; ".join(missing + wrong))
    for name, tensor in found.items():
        take = entries[name].take
        if take is not None:
            take(tensor)
