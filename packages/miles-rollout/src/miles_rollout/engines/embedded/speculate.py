"""Speculation in the embedded engine: who proposes how much, and which of the tokens drawn are committed.

Legend: R = decoding rows, D = draft tokens of a pass, S = sequences that sample in a step (the R, then those that just began).

The pass computes the last token of a row and its draft tokens; every one of these positions is sampled with the noise it has
anyway. A position counts when all draft tokens before it equal what was drawn, so the output is that of plain decoding.
Keys and values of refused draft tokens are overwritten when their positions are computed again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Many
from typing import Any, NamedTuple, Protocol

import numpy as np

from miles_rollout.engines.embedded.config import MAX_DRAFT, EmbeddedConfig
from miles_rollout.engines.embedded.drafts import Accepted, Drafts, gather, gather_trees, match
from miles_rollout.engines.embedded.flight import BlockReadback, Blocks, Flight, Start
from miles_rollout.engines.embedded.state import Sequence
from miles_rollout.engines.embedded.tables import Tables
from miles_rollout.engines.embedded.tail import Tokens
from miles_spec.control import Controller
from miles_spec.draft import DRAFTS, Draft
from miles_spec.models.base import DraftModel

_LENGTHS: np.ndarray = np.arange(MAX_DRAFT + 1)


class Proposer(Protocol):
    """Makes the draft tokens of a step."""

    def propose(self, sequences: Many[Sequence], lengths: np.ndarray) -> Drafts | None:
        """At most `lengths` [R] tokens of each decoding sequence, which has pages for them; None when there are none."""
        ...

    def forget(self) -> None:
        """The draft's weights, or the policy's, have changed."""
        ...

    def retire(self) -> None:
        """Another draft takes over, while steps of this one may be on their way."""
        ...

    @property
    def ahead(self) -> Launcher | None:
        """Starts steps that draft on the device alone, None where there are none."""
        ...

    def prepare(self, rows: np.ndarray, unsure: np.ndarray) -> bool:
        """Whether `ahead` can serve all rows [R] now; makes what they lack. Positions of `unsure` ones are the device's."""
        ...

    def arrived(self, rows: np.ndarray, blocks: Blocks) -> None:
        """A step of `ahead` has committed blocks to rows that still are in the same use."""
        ...


class Launcher(Protocol):
    """Makes speculative steps without the host."""

    def capture(self, lengths: Iterable[int]) -> None:
        """Capture steps of so many draft tokens before they are needed, where steps are captured."""
        ...

    def launch(self, start: Start, length: int, reach: int) -> BlockReadback:
        """Start a step that drafts `length` tokens a row and touches positions below `reach`; all rows have pages for theirs.

        The same `start` again says that nothing has changed but what the device knows itself.
        """
        ...


class Committed(NamedTuple):
    """What a step adds to its sequences."""

    counts: np.ndarray
    """[S]: 1 + accepted draft tokens"""
    tokens: Tokens
    """[W, S]: the first `counts` of each row"""
    moves: tuple[np.ndarray, np.ndarray] | None
    """slots whose keys and values must be copied, and to where; None when all lie right"""
    drafted: np.ndarray
    """[S] draft tokens of each row"""
    length: int
    """draft tokens that a row was to have"""
    nodes: np.ndarray | None = None
    """[S, N]: which of them were accepted, in order; None: the first ones"""


