"""Pieces of a report as HTML: one file that needs no other, in light and dark, on a screen and on a telephone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import NamedTuple

from .plots import PALETTE

__all__ = ["Table", "banner", "document", "figures", "heading", "listing", "paragraph", "table"]


class Table(NamedTuple):
    """A table of texts; a newline in a text parts it from what is less important."""

    heads: Sequence[str]
    lines: Sequence[Sequence[str]]


def heading(text: str, level: int = 2) -> str:
    """A title."""
    return f"<h{level}>{escape(text)}</h{level}>"


def paragraph(text: str) -> str:
    """Text."""
    return f"<p>{escape(text)}</p>"


def banner(text: str) -> str:
    """What nobody may overlook."""
    return f'<p class="banner" role="alert">{escape(text)}</p>'


def listing(items: Iterable[str]) -> str:
    """A list."""
    return f"<ul>{''.join(f'<li>{escape(item)}</li>' for item in items)}</ul>"


def figures(drawings: Sequence[str]) -> str:
    """Pictures in SVG, beside each other where there is room."""
    return f'<div class="figures">{"".join(drawings)}</div>' if drawings else ""


def table(content: Table) -> str:
    """A table that scrolls by itself where it is wider than the page; ratios below 1 stand out."""
    heads = "".join(f"<th>{_text(head)}</th>" for head in content.heads)
    rows = [
        "<tr>" + "".join(f"<td{_mark(text)}>{_text(text)}</td>" for text in line) + "</tr>" for line in content.lines
    ]
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _text(text: str) -> str:
    first, _, rest = text.partition("\n")
    return escape(first) + (f"<small>{escape(rest)}</small>" if rest else "")


def _mark(text: str) -> str:
    ratio = re.match(r"([\d.]+)x", text)
    return ' class="low"' if ratio and float(ratio[1]) < 1 else ""


def document(title: str, parts: Iterable[str]) -> str:
    """The whole file."""
    return DOCUMENT.format(title=escape(title), style=PALETTE + STYLE, body="\n".join(part for part in parts if part))


STYLE = """
:root { color-scheme: light dark; }
body { font: 14px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 80em; padding: 1em 1.5em;
  color: var(--ink); background: var(--paper); }
p { max-width: 60em; } p, li { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2em .7em; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
th { vertical-align: bottom; } th small { font-weight: inherit; font-size: inherit; color: inherit; }
th:first-child, td:first-child { text-align: left; }
small { display: block; color: var(--soft); font-size: 11px; line-height: 1.2; }
td.low { color: var(--low); font-weight: 600; } td.low small { font-weight: 400; }
.banner { background: var(--alarm); border-left: 4px solid var(--low); padding: .6em 1em; font-weight: 600; }
.figures { display: flex; flex-wrap: wrap; gap: 1.5em; margin: 1em 0; }
.figures svg { max-width: 100%; height: auto; }
@media (max-width: 600px) {
  body { font-size: 13px; padding: .5em .75em; }
  th, td { padding: .2em .35em; }
  th:first-child, td:first-child { white-space: normal; padding-left: 0; }
  th:first-child { min-width: 9em; }
}
"""

DOCUMENT = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
</body>
</html>
"""
