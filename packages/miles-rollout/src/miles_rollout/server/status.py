"""A page for people: facts and one table, plain HTML without scripts."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.responses import HTMLResponse, Response

STYLE = (
    "body{font:14px/1.5 system-ui,sans-serif;margin:2em}table{border-collapse:collapse}"
    "td,th{padding:.2em .8em;border:1px solid #bbb;text-align:left}tr.bad td{background:#fdd}"
    "@media(prefers-color-scheme:dark){body{background:#111;color:#ddd}tr.bad td{background:#511}}"
)


def table_page(title: str, facts: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Response:
    """The page; it loads itself again every 5 seconds. Rows whose `state` is not "ready" stand out."""
    head = f"<!doctype html><html lang=en><meta charset=utf-8><meta http-equiv=refresh content=5><title>{_text(title)}</title>"
    lines = [f"{head}<style>{STYLE}</style><h1>{_text(title)}</h1><table>"]
    lines += [f"<tr><th>{_text(name)}<td>{_text(value)}" for name, value in facts.items()]
    lines.append("</table>")
    if rows:
        names = list(rows[0])
        lines.append("<h2>" + f"{len(rows)} rows</h2><table><tr>" + "".join(f"<th>{_text(name)}" for name in names))
        for row in rows:
            bad = " class=bad" if row.get("state", "ready") != "ready" else ""
            lines.append(f"<tr{bad}>" + "".join(f"<td>{_text(row.get(name))}" for name in names))
        lines.append("</table>")
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return HTMLResponse("\n".join(lines), headers={"content-security-policy": policy, "cache-control": "no-store"})


def _text(value: Any) -> str:
    return html.escape("" if value is None else str(value))