class HistoryProposer:
    """Asks a draft that reads nothing but tokens, through a session of each sequence."""

    def __init__(self, draft: Draft, vocab_size: int) -> None:
        self.draft = draft
        self._vocab_size = vocab_size
        self._trees = getattr(draft, "makes_trees", False)

    def propose(self, sequences: Many[Sequence], lengths: np.ndarray) -> Drafts | None:
        """What every sequence's session says."""
        pairs = list(zip(sequences, lengths.tolist(), strict=True))
        if self._trees:
            drafts = gather_trees([self._ask_tree(seq, most) for seq, most in pairs])
        else:
            drafts = gather([self._session(seq).propose(most) if most > 0 else () for seq, most in pairs])
        if drafts is None:
            return None
        tokens, counts = drafts.tokens, drafts.counts
        if tokens.min() < 0 or tokens.max() >= self._vocab_size or (counts > np.maximum(lengths, 0)).any():
            each = np.split(tokens, np.cumsum(counts)[:-1])
            for (seq, most), proposal in zip(pairs, each, strict=True):
                self._check(seq, proposal.tolist(), most)
        return drafts

    def forget(self) -> None:
        """Nothing here depends on weights."""

    def retire(self) -> None:
        """Nothing here is kept by row."""

    @property
    def ahead(self) -> None:
        """Histories are the host's."""
        return None

    def prepare(self, rows: np.ndarray, unsure: np.ndarray) -> bool:
        """Never."""
        return False

    def arrived(self, rows: np.ndarray, blocks: Blocks) -> None:
        """Does not happen."""
        raise AssertionError("a draft of histories makes no blocks")

    def _session(self, seq: Sequence) -> Any:
        """Its session, brought up to date."""
        maker, session, seen = seq.draft if seq.draft is not None else (None, None, 0)
        output, prompt = seq.output, seq.job.num_prompt
        if session is None or maker is not self.draft:
            session, seen = self.draft.begin(seq.token_ids()), prompt + len(output)
        elif seen < prompt + len(output):
            session.extend(output[seen - prompt :])
        seq.draft = (self.draft, session, prompt + len(output))
        return session

    def _ask_tree(self, seq: Sequence, most: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if most < 1:
            return (), ()
        tokens, parents = self._session(seq).propose_tree(most)
        if len(tokens) != len(parents) or any(not -1 <= parent < node for node, parent in enumerate(parents)):
            raise ValueError(
                f"{type(self.draft).__name__} proposed {tokens} with parents {parents}: a node's parent comes before it"
            )
        return tuple(tokens), tuple(parents)

    def _check(self, seq: Sequence, proposal: Many[int], most: int) -> None:
        if len(proposal) > most or any(not 0 <= token < self._vocab_size for token in proposal):
            raise ValueError(
                f"{type(self.draft).__name__} proposed {tuple(proposal)} for request {seq.job.request.request_id!r}: at most "
                f"{most} tokens of 0..{self._vocab_size - 1} were asked for"
            )


class Speculator:
    """Asks for proposals, and accepts.

    `controller` picks the draft length of every step; without one it is always `num_draft`. `make` turns a draft into what
    proposes. Raises ValueError for a `num_draft` outside 1..15.
    """

    proposer: Proposer

    def __init__(
        self,
        draft: Draft | DraftModel,
        num_draft: int,
        controller: Controller | None,
        make: Callable[[Draft | DraftModel], Proposer],
    ) -> None:
        if not 1 <= num_draft <= MAX_DRAFT:
            raise ValueError(f"num_draft={num_draft} must lie in 1..{MAX_DRAFT}")
        self.num_draft = num_draft
        self.controller = controller
        self.rejects = False
        """Whether tokens depend on the draft: verification by rejection."""
        self.draft_version = 0
        """The weight version that the draft model's weights came with."""
        self.generation = 0
        """Changes with the draft and with its weights."""
        self._make = make
        self._drafted: np.ndarray = np.zeros(MAX_DRAFT + 1, np.int64)
        """How many drafts had so many tokens; of none for a row without a draft."""
        self._accepted: np.ndarray = np.zeros(MAX_DRAFT + 1, np.int64)
        """How many chains had so many of them accepted."""
        self._accepted_at: np.ndarray = np.zeros(MAX_DRAFT, np.int64)
        """How often the i-th node of a tree was accepted."""
        self.num_on_device = 0
        """Steps that drafted, verified and accepted without the host."""
        self.length = 0
        """Draft tokens a row that the step was to have, by the last choice."""
        self._last_made: tuple[int, int] | None = None
        self.is_plain: Callable[[np.ndarray], bool] = lambda rows: True
        """Whether rows sample without filters; the engine sets it."""
        self.use(draft)

    def use(self, draft: Draft | DraftModel) -> None:
        """Go on with another draft, running requests included."""
        if self.generation:
            self.proposer.retire()
        self.generation += 1
        self.draft = draft
        self.makes_trees = bool(getattr(draft, "makes_trees", False))
        self.proposer = self._make(draft)

    def forget(self, version: int | None = None) -> None:
        """Weights have changed, with `version` the draft's: what a draft model made with the old ones is made again."""
        self.draft_version = self.draft_version if version is None else version
        self.generation += 1
        self.proposer.forget()

    def choose(self, num_rows: int, budget: int) -> int:
        """How many tokens each of the decoding rows is to draft in this step, together at most `budget`."""
        length = self.num_draft if self.controller is None else self.controller.choose(num_rows)
        self.length = min(length, budget // max(1, num_rows))
        return self.length

    def prepare(self, rows: np.ndarray, unsure: np.ndarray) -> bool:
        """Whether the device can draft for rows [R] by itself."""
        return self.proposer.ahead is not None and not self.rejects and self.proposer.prepare(rows, unsure)

    def arrive(self, flight: Flight, blocks: Blocks, tables: Tables) -> Committed:
        """What a step committed that the device drafted for; moves the rows of the tables to where they were found to be.

        All rows of the flight are in the same use as when it started. Their last tokens are left to `Tables.know_last`.
        """
        rows, counts = flight.rows, blocks.counts
        self.num_on_device += 1
        tables.position[rows] += counts - 1
        flight.proposer.arrived(rows, blocks)
        tokens = Tokens(blocks.tokens, blocks.logprobs, blocks.logprobs)
        return Committed(counts, tokens, None, blocks.drafted, len(blocks.tokens) - 1)

    def propose(self, sequences: Many[Sequence], lengths: np.ndarray) -> Drafts | None:
        """Drafts of the decoding sequences, at most `lengths` [R] each; None when there are none."""
        drafts = self.proposer.propose(sequences, lengths)
        if drafts is None and self.controller is not None:
            none = [0] * int(lengths.max())
            self.controller.note_accepted(none, none, len(sequences))
        return drafts

    def note_step(self, num_rows: int, has_chunks: bool, seconds: float, is_behind: bool) -> None:
        """A step took `seconds`; with `is_behind` they are those of the step before. Steps with prefill are left out."""
        made = (num_rows, self.length) if num_rows and not has_chunks else None
        noted, self._last_made = (self._last_made if is_behind else made), made
        if self.controller is not None and noted is not None:
            self.controller.note_step(*noted, seconds)

    def commit(self, drafts: Drafts, rows: np.ndarray, tables: Tables, drawn: Tokens) -> Committed:
        """Of what was drawn at all positions [S + D], what plain decoding would have drawn too.

        Moves the rows [S] of the tables behind what is committed.
        """
        accepted = self.accept(drafts, drawn.token_ids, len(rows))
        moves = None if accepted.nodes is None else self._moves(accepted.nodes, accepted.counts, rows, tables)
        tokens = drawn.take(accepted.index)
        tables.position[rows] += accepted.counts
        tables.last_token[rows] = tokens.token_ids[accepted.counts, np.arange(len(rows))]
        drafted = np.zeros(len(rows), np.int64)
        drafted[: len(drafts.counts)] = drafts.counts
        return Committed(accepted.counts + 1, tokens, moves, drafted, self.length, accepted.nodes)

    def accept(self, drafts: Drafts, drawn: np.ndarray, num_rows: int) -> Accepted:
        """Which draft tokens are committed: those that equal the tokens drawn. Nothing else keeps the output."""
        return match(drafts, drawn, num_rows)

    def metrics(self) -> dict[str, float]:
        """Counters since start; fixed names, so another thread may read."""
        proposed_at, accepted_at = _reaching(self._drafted), _reaching(self._accepted) + self._accepted_at
        proposed, accepted, verified = int(proposed_at.sum()), int(accepted_at.sum()), int(proposed_at[0])
        figures: dict[str, float] = {
            "spec_num_verified": verified,
            "spec_num_drafted": proposed,
            "spec_num_accepted": accepted,
            "spec_accept_rate": accepted / proposed if proposed else 0.0,
            "spec_num_on_device": self.num_on_device,
            "spec_accept_length": (verified + accepted) / verified if verified else 0.0,
        }
        for i in range(self.num_draft):
            asked = int(proposed_at[i])
            figures[f"spec_accept_rate_at_{i}"] = int(accepted_at[i]) / asked if asked else 0.0
        if isinstance(self.draft, DraftModel):
            figures["spec_draft_version"] = self.draft_version
        if self.controller is not None:
            figures["spec_draft_length"] = self.controller.length
        return figures

    @staticmethod
    def _moves(nodes: np.ndarray, counts: np.ndarray, rows: np.ndarray, tables: Tables) -> tuple[np.ndarray, np.ndarray] | None:
        """Slots of accepted nodes, and those of the positions they turned out to have; enters the latter into the tables."""
        taken = nodes >= 0
        if not taken.any():
            return None
        each = np.repeat(rows, counts)
        base = tables.position[each]  # one behind the last token's position: that of its first child
        depth = np.broadcast_to(np.arange(taken.shape[1]), taken.shape)[taken]
        source = tables.slots_at(each, base + nodes[taken])
        target = tables.slots_at(each, base + depth)
        tables.slots[each, base + depth] = target
        moved = source != target
        return (source[moved], target[moved]) if moved.any() else None

    def count(self, committed: Committed, taken: np.ndarray) -> int:
        """Of what was committed rows took `taken` [S] tokens: none after one that ended them, none at all if they had ended.

        Returns how many they took in all.
        """
        drafted, accepted, nodes, rows = committed.drafted, committed.counts - 1, committed.nodes, len(taken)
        is_whole = taken is committed.counts
        if not is_whole:
            live = taken > 0
            drafted, accepted = drafted[live], np.minimum(accepted, taken)[live]
            nodes, rows = None if nodes is None else nodes[live], len(drafted)
        drafts = np.bincount(drafted, minlength=MAX_DRAFT + 1)
        self._drafted += drafts
        if nodes is None:
            chains = np.bincount(accepted, minlength=MAX_DRAFT + 1)
            self._accepted += chains
            num_accepted = int(chains @ _LENGTHS)
        else:
            used = nodes[np.arange(nodes.shape[1]) < accepted[:, None]]
            found = np.bincount(used, minlength=MAX_DRAFT)
            self._accepted_at += found
            num_accepted = len(used)
        if self.controller is not None and rows:
            length, accepted_at = committed.length, _reaching(chains) if nodes is None else found
            self.controller.note_accepted(_reaching(drafts)[:length].tolist(), accepted_at[:length].tolist(), rows)
        return rows + num_accepted if is_whole else int(taken.sum())


def _reaching(histogram: np.ndarray) -> np.ndarray:
    """Of a histogram of 0 .. MAX_DRAFT, how many are above i, for i = 0 .. MAX_DRAFT - 1."""
    reaching: np.ndarray = histogram[:0:-1].cumsum()[::-1]
    return reaching


def make_controller(config: EmbeddedConfig) -> Controller | None:
    """What the settings ask for."""
    return Controller(config.draft_tokens) if config.draft_adaptive else None


def named_draft(config: EmbeddedConfig) -> Draft | None:
    """The draft without weights that the settings name, None for none. Raises ValueError for one with weights."""
    if config.draft in ("mtp", "eagle3"):
        raise ValueError(f"draft={config.draft!r}: an engine made of a decoder takes the draft model as an argument")
    return DRAFTS[config.draft]() if config.draft in DRAFTS else None
