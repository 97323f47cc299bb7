"""Drafts as trees of one shape for a whole batch, and what a verifier makes of them.

Legend: B = sequences, N = nodes of the shape, D = nodes on its longest path, V = vocabulary. A chain of K tokens is the tree
whose node n continues node n - 1: N = D = K.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from miles_spec.verify import Verification


@dataclass(frozen=True, eq=False, kw_only=True)
class Drafted:
    """B drafts of one shape; a draft that is smaller than the shape lacks nodes.

    Example: Drafted(parents=(-1, -1, 0), tokens=tensor([[5, 9, 7]])) says that 5 or 9 may come next, and 7 after 5.
    """

    parents: tuple[int, ...]
    """[N]: the earlier node each one continues, -1 for the context. Among siblings the earlier node is tried first."""
    tokens: Tensor
    """[B, N] int64; -1 where a draft lacks the node, and then lacks everything below it."""
    probs: Tensor | None = None
    """[B, N, V]: the distribution every node was really drawn from, given its parent and its earlier siblings. None: nodes were
    picked, not drawn (the likeliest, an n-gram). Only rejection verification reads it."""

    def __post_init__(self) -> None:
        if self.tokens.ndim != 2 or self.tokens.shape[1] != len(self.parents):
            raise ValueError(f"tokens is {list(self.tokens.shape)}; parents name {len(self.parents)} nodes, so it must be [B, N]")
        for node, parent in enumerate(self.parents):
            if not -1 <= parent < node:
                raise ValueError(f"parents[{node}] = {parent}: a node continues an earlier one, or -1 for the context")
        if self.probs is not None and (self.probs.ndim != 3 or self.probs.shape[:2] != self.tokens.shape):
            raise ValueError(f"probs is {list(self.probs.shape)}, tokens {list(self.tokens.shape)}: probs must be [B, N, V]")
        below = [node for node, parent in enumerate(self.parents) if parent >= 0]
        above = [self.parents[node] for node in below]
        orphans = (self.tokens[:, below] >= 0) & (self.tokens[:, above] < 0)
        if bool(orphans.any()):
            row, place = orphans.nonzero()[0].tolist()
            raise ValueError(f"draft {row} has node {below[place]} but lacks node {above[place]}, which it continues")

    @classmethod
    def chain(cls, tokens: Tensor, probs: Tensor | None = None) -> Drafted:
        """Chains of tokens [B, K]; -1 after the end of shorter ones."""
        return cls(parents=tuple(range(-1, tokens.shape[-1] - 1)), tokens=tokens, probs=probs)

    @property
    def depths(self) -> list[int]:
        """[N + 1] of the rows of target logits: 0 for the context, 1 + that of the parent for a node's own row."""
        depths = [0]
        for parent in self.parents:
            depths.append(depths[parent + 1] + 1)
        return depths

    @property
    def children(self) -> Tensor:
        """[N + 1, most siblings] int64: the nodes that continue each row, in order, -1 for none."""
        found: list[list[int]] = [[] for _ in range(len(self.parents) + 1)]
        for node, parent in enumerate(self.parents):
            found[parent + 1].append(node)
        most = max(len(nodes) for nodes in found)
        padded = [nodes + [-1] * (most - len(nodes)) for nodes in found]
        return torch.tensor(padded, dtype=torch.int64, device=self.tokens.device).view(len(found), most)

    def check_target(self, target_logits: Tensor) -> None:
        """Raise ValueError unless the target's logits are [B, N + 1, V] and hold every drafted token."""
        batch, nodes = self.tokens.shape
        if target_logits.ndim != 3 or target_logits.shape[:2] != (batch, nodes + 1):
            raise ValueError(
                f"target_logits is {list(target_logits.shape)}, {batch} drafts of {nodes} nodes need [{batch}, {nodes + 1}, V]: "
                "row 0 after the context, row n + 1 after node n"
            )
        vocab = target_logits.shape[2]
        if bool(((self.tokens < -1) | (self.tokens >= vocab)).any()):
            raise ValueError(f"tokens lie in {int(self.tokens.min())}..{int(self.tokens.max())}, the vocabulary is {vocab}")
        if self.probs is not None and self.probs.shape[2] != vocab:
            raise ValueError(f"probs has {self.probs.shape[2]} tokens, target_logits {vocab}")


class Verified(NamedTuple):
    """What one verify step adds to each sequence: the accepted path of its tree, then one token of the target's own."""

    token: Tensor
    """[B, D + 1] int64: num_accepted + 1 tokens, then -1. The last one is -1 too where its logits were not numbers."""
    logprob: Tensor
    """[B, D + 1] fp32, of the target under softmax(logits / temperature), unfiltered; 0 after the end."""
    sampled_logprob: Tensor
    """[B, D + 1] fp32, of the target under its filtered distribution; 0 after the end."""
    num_accepted: Tensor
    """[B] int64."""
    num_proposed: Tensor
    """[B] int64: nodes the draft has."""
    node: Tensor
    """[B, D] int64: the accepted nodes, whose keys and values the target keeps; -1 after the end."""

    def of(self, row: int) -> Verification:
        """One sequence as plain values. Of a tree `num_proposed` is the number of its nodes."""
        accepted = int(self.num_accepted[row])
        kept = slice(0, accepted + 1)
        return Verification(
            tuple(self.token[row, kept].tolist()),
            tuple(self.logprob[row, kept].tolist()),
            tuple(self.sampled_logprob[row, kept].tolist()),
            accepted,
            int(self.num_proposed[row]),
        )


def sibling_probs(parents: tuple[int, ...], tokens: Tensor, following: Tensor) -> Tensor:
    """`Drafted.probs` [B, N, V] of siblings drawn without replacement from `following` [B, N + 1, V], the draft's distribution
    after the context and after each node: the tokens of earlier siblings are excluded and the rest is renormalised.

    Raises ValueError when nothing was left to draw a node from.
    """
    rows = torch.arange(tokens.shape[0], device=tokens.device)
    left = following.clone()
    result = torch.zeros_like(following[:, 1:])
    for node, parent in enumerate(parents):
        present = tokens[:, node] >= 0
        total = left[:, parent + 1].sum(-1, keepdim=True)
        if bool((present & (total[:, 0] <= 0)).any()):
            raise ValueError(f"node {node}: its earlier siblings took all tokens the draft gives any probability")
        result[:, node] = torch.where(present[:, None], left[:, parent + 1] / total, 0.0)
        left[rows[present], parent + 1, tokens[present, node]] = 0.0
    return result
