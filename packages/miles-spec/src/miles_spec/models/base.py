"""The draft model: one interface for training (`unroll`) and serving (`step`), over the aligned blocks of miles_kernels.

Legend: R = slots of a packed stream, T = tokens of a pass, F = numbers read of the policy per token, H = hidden size, V = its
vocabulary, Vd = the draft's, K = depths.

Depth k (from 1) at index i joins the embedding of token i + k with a state: of the policy at token i (depth 1), or what depth
k - 1 carried on at index i. What comes out predicts token i + k + 1. Rotary positions are those of the key in the draft's cache:
i + k - 1 where one layer is recycled, i where layers are distinct.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from miles_kernels.contract import Contract
from miles_kernels.nn.config import DecoderConfig
from miles_kernels.nn.decoder import Decoder, DecoderLayer, KVStore, rope_table
from miles_kernels.ops.embedding import embedding
from miles_kernels.ops.linear import linear
from miles_kernels.ops.matmul import Mode
from miles_kernels.ops.norm import add_rms_norm, rms_norm
from miles_kernels.ops.rope import INITIAL_POSITIONS, apply_rope
from miles_spec.models.config import DraftConfig
from miles_spec.models.unroll import Pair, UnrollPlan, unrolled_attention


class DraftState(NamedTuple):
    """What one depth makes of its tokens."""

    hidden: Tensor
    """[T, H]: what the head reads."""
    carried: Tensor
    """[T, H]: what the next depth reads in place of the policy's state."""


class DraftBlock(DecoderLayer):
    """A decoder layer whose attention may also be the unrolled one of training."""

    def heads(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [T, Hq, D], keys and values [T, Hkv, D] of attention's input, normed and rotated; differentiable."""
        config = self.config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        qkv = self._project(x).view(-1, heads + 2 * kv_heads, config.head_dim)
        qk, v = qkv.split((heads + kv_heads, kv_heads), dim=1)
        kinds = self.head_norm()
        if kinds is not None:
            parts = zip(qk.split((heads, kv_heads), dim=1), kinds, strict=True)
            qk = torch.cat([rms_norm(part.contiguous(), weight, config.rms_norm_eps) for part, weight in parts], 1)
        q, k = apply_rope(qk.contiguous(), cos, sin).split((heads, kv_heads), dim=1)
        return q, k, v

    def project(self, attended: Tensor) -> Tensor:
        """Attention's output projection [T, H] of [T, Hq, D]."""
        return self._linear(attended.reshape(attended.shape[0], -1), "o_proj", self.o_bias)

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor, kv: KVStore) -> Tensor:
        """Attention over a cache, projected [T, H]."""
        return self._attend(x, cos, sin, kv)

    def keep(self, x: Tensor, cos: Tensor, sin: Tensor, kv: KVStore) -> None:
        """Write the keys and values that `attend` would, and compute nothing else."""
        config, target = self.config, kv.target(self.index)
        if not x.is_cuda or target is None:
            _, k, v = self.heads(x, cos, sin)
            kv.update(self.index, k, v)
            return
        from miles_kernels.cuda.launch import at_home
        from miles_kernels.cuda.qkv import Heads, turn

        sizes = Heads(config.num_attention_heads, config.num_key_value_heads, self.scale, self.window, config.rms_norm_eps)
        at_home(turn)(self._project(x), self.head_norm(), cos, sin, sizes, target)

    def feed_forward(self, x: Tensor) -> Tensor:
        """MLP or mixture of experts [T, H]."""
        return self._feed_forward(x, None)


