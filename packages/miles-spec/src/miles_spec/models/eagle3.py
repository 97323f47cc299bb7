"""EAGLE-3 (2503.01840): one layer over three of the policy's, with a head over the tokens that matter."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from miles_kernels.contract import Contract
from miles_kernels.nn.decoder import Decoder
from miles_kernels.ops.linear import linear
from miles_kernels.ops.norm import add_rms_norm
from miles_spec.models.base import DraftModel, DraftState, copy_block, draw, last_layer, parameter
from miles_spec.models.config import Eagle3Config
from miles_spec.models.names import eagle3_names, load_state


class Eagle3Draft(DraftModel):
    """Attention reads [norm_e(embedding) ; norm_h(h)], the residual stream is h; h = fc(features), then the stream before `norm`.

    The embedding is the policy's. `draft_ids` says which of its tokens the head has rows for.
    """

    config: Eagle3Config

    def __init__(
        self,
        config: Eagle3Config,
        contract: Contract | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(config, contract, dtype)
        block, hidden = self.block(0), config.block.hidden_size
        block.qkv_proj = parameter(block.qkv_proj.shape[0], 2 * hidden)
        self.fc = parameter(hidden, config.num_features)
        self.hidden_norm = parameter(hidden)
        self.final_norm = parameter(hidden)
        self.lm_head = parameter(config.draft_vocab_size, hidden)
        self.register_buffer("_ids", torch.arange(config.draft_vocab_size))
        self._place(device, dtype)

    @classmethod
    def random(
        cls, config: Eagle3Config, seed: int = 0, *, draft_ids: Sequence[int] | None = None, dtype: torch.dtype = torch.float32
    ) -> Eagle3Draft:
        """Weights drawn from `seed`; the vocabulary is `draft_ids`, by default the policy's first tokens."""
        model = cls(config, dtype=dtype)
        draw(model, config.block, seed)
        if draft_ids is not None:
            model.use_vocabulary(torch.as_tensor(draft_ids))
        return model

    @classmethod
    def from_trunk(
        cls, policy: Decoder, config: Eagle3Config | None = None, *, draft_ids: Sequence[int] | None = None, seed: int = 0
    ) -> Eagle3Draft:
        """A start for training: MLP, norms and head rows of the policy, fc the mean of the three layers, attention from `seed`.

        Raises ValueError when the policy's last layer has another shape than the draft's.
        """
        weight = policy.embed_tokens
        config = config or Eagle3Config.of(policy.config)
        model = cls(config, policy.contract, dtype=weight.dtype, device=weight.device)
        draw(model, config.block, seed)
        if draft_ids is not None:
            model.use_vocabulary(torch.as_tensor(draft_ids))
        hidden = config.block.hidden_size
        with torch.no_grad():
            copy_block(model.block(0), last_layer(policy), skip=("qkv_proj",))
            eye = torch.eye(hidden, dtype=weight.dtype, device=weight.device)
            model.fc.copy_(torch.cat((eye, eye, eye), 1) / 3)
            model.block(0).qkv_proj[:, hidden:] = last_layer(policy).qkv_proj
            model.final_norm.copy_(policy.norm)
            model.lm_head.copy_(policy.head.index_select(0, model.draft_ids))
        return model

    def use_vocabulary(self, draft_ids: Tensor) -> None:
        """Set the policy's ids [Vd] of the head's rows, ascending. Raises ValueError for others."""
        ids = draft_ids.to(self._ids.device, torch.int64)
        vocab = self.config.block.vocab_size
        fits = ids.shape == self._ids.shape and bool((ids.diff() > 0).all()) and 0 <= int(ids[0]) and int(ids[-1]) < vocab
        if not fits:
            raise ValueError(f"draft_ids must be {len(self._ids)} ascending ids of 0..{vocab - 1}; got {list(ids.shape)}")
        self._ids.copy_(ids)

    @property
    def draft_ids(self) -> Tensor:
        """int64 [Vd], ascending."""
        return self._ids

    def project(self, features: Tensor) -> Tensor:
        """fc: three states to one."""
        return linear(features, self.fc, mode=self.mode)

    def head(self, policy_head: Tensor) -> Tensor:
        """Its own, [Vd, H]."""
        return self.lm_head

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """(name in a checkpoint, tensor as stored there)."""
        for name, entry in eagle3_names(self).items():
            if not entry.shared:
                yield name, entry.stored()

    def load_named(self, tensors: Iterable[tuple[str, Tensor]], *, shared: dict[str, Tensor] | None = None) -> None:
        """Take tensors under their checkpoint names, all or none; see `DraftModel`."""
        load_state(eagle3_names(self), tensors, "EAGLE-3 draft", shared or {})

    def _norms(self, index: int) -> tuple[Tensor, Tensor]:
        return self.block(0).input_norm, self.hidden_norm

    def _enter(self, index: int, joined: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        return joined, state

    def _leave(self, index: int, delta: Tensor, residual: Tensor) -> DraftState:
        return DraftState(*add_rms_norm(delta, residual, self.final_norm, self.config.block.rms_norm_eps))
