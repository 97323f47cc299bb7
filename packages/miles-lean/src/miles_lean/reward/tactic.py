"""The reward of one tactic: 1.0 when the judge accepts a proof that goes through it, as the last step or before a known rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miles_lean.reward.function import Failed, ready, scoring_of
from miles_lean.reward.outcome import Outcome


async def tactic(
    text: str,
    label: str | None,
    metadata: Mapping[str, Any],
    *,
    backend: str = "auto",
    workers: int = 2,
    elaborate_s: float = 10.0,
    judge_s: float = 20.0,
    retries: int = 2,
    cache: str = "",
    log: str = "",
) -> dict[str, Any]:
    """`metadata` holds `statement`, the tactics `before` this state, those `after` the known one here, and those `later`, once
    the state's first goal is closed.

    The completion must be one tactic on one line. It earns 1.0 when before + tactic is a proof, or becomes one with `later` or
    with `after` behind it: verdicts of the judge. Other options and Failed as for `miles_lean.reward.lean`.
    """
    options = {"workers": workers, "elaborate_s": elaborate_s, "judge_s": judge_s, "retries": retries}
    scoring = scoring_of(backend, options, cache, log)
    steps = [*_tactics(metadata, "before"), text.strip()]
    if not text.strip() or "\n" in text.strip() or ";" in text:
        return {"score": 0.0, "category": "bad_form", "reason": "not one tactic on one line"}
    rests = {(), tuple(_tactics(metadata, "later")), tuple(_tactics(metadata, "after"))}
    found = Outcome(category="no_code")
    for rest in sorted(rests, key=len):
        found = await scoring.outcome("\n".join((*steps, *rest)), {**metadata, "format": "raw"})
        if found.status == "infra_error":
            raise Failed(f"{found.category} after {found.attempts} attempts: {found.reason}")
        if found.status == "accepted":
            break
    return {"score": float(found.status == "accepted"), "category": found.category, "reason": found.reason}


tactic.ready = ready  # type: ignore[attr-defined]


def _tactics(metadata: Mapping[str, Any], key: str) -> list[str]:
    found = metadata.get(key)
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise ValueError(f'metadata["{key}"] must be a list of tactics; see miles_lean.recipes.steps')
    return found
