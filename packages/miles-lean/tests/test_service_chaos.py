"""A server whose processes are killed while it serves: every verdict right or explicitly infra_error, nothing left behind."""

from __future__ import annotations

import service_chaos


def test_verdicts_stay_right_while_processes_die() -> None:
    report = service_chaos.main(30)
    assert not report["wrong"] and not report["orphans"] and report["exit code"] == 0, report
    assert sum(report["outcomes"].values()) == 30 and sum(report["killed"].values()) >= 3
    assert report["outcomes"].get("right/accepted", 0) >= 1 and report["outcomes"].get("false/rejected", 0) >= 1