class DraftModel(nn.Module, ABC):
    """Base of `MtpDraft` and `Eagle3Draft`. Parameters are left uninitialised: load or draw them.

    Example:
        plan = UnrollPlan.of(lengths)
        states = draft.unroll(features, targets.input_ids, plan, 3, embed=policy.embed_tokens)   # training
        loss = draft_loss(states, draft.head(policy.head), targets, teacher_hidden=policy_hidden)
    """

    config: DraftConfig

    def __init__(self, config: DraftConfig, contract: Contract | None, dtype: torch.dtype) -> None:
        super().__init__()
        name = str(dtype).removeprefix("torch.")
        self.config = config
        self.contract = (Contract.reference(dtype=name) if contract is None else contract).with_rules(config.block.rules)
        if self.contract.dtype != name:
            raise ValueError(f"draft dtype {name}, but its contract says {self.contract.dtype}")
        self.blocks = nn.ModuleList(
            DraftBlock(config.block, index, self.mode, "full") for index in range(config.block.num_hidden_layers)
        )

    def _place(self, device: str | torch.device, dtype: torch.dtype) -> None:
        """At the end of a subclass's constructor."""
        self.to(device=device, dtype=dtype)
        block = self.config.block
        longest = block.max_position_embeddings if torch.device(device).type != "cpu" else INITIAL_POSITIONS
        self._rope = rope_table(block, device, longest + 64)

    @property
    def mode(self) -> Mode:
        """How matrix products are made."""
        return self.contract.matmul

    @property
    def draft_ids(self) -> Tensor | None:
        """int64 [Vd], ascending: the policy's ids of the draft's vocabulary; None: it is the policy's."""
        return None

    # ------------------------------------------------------------------ what families differ in

    @abstractmethod
    def project(self, features: Tensor) -> Tensor:
        """The first depth's states [T, H] of the policy's features [T, F]."""

    @abstractmethod
    def _norms(self, index: int) -> tuple[Tensor, Tensor]:
        """Weights [H] of the norms of embeddings and of states, as a block joins them."""

    @abstractmethod
    def _enter(self, index: int, joined: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """(attention's input, residual stream) of a block, from [normed embedding ; normed state] [T, 2 H] and states [T, H]."""

    @abstractmethod
    def _leave(self, index: int, delta: Tensor, residual: Tensor) -> DraftState:
        """From the MLP's output and the residual stream, both [T, H]."""

    @abstractmethod
    def head(self, policy_head: Tensor) -> Tensor:
        """The weight that makes logits of `DraftState.hidden`: [V, H], or [Vd, H] of its own."""

    @abstractmethod
    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """(name in a checkpoint, tensor as stored there): copies where the order differs, else views."""

    @abstractmethod
    def load_named(self, tensors: Iterable[tuple[str, Tensor]], *, shared: dict[str, Tensor] | None = None) -> None:
        """Take tensors under their checkpoint names, all or none of them.

        Copies of the policy's embedding or head that a checkpoint holds must equal `shared` ("embed_tokens", "lm_head").
        Raises ValueError naming every missing, unexpected, repeated, misshaped or differing tensor.
        """

    # ------------------------------------------------------------------ the two uses

    def unroll(
        self,
        features: Tensor,
        token_ids: Tensor,
        plan: UnrollPlan,
        depth: int,
        *,
        embed: Tensor,
        train_shared: bool = False,
    ) -> list[Tensor]:
        """States [R, H] that the head reads, of depths 1 .. `depth`, as recycling computes them, differentiable.

        `features` [R, F] are the policy's, `token_ids` [K, R] int64 the tokens i + 1, i + 2 ... (`DraftTargets.input_ids`),
        `embed` [V, H] the policy's embedding. Gradients reach the draft's parameters, and features and embedding only with
        `train_shared`. Raises ValueError for a depth beyond what was given or the draft can, and shapes that do not fit.
        """
        self._check_unroll(features, token_ids, plan, depth)
        if not train_shared:
            features, embed = features.detach(), embed.detach()
        state, recycled = self.project(features), self.config.recycled
        trunk: Pair | None = None
        branches: list[Pair] = []
        outs = []
        for k in range(depth):
            index = 0 if recycled else k
            block = self.block(index)
            cos, sin = self._rope.rows(plan.positions + k if recycled else plan.positions)
            x, residual = self._enter(index, self._join(index, token_ids[k], embed, state), state)
            q, *pair = block.heads(x, cos, sin)
            if trunk is None or not recycled:
                trunk = (pair[0], pair[1])
            else:
                branches.append((pair[0], pair[1]))
            attended = unrolled_attention(q, trunk, branches, plan, scale=block.scale, window=block.window)
            made = self._finish(index, block.project(attended), residual)
            outs.append(made.hidden)
            state = made.carried
        return outs

    def step(
        self,
        state: Tensor,
        token_ids: Tensor,
        positions: Tensor,
        kv: KVStore,
        *,
        embed: Tensor,
        depth: int = 1,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> DraftState:
        """One depth of serving over the draft's own cache: `state` [T, H] of `project` or carried; tokens, positions [T] int64.

        `kv` holds layers 0 .. num_hidden_layers - 1 and has its plan; a token's position is that of its key there.
        Runs without gradient. `rope` is `rope_rows(positions)`, where the caller has it. A token below 0 is taken for 0.
        """
        index = 0 if self.config.recycled else depth - 1
        block = self.block(index)
        cos, sin = self._rope.rows(positions) if rope is None else rope
        x, residual = self._enter(index, self._join(index, token_ids, embed, state), state)
        return self._finish(index, block.attend(x, cos, sin, kv), residual)

    def enter(self, state: Tensor, token_ids: Tensor, positions: Tensor, kv: KVStore, *, embed: Tensor) -> None:
        """What `step` of depth 1 writes to the cache of a recycled draft, and nothing else; `kv` needs no plan."""
        block = self.block(0)
        cos, sin = self._rope.rows(positions)
        x, _ = self._enter(0, self._join(0, token_ids, embed, state), state)
        block.keep(x, cos, sin, kv)

    def rope_rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """What rotates keys at `positions` int64 [T]."""
        return self._rope.rows(positions)

    def logits(self, hidden: Tensor, policy_head: Tensor) -> Tensor:
        """Scores fp32 [T, V], or [T, Vd] over the draft's own vocabulary."""
        return linear(hidden, self.head(policy_head), mode=self.mode, out_dtype=torch.float32)

    def policy_logits(self, hidden: Tensor, policy_head: Tensor) -> Tensor:
        """`logits` over the policy's vocabulary [T, V]; -inf where the draft has no token."""
        return self.widen(self.logits(hidden, policy_head), len(policy_head))

    def widen(self, logits: Tensor, vocab: int) -> Tensor:
        """Scores [T, Vd] over the draft's vocabulary as [T, vocab] over the policy's; -inf where the draft has no token."""
        ids = self.draft_ids
        return logits if ids is None else logits.new_full((len(logits), vocab), -torch.inf).index_copy_(1, ids, logits)

    def _join(self, index: int, token_ids: Tensor, embed: Tensor, state: Tensor) -> Tensor:
        """[T, 2 H]: normed embeddings, then normed states."""
        (first, second), eps = self._norms(index), self.config.block.rms_norm_eps
        if state.is_cuda and not torch.is_grad_enabled():
            from miles_kernels.cuda.draft import join

            return join(token_ids, embed, state, first, second, eps)
        embedded = embedding(token_ids.clamp(min=0), embed)
        return torch.cat((rms_norm(embedded, first, eps), rms_norm(state, second, eps)), 1)

    def _finish(self, index: int, attended: Tensor, residual: Tensor) -> DraftState:
        block = self.block(index)
        h, residual = add_rms_norm(attended, residual, block.post_norm, self.config.block.rms_norm_eps)
        return self._leave(index, block.feed_forward(h), residual)

    def block(self, index: int) -> DraftBlock:
        """One of the layers."""
        block = self.blocks[index]
        assert isinstance(block, DraftBlock)
        return block

    def _check_unroll(self, features: Tensor, token_ids: Tensor, plan: UnrollPlan, depth: int) -> None:
        slots, most = plan.positions.numel(), self.config.max_depth
        if depth < 1 or (most is not None and depth > most):
            raise ValueError(f"depth {depth} must lie in 1..{most or 'any'}: a draft of distinct layers has one depth a layer")
        if features.shape != (slots, self.config.num_features):
            raise ValueError(f"features is {list(features.shape)}, this draft reads [{slots}, {self.config.num_features}]")
        if token_ids.ndim != 2 or token_ids.shape[0] < depth or token_ids.shape[1] != slots:
            raise ValueError(f"token_ids is {list(token_ids.shape)}, depth {depth} needs [{depth} or more, {slots}]")


def parameter(*shape: int) -> nn.Parameter:
    """An uninitialised parameter."""
    return nn.Parameter(torch.empty(shape))


def draw(model: nn.Module, config: DecoderConfig, seed: int) -> None:
    """Fill parameters from `seed`: normal(0, initializer_range) matrices, unit norms, zero biases."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                weight.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                weight.copy_(torch.empty(weight.shape).normal_(0.0, config.initializer_range, generator=generator))


def copy_block(block: DraftBlock, source: DecoderLayer, skip: Sequence[str] = ()) -> None:
    """Copy the weights of a policy's layer of the same shape. Raises ValueError for one that differs."""
    theirs: dict[str, Any] = dict(source.named_parameters())
    with torch.no_grad():
        for name, weight in block.named_parameters():
            if name in skip:
                continue
            if name not in theirs or theirs[name].shape != weight.shape:
                found = list(theirs[name].shape) if name in theirs else "nothing"
                raise ValueError(f"the policy's last layer has {found} for {name}, the draft needs {list(weight.shape)}")
            weight.copy_(theirs[name])
        if block.router_bias is not None and source.router_bias is not None:
            block.router_bias.copy_(source.router_bias)


def last_layer(policy: Decoder) -> DecoderLayer:
    """The policy's last layer."""
    layer = policy.layers[len(policy.layers) - 1]
    assert isinstance(layer, DecoderLayer)
    return layer
