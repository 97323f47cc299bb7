"""Hugging Face tensors and Megatron tensors of the same decoder: names, layouts, shards. Torch only, no megatron-core.

Megatron fuses what Hugging Face keeps apart, and orders it so that a tensor-parallel cut along dim 0 is a valid model:

- `linear_qkv` rows are grouped by key/value head: its query heads, then its key, then its value;
- `linear_fc1` is gate over up; each tensor-parallel process holds its gate rows over its up rows;
- the vocabulary is padded with zero rows to a multiple that every process can share.

Example: for part in parts(config, padded_vocab): megatron[part.name] = part.join(hf_tensors)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from miles_kernels.nn.config import DecoderConfig
from miles_kernels.nn.decoder import CORRECTION

EXPERT_BIAS = "router.expert_bias"
"""How Megatron's name of a router's correction ends: a buffer, float32 in a model of any dtype."""
Kind = Literal["copy", "qkv", "glu", "vocab"]
Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Part:
    """One Megatron tensor and the Hugging Face tensors it is made of."""

    name: str
    """Megatron's name, with the layer's and the expert's number in the whole model."""
    kind: Kind
    hf: tuple[tuple[str, Shape], ...]
    """(name, shape) of each Hugging Face tensor, in the order they are joined."""
    shape: Shape
    """Shape of the whole Megatron tensor, vocabulary padding included."""
    groups: int = 1
    """Key/value heads (qkv only)."""

    def dtype(self, model: torch.dtype) -> torch.dtype:
        """Of the tensor, in a model of that dtype."""
        return torch.float32 if self.name.endswith(EXPERT_BIAS) else model

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """The whole Megatron tensor made of `tensors`, in the order of `hf`. A copy where anything is rearranged."""
        if self.kind == "qkv":
            rest = self.shape[1:]
            return torch.cat([t.reshape(self.groups, -1, *rest) for t in tensors], 1).reshape(self.shape)
        if self.kind == "glu":
            return torch.cat(list(tensors), 0)
        if self.kind == "vocab" and self.shape[0] > tensors[0].shape[0]:
            return torch.cat([tensors[0], tensors[0].new_zeros(self.shape[0] - tensors[0].shape[0], *self.shape[1:])])
        return tensors[0]

    def split(self, tensor: Tensor) -> list[tuple[str, Tensor]]:
        """(HF name, tensor) of each part of the whole Megatron tensor; the inverse of `join`."""
        if self.kind == "qkv":
            rest, grouped = self.shape[1:], tensor.reshape(self.groups, -1, *self.shape[1:])
            widths = [shape[0] // self.groups for _, shape in self.hf]
            pieces = [piece.reshape(-1, *rest) for piece in grouped.split(widths, 1)]
        else:
            rows = [shape[0] for _, shape in self.hf]
            pieces = list(tensor[: sum(rows)].split(rows))
        return [(name, piece) for (name, _), piece in zip(self.hf, pieces, strict=True)]

    def shard(self, tensor: Tensor, dim: int, rank: int, size: int) -> Tensor:
        """The share of one of `size` tensor-parallel processes, cut along `dim`."""
        if size == 1:
            return tensor
        if self.kind == "glu" and dim == 0:
            return torch.cat([half.chunk(size)[rank] for half in tensor.chunk(2)])
        return tensor.chunk(size, dim)[rank]

    def unshard(self, shards: Sequence[Tensor], dim: int) -> Tensor:
        """The whole tensor from the shares of all processes, in rank order; the inverse of `shard`."""
        if len(shards) == 1:
            return shards[0]
        if self.kind == "glu" and dim == 0:
            halves = [shard.chunk(2) for shard in shards]
            return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
        return torch.cat(list(shards), dim)


def padded_vocab(config: DecoderConfig, multiple: int = 1) -> int:
    """Vocabulary rounded up to a multiple of `multiple`."""
    return -(-config.vocab_size // multiple) * multiple


def parts(config: DecoderConfig, vocab_rows: int) -> Iterator[Part]:
    """Every Megatron tensor of the model, in the order Hugging Face checkpoints list theirs.

    `vocab_rows` is the padded vocabulary. Raises ValueError for biases that megatron-core's GPT model cannot hold.
    """
    biases = bias_kind(config)
    hidden = config.hidden_size
    vocab: Shape = (config.vocab_size, hidden)

    def embedding(name: str, hf: str) -> Part:
        return Part(name=name, kind="vocab", hf=((hf, vocab),), shape=(vocab_rows, hidden))

    yield embedding("embedding.word_embeddings.weight", "model.embed_tokens.weight")
    for layer in range(config.num_hidden_layers):
        prefix, hf = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        yield _copy(prefix + "input_layernorm.weight", hf + "input_layernorm.weight", (hidden,))
        yield from _attention(config, prefix + "self_attention.", hf + "self_attn.", biases)
        yield _copy(prefix + "pre_mlp_layernorm.weight", hf + "post_attention_layernorm.weight", (hidden,))
        if config.is_moe_layer(layer):
            yield _copy(prefix + "mlp.router.weight", hf + "mlp.gate.weight", (config.num_experts, hidden))
            if config.sigmoid_rule is not None:
                yield _copy(f"{prefix}mlp.{EXPERT_BIAS}", f"{hf}mlp.{CORRECTION}", (config.num_experts,))
            for expert in range(config.num_experts):
                names = f"{prefix}mlp.experts.local_experts.{expert}.", f"{hf}mlp.experts.{expert}."
                yield from _mlp(*names, hidden, config.moe_intermediate_size, False)
            if config.shared_intermediate_size:
                names = f"{prefix}mlp.shared_experts.", f"{hf}mlp.shared_experts."
                yield from _mlp(*names, hidden, config.shared_intermediate_size, False)
        else:
            yield from _mlp(prefix + "mlp.", hf + "mlp.", hidden, config.intermediate_size, biases == "all")
    yield _copy("decoder.final_layernorm.weight", "model.norm.weight", (hidden,))
    if not config.tie_word_embeddings:
        yield embedding("output_layer.weight", "lm_head.weight")


def bias_kind(config: DecoderConfig) -> Literal["none", "qkv", "all"]:
    """Which linear layers have biases, in the three ways megatron-core knows. Raises ValueError for any other."""
    if config.output_bias != config.mlp_bias:
        raise ValueError(
            f"attention_bias={config.attention_bias} with mlp_bias={config.mlp_bias} in a {config.family} model: megatron-core "
            'has biases on q, k, v alone or on every layer; train this model with trainer.backend = "fsdp"'
        )
    return "all" if config.mlp_bias else "qkv" if config.attention_bias else "none"


def _copy(name: str, hf: str, shape: Shape) -> Part:
    return Part(name=name, kind="copy", hf=((hf, shape),), shape=shape)


def _attention(config: DecoderConfig, name: str, hf: str, biases: str) -> Iterator[Part]:
    dim, groups, hidden = config.head_dim, config.num_key_value_heads, config.hidden_size
    rows = (config.num_attention_heads * dim, groups * dim, groups * dim)
    for leaf, rest in (("weight", (hidden,)), ("bias", ())):
        if leaf == "weight" or biases != "none":
            sources = tuple((f"{hf}{proj}_proj.{leaf}", (n, *rest)) for proj, n in zip("qkv", rows, strict=True))
            yield Part(name=f"{name}linear_qkv.{leaf}", kind="qkv", hf=sources, shape=(sum(rows), *rest), groups=groups)
    if config.qk_norm:
        yield _copy(name + "q_layernorm.weight", hf + "q_norm.weight", (dim,))
        yield _copy(name + "k_layernorm.weight", hf + "k_norm.weight", (dim,))
    yield _copy(name + "linear_proj.weight", hf + "o_proj.weight", (hidden, rows[0]))
    if biases == "all":
        yield _copy(name + "linear_proj.bias", hf + "o_proj.bias", (hidden,))


def _mlp(name: str, hf: str, hidden: int, inner: int, bias: bool) -> Iterator[Part]:
    leaves = ("weight", "bias") if bias else ("weight",)
    for leaf in leaves:
        shape: Shape = (inner, hidden) if leaf == "weight" else (inner,)
        halves = tuple((f"{hf}{half}_proj.{leaf}", shape) for half in ("gate", "up"))
        yield Part(name=f"{name}linear_fc1.{leaf}", kind="glu", hf=halves, shape=(2 * inner, *shape[1:]))
    for leaf in leaves:
        yield _copy(f"{name}linear_fc2.{leaf}", f"{hf}down_proj.{leaf}", (hidden, inner) if leaf == "weight" else (hidden,))


def join_all(config: DecoderConfig, vocab_rows: int, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[Part, Tensor]]:
    """(part, whole Megatron tensor) as soon as all Hugging Face tensors of a part have come by, in their order.

    Raises ValueError at the end, naming every missing, unexpected, repeated and misshaped tensor. A tied head that is stored
    twice is accepted when both copies are equal.
    """
    known = {hf: (part, shape) for part in parts(config, vocab_rows) for hf, shape in part.hf}
    held: dict[str, Tensor] = {}
    seen: set[str] = set()
    wrong: list[str] = []
    embedding: Tensor | None = None
    for name, tensor in tensors:
        if name.endswith("rotary_emb.inv_freq"):  # a constant that older checkpoints store
            continue
        if name in seen:
            wrong.append(f"repeated {name}")
            continue
        seen.add(name)
        if name == "lm_head.weight" and config.tie_word_embeddings:
            held[name] = tensor
        elif name not in known:
            wrong.append(f"unexpected {name}")
        elif tuple(tensor.shape) != known[name][1]:
            wrong.append(f"misshaped {name}: {list(tensor.shape)} instead of {list(known[name][1])}")
        else:
            part, held[name] = known[name][0], tensor
            embedding = tensor if part.name.startswith("embedding") else embedding
            if all(hf in held for hf, _ in part.hf):
                yield part, part.join([held.pop(hf) for hf, _ in part.hf])
    tied = held.get("lm_head.weight")
    if config.tie_word_embeddings and tied is not None and (embedding is None or not torch.equal(tied, embedding)):
        wrong.append("unexpected lm_head.weight: it differs from the embedding although tie_word_embeddings is set")
    missing = [f"missing {name}" for name in known if name not in seen]
    if missing or wrong:
        raise ValueError(f"weights do not fit the {config.family} decoder: " + "; ".join(missing + wrong))


def split_all(config: DecoderConfig, vocab_rows: int, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """(HF name, tensor) of every Megatron tensor in `tensors` (whole, by name), in Hugging Face's order.

    Raises ValueError naming every missing, unexpected and misshaped tensor before the first is given.
    """
    known = {part.name: part for part in parts(config, vocab_rows)}
    wrong = [f"missing {name}" for name in known if name not in tensors]
    wrong += [f"unexpected {name}" for name in tensors if name not in known]
    wrong += [
        f"misshaped {name}: {list(tensors[name].shape)} instead of {list(part.shape)}"
        for name, part in known.items()
        if name in tensors and tuple(tensors[name].shape) != part.shape
    ]
    if wrong:
        raise ValueError(f"megatron weights do not fit the {config.family} decoder: " + "; ".join(wrong))
    for name, part in known.items():
        yield from part.split(tensors[name])
