"""The draw at the end of a pass: arguments of `sample` by row, ids out of reach, and uploads that wait for nothing.

Legend: S = rows that sample, V = vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from miles_kernels.ops.logprob import logprob_from_logits
from miles_kernels.ops.sample import SampleOutput, sample
from miles_rollout.engines.embedded.tables import Tables

_FILTERS = (("top_k", -1), ("top_p", 1.0), ("min_p", 0.0))


def upload(array: np.ndarray, device: torch.device) -> Tensor:
    """A copy of `array` on the device, without waiting for what the device is doing."""
    tensor = torch.from_numpy(array)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class Sampler:
    """Draws for rows of the tables. Arguments are gathered again only when the rows change."""

    def __init__(self, tables: Tables, device: torch.device) -> None:
        self._tables = tables
        self._device = device
        self._rows: np.ndarray | None = None
        self._arguments: dict[str, Any] = {}
        self._is_plain = True
        self._has_minimum = False
        self._asks_for_top = False

    def is_plain(self, rows: np.ndarray) -> bool:
        """Whether these rows sample without filters and without ids out of reach, and nobody asks for the likeliest tokens."""
        self._arguments_of(rows)
        if self._has_minimum:  # until the last of them has its min_new_tokens
            self._has_minimum = bool((self._tables.first_stop[rows] > self._tables.position[rows]).any())
        return self._is_plain and not self._has_minimum and not self._asks_for_top

    def draw(self, logits: Tensor, rows: np.ndarray, position: np.ndarray, of: np.ndarray | None = None) -> SampleOutput:
        """One token per row of logits [S, V], which will have `position` [S]; on the device, nothing is waited for when plain.

        With `of` int64 [S] several draws may be for one row: `rows[of]`.
        """
        keys = dict(self._arguments_of(rows))
        if of is not None:
            index = upload(of, self._device)
            keys = {name: value.index_select(0, index) if isinstance(value, Tensor) else value for name, value in keys.items()}
            rows = rows[of]
        if self._asks_for_top:
            self._note_top(logits, rows, position)
        keys["position"] = upload(position, self._device)
        tables = self._tables
        banned = np.flatnonzero(tables.first_stop[rows] > position).tolist() if self._has_minimum else []
        if banned:
            owners = tables.tail.owners
            stops = [(i, owner.job.eos) for i in banned if (owner := owners[rows[i]]) is not None]
            return _sample_without(logits, keys, stops)
        if self._is_plain and logits.is_cuda:
            from miles_kernels.cuda.sample import draw

            names = ("seed", "sample_id", "position", "temperature")
            drawn = draw(logits, **{name: keys[name] for name in names})
            return SampleOutput(drawn.token, drawn.logprob, drawn.logprob)
        return sample(logits, **keys)

    def _arguments_of(self, rows: np.ndarray) -> dict[str, Any]:
        """Arguments of `sample`. What all rows leave at its default is passed as a number, which lets the sampler skip work."""
        if rows is not self._rows:
            tables, device = self._tables, self._device
            self._rows = rows
            self._arguments = {name: upload(getattr(tables, name)[rows], device) for name in ("seed", "sample_id")}
            self._is_plain = True
            for name, default in (*_FILTERS, ("temperature", 1.0)):
                values = getattr(tables, name)[rows]
                uniform = bool((values == default).all())
                self._arguments[name] = default if uniform else upload(values, device)
                self._is_plain &= uniform or name == "temperature"
            self._has_minimum = bool((tables.first_stop[rows] > tables.position[rows]).any())
            self._asks_for_top = bool(tables.num_top[rows].any())
        return self._arguments

    def _note_top(self, logits: Tensor, rows: np.ndarray, position: np.ndarray) -> None:
        """Give sequences that ask the likeliest tokens for `position` [S]. Waits for the device."""
        wanted = self._tables.num_top[rows]
        asked = np.flatnonzero(wanted).tolist()
        most = min(int(wanted.max()), logits.shape[1])
        scores = logits[torch.tensor(asked, device=logits.device)]
        ids = scores.topk(most, dim=1).indices
        heat = torch.from_numpy(self._tables.temperature[rows[asked]]).to(logits.device, torch.float32)
        heat = torch.where(heat == 0, 1.0, heat)
        found = [logprob_from_logits(scores, ids[:, j], heat).logprob for j in range(most)]
        named, values = ids.tolist(), torch.stack(found, 1).tolist()
        for i, tokens, logprobs in zip(asked, named, values, strict=True):
            owner = self._tables.tail.owners[rows[i]]
            assert owner is not None
            pairs = tuple(zip(tokens, logprobs, strict=True))[: owner.job.request.num_top_logprobs]
            owner.top_logprobs[int(position[i]) - owner.job.num_prompt] = pairs


def _sample_without(logits: Tensor, keys: dict[str, Any], banned: list[tuple[int, frozenset[int]]]) -> SampleOutput:
    """`sample`, with the `banned` ids of a row out of reach (min_new_tokens); `logprob` stays that of the full distribution."""
    banned = [(row, ids) for row, ids in banned if ids]
    if not banned:
        return sample(logits, **keys)
    rows = torch.tensor([row for row, _ in banned], device=logits.device)
    masked = logits.clone()
    for row, ids in banned:
        masked[row, list(ids)] = float("-inf")
    out = sample(masked, **keys)
    temperature = torch.as_tensor(keys["temperature"], dtype=torch.float32, device=logits.device).expand(len(logits))[rows]
    temperature = torch.where(temperature == 0, 1.0, temperature)
    logprob = out.logprob.clone()  # the sampler returns one tensor for both when nothing is filtered
    logprob[rows] = logprob_from_logits(logits[rows], out.token[rows].clamp(min=0), temperature).logprob
    return SampleOutput(out.token, logprob, out.sampled_logprob)
