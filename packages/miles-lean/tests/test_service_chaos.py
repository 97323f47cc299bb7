"""A server that breaks while it serves: every verdict right or explicitly infra_error, nothing left behind."""

from __future__ import annotations

import service_chaos


def test_verdicts_stay_right_while_everything_breaks() -> None:
    report = service_chaos.main(30, kill_s=1.0)
    assert not report["wrong"] and not report["orphans"] and report["exit code"] == 0, report
    assert report["requests"] == 30 and sum(report["killed"].values()) >= 3, report
    assert report["outcomes"].get("right/accepted", 0) >= 1 and report["outcomes"].get("false/rejected", 0) >= 1, report
    assert {kind.partition("/")[0] for kind in report["outcomes"]} == {"right", "false", *service_chaos.HARM}
    hang = report["longest hang, s past its deadline"]
    assert hang is None or hang < 1.0, report  # 0.3 on a machine that does nothing else
    assert sorted(report["afterwards"]).count("accepted") >= 1, "the server must still work when the trouble is over"


def test_the_storm_counts_wrong_verdicts() -> None:
    """The report calls wrong what is wrong: a proof refused, a harmful one accepted; not what was an infra_error."""
    rows = [
        (0, {"status": "rejected", "category": "timeout", "reason": "", "times": {"elaborate_s": 9.0}}),
        (1, {"status": "accepted", "category": "proved", "reason": ""}),  # a false proof
        (2, {"status": "infra_error", "category": "infra", "reason": "lost"}),
        (5, {"status": "accepted", "category": "proved", "reason": ""}),  # harm
        (6, {"status": "accepted", "category": "proved", "reason": ""}),
    ]
    found = service_chaos.report(rows, service_chaos.Counter())
    assert [row[0] for row in found["wrong"]] == [0, 1, 5] and found["longest hang, s past its deadline"] == 6.0
