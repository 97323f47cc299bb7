"""Multi-token prediction layers: the draft that DeepSeek-V3, GLM, MiMo and Qwen3-Next models carry."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from miles_kernels.contract import Contract
from miles_kernels.nn.decoder import Decoder
from miles_kernels.ops.linear import linear
from miles_kernels.ops.norm import add_rms_norm, rms_norm
from miles_spec.models.base import DraftModel, DraftState, copy_block, draw, last_layer, parameter
from miles_spec.models.config import MtpConfig
from miles_spec.models.names import load_state, mtp_names


class MtpDraft(DraftModel):
    """h' = norm_f(block(W [norm_e(embedding) ; norm_h(h)])); embedding and head are the policy's live tensors.

    h is the policy's state after its final norm, then norm_f's own output of the depth before.
    """

    config: MtpConfig

    def __init__(
        self,
        config: MtpConfig,
        contract: Contract | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        super().__init__(config, contract, dtype)
        hidden, layers = config.block.hidden_size, range(config.block.num_hidden_layers)
        self.embed_norm = nn.ParameterList(parameter(hidden) for _ in layers)
        self.hidden_norm = nn.ParameterList(parameter(hidden) for _ in layers)
        self.join_proj = nn.ParameterList(parameter(hidden, 2 * hidden) for _ in layers)
        """[H, 2 H] each: the first half of the columns reads the embedding, whatever a checkpoint's order."""
        self.final_norm = nn.ParameterList(parameter(hidden) for _ in layers)
        self._place(device, dtype)

    @classmethod
    def random(cls, config: MtpConfig, seed: int = 0, *, dtype: torch.dtype = torch.float32) -> MtpDraft:
        """Weights drawn from `seed`."""
        model = cls(config, dtype=dtype)
        draw(model, config.block, seed)
        return model

    @classmethod
    def from_trunk(cls, policy: Decoder, config: MtpConfig | None = None) -> MtpDraft:
        """A start for training: the block is the policy's last layer, the join passes the hidden state through.

        Raises ValueError when the policy's last layer has another shape than the draft's.
        """
        weight = policy.embed_tokens
        config = config or MtpConfig.of(policy.config)
        model = cls(config, policy.contract, dtype=weight.dtype, device=weight.device)
        hidden = config.block.hidden_size
        with torch.no_grad():
            for index in range(config.block.num_hidden_layers):
                copy_block(model.block(index), last_layer(policy))
                for norm in (model.embed_norm[index], model.hidden_norm[index]):
                    norm.fill_(1.0)
                model.join_proj[index].zero_()
                model.join_proj[index][:, hidden:] = torch.eye(hidden, dtype=weight.dtype, device=weight.device)
                model.final_norm[index].copy_(policy.norm)
        return model

    def project(self, features: Tensor) -> Tensor:
        """The features themselves."""
        return features

    def head(self, policy_head: Tensor) -> Tensor:
        """The policy's."""
        return policy_head

    def named_state(self) -> Iterator[tuple[str, Tensor]]:
        """(name in a checkpoint, tensor as stored there)."""
        for name, entry in mtp_names(self).items():
            if not entry.shared:
                yield name, entry.stored()

    def load_named(self, tensors: Iterable[tuple[str, Tensor]], *, shared: dict[str, Tensor] | None = None) -> None:
        """Take tensors under their checkpoint names, all or none; see `DraftModel`."""
        load_state(mtp_names(self), tensors, f"{self.config.layout} MTP draft", shared or {})

    def _norms(self, index: int) -> tuple[Tensor, Tensor]:
        return self.embed_norm[index], self.hidden_norm[index]

    def _enter(self, index: int, joined: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        x = linear(joined, self.join_proj[index], mode=self.mode)
        return rms_norm(x, self.block(index).input_norm, self.config.block.rms_norm_eps), x

    def _leave(self, index: int, delta: Tensor, residual: Tensor) -> DraftState:
        hidden = add_rms_norm(delta, residual, self.final_norm[index], self.config.block.rms_norm_eps)[0]
        return DraftState(hidden, hidden)
