from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miles_spec import NgramDraft, SuffixDraft
from miles_spec.draft import copy_from

SEQUENCES = st.lists(st.integers(0, 3), max_size=60)


def longest_repeated_suffix(tokens: list[int]) -> tuple[int, list[int]]:
    """(length, places where it ended before): by trying every length and place."""
    for length in range(len(tokens) - 1, 0, -1):
        ends = [end for end in range(length, len(tokens)) if tokens[end - length : end] == tokens[-length:]]
        if ends:
            return length, ends
    return 0, []


@given(SEQUENCES)
def test_suffix_automaton_finds_the_longest_match(tokens: list[int]) -> None:
    session = SuffixDraft(min_match=1, factor=100.0).begin(tokens)
    length, ends = longest_repeated_suffix(tokens)
    assert session.match_length == length
    proposal = session.propose(5)
    assert (proposal in {copy_from(tokens, end, 5) for end in ends}) if length else (proposal == ())


@given(SEQUENCES, SEQUENCES)
def test_sessions_do_not_care_how_tokens_arrive(first: list[int], second: list[int]) -> None:
    for draft in (NgramDraft(), SuffixDraft()):
        at_once = draft.begin(first + second)
        in_parts = draft.begin(first)
        for token in second:
            in_parts.propose(3)
            in_parts.extend([token])
        assert in_parts.propose(6) == at_once.propose(6)


@given(SEQUENCES)
def test_ngram_copies_the_last_earlier_place_of_the_longest_n(tokens: list[int]) -> None:
    expected: tuple[int, ...] = ()
    for size in (4, 3, 2):
        ends = [end for end in range(size, len(tokens)) if tokens[end - size : end] == tokens[-size:]]
        if ends:
            expected = copy_from(tokens, ends[-1], 5)
            break
    assert NgramDraft(max_n=4, min_n=2).begin(tokens).propose(5) == expected


def test_a_copy_runs_into_itself() -> None:
    assert NgramDraft().begin([1, 2, 3, 9, 1, 2]).propose(6) == (3, 9, 1, 2, 3, 9)
    assert NgramDraft().begin([7, 7, 7]).propose(4) == (7, 7, 7, 7)
    assert NgramDraft().begin([1, 2, 3]).propose(4) == ()


def test_suffix_proposals_grow_with_the_match() -> None:
    tokens = [*range(10), 50, *range(6)]
    assert SuffixDraft(factor=0.5).begin(tokens).propose(16) == (6, 7, 8)
    assert SuffixDraft(min_match=7).begin(tokens).propose(16) == ()


def test_long_sequences_stay_linear() -> None:
    rng = random.Random()
    tokens = [rng.randrange(4) for _ in range(20_000)]
    session = SuffixDraft().begin(tokens)
    assert len(session._edges) <= 2 * len(tokens)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="min_n=3 and max_n=2"):
        NgramDraft(max_n=2, min_n=3)
    with pytest.raises(ValueError, match="factor=0"):
        SuffixDraft(factor=0)
