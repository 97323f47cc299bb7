"""Verification by rejection in the engine: the distribution of plain sampling, a little more accepted, other tokens.

Legend: S = sequences that sample, D = draft tokens, B = those of the S that have drafts, N = most nodes of one, V = vocabulary.

It replaces what was drawn at the positions of rows with drafts so that following the draws through the tree, as for keyed
verification, accepts exactly what the rule accepts: the accepted child at each node, and at the end the token of the residual.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from miles_kernels.ops.sample import SampleOutput
from miles_rollout.engines.embedded.drafts import Drafts
from miles_rollout.engines.embedded.sampling import upload
from miles_rollout.engines.embedded.tables import Tables
from miles_spec.drafted import Drafted
from miles_spec.verifiers import Verifier as Rule

_ARGUMENTS = ("seed", "sample_id", "temperature", "top_k", "top_p", "min_p")


class Verifier:
    """Applies a rule of `miles_spec.verifiers` to the drafts of a step. Drafts of one step must be of one shape."""

    def __init__(self, rule: Rule, tables: Tables) -> None:
        self._rule, self._tables = rule, tables

    def __call__(self, drawn: SampleOutput, logits: Tensor, rows: np.ndarray, drafts: Drafts) -> SampleOutput:
        """What was drawn of logits [S + D, V] for rows [S], with the rule's tokens where a row has drafts."""
        tables, device = self._tables, logits.device
        of = np.flatnonzero(drafts.counts)
        counts = drafts.counts[of]
        most = int(counts.max())
        has = np.arange(most) < counts[:, None]
        tokens: np.ndarray = np.full(has.shape, -1, np.int64)
        tokens[has] = drafts.tokens
        lengths: np.ndarray = np.ones(len(rows), np.int64)
        lengths[: len(drafts.counts)] += drafts.counts
        starts = (np.cumsum(lengths) - lengths)[of]
        index = starts[:, None] + np.minimum(np.arange(most + 1), counts[:, None])
        at = upload(index, device)
        probs = None
        if drafts.probs is not None:
            probs = drafts.probs.new_zeros((*has.shape, drafts.probs.shape[1]))
            probs[torch.from_numpy(has).to(device)] = drafts.probs
        own = rows[of]
        arguments = {name: upload(getattr(tables, name)[own], device) for name in _ARGUMENTS}
        drafted = Drafted(parents=self._parents(drafts, has), tokens=upload(tokens, device), probs=probs)
        out = self._rule(drafted, logits[at], position=upload(tables.position[own], device), **arguments)
        judged = torch.cat((out.node.new_zeros((len(own), 1)), out.node + 1), 1)
        kept = torch.arange(judged.shape[1], device=device) <= out.num_accepted[:, None]
        place = at.gather(1, judged.clamp(min=0))[kept]
        token, logprob, sampled = drawn.token.clone(), drawn.logprob.clone(), drawn.sampled_logprob.clone()
        token[place], logprob[place], sampled[place] = out.token[kept], out.logprob[kept], out.sampled_logprob[kept]
        return SampleOutput(token, logprob, sampled)

    @staticmethod
    def _parents(drafts: Drafts, has: np.ndarray) -> tuple[int, ...]:
        """The common shape, that of the row with most nodes."""
        if drafts.parents is None:
            return tuple(range(-1, has.shape[1] - 1))
        spread = np.full(has.shape, -2, np.int64)
        spread[has] = drafts.parents
        shape = spread[has.all(1)][0]
        if ((spread != shape) & has).any():
            raise ValueError("rejection verification needs trees of one shape; this draft makes another for every sequence")
        return tuple(shape.tolist())
