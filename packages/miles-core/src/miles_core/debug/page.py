"""The frame of an HTML page: no script, no outside reference, light and dark."""

from __future__ import annotations

from html import escape

CSS = """
:root { color-scheme: light dark; --bg: #fff; --fg: #1d1d22; --soft: #6b6b76; --line: #e4e4ea; --card: #f7f7fa; }
@media (prefers-color-scheme: dark) { :root { --bg: #17171b; --fg: #e8e8ee; --soft: #9a9aa6; --line: #303038; --card: #202026; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 74rem; padding: 2rem 1.5rem 4rem; background: var(--bg); color: var(--fg);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 1rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; color: var(--soft); }
.cards { display: flex; flex-wrap: wrap; gap: .7rem; margin-bottom: 1.4rem; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: .6rem 1rem; }
.value { font-size: 1.15rem; font-weight: 600; font-variant-numeric: tabular-nums; }
.label { color: var(--soft); font-size: .85rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(21rem, 1fr)); gap: 1rem; }
figure { margin: 0; padding: .8rem; border: 1px solid var(--line); border-radius: 10px; background: var(--card); }
figcaption { font-weight: 600; margin-bottom: .3rem; } svg { width: 100%; height: auto; }
table { border-collapse: collapse; width: 100%; margin: .4rem 0 1rem; }
td, th { text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 500; }
code { font: 13px/1.45 ui-monospace, Menlo, Consolas, monospace; white-space: pre-wrap;
  overflow-wrap: anywhere; }
details { border: 1px solid var(--line); border-radius: 8px; padding: .4rem .8rem; margin: .4rem 0; }
summary { cursor: pointer; }
.bar { height: .8rem; min-width: 1px; background: #4c8dd6; border-radius: 3px; } td:has(.bar) { width: 40%; }
"""


def page(title: str, css: str, body: str) -> str:
    """A whole document; `body` is HTML, `title` is text."""
    meta = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f"{meta}<title>{escape(title)}</title><style>{css}</style>"
    return f'<!doctype html>\n<html lang="en"><head>{head}</head><body>\n{body}\n</body></html>\n'
