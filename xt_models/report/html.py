"""The Markdown of a report -> one HTML page with its pictures inside."""

from __future__ import annotations

import html
import re
from pathlib import Path

_STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; margin: 0 auto; max-width: 76rem;
       padding: 1rem 1.25rem 4rem; color: #1b1f24; background: #fff }
h1 { font-size: 1.7rem; margin: .5rem 0 } h2 { margin: 2.5rem 0 .5rem; padding-top: .5rem;
     border-top: 2px solid #d5dae0; font-size: 1.35rem } h3 { margin: 1.5rem 0 .25rem }
p, ul, ol { max-width: 56rem; overflow-wrap: anywhere } li { margin: .15rem 0 }
.table { overflow-x: auto; margin: .75rem 0 1.25rem }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums }
td, th { border-bottom: 1px solid #d5dae0; padding: .35rem .7rem; text-align: left;
         vertical-align: top; min-width: 4rem; max-width: 26rem }
th { background: #f3f5f7; vertical-align: bottom } td:first-child { font-weight: 600 }
tr:hover td { background: #f8fafc } code { background: #f3f5f7; padding: 0 .2rem }
a { color: #0b57a4; text-decoration: none } a:hover { text-decoration: underline }
figure { margin: 1rem 0; overflow-x: auto } svg { min-width: 34rem; max-width: 100%; height: auto }
details { margin: .5rem 0 } summary { cursor: pointer; color: #0b57a4 }
@media (max-width: 40rem) { body { font-size: 15px; padding: .5rem .75rem 3rem }
  td, th { padding: .3rem .45rem; font-size: 12.5px } }
"""


def anchor(title: str) -> str:
    """What a heading is linked by, on GitHub too."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def to_html(markdown: str, title: str, folder: Path) -> str:
    """A page of the headings, tables, lists, folds and paragraphs in `markdown`.

    folder: where its pictures lie, SVG files.
    """
    body = "\n".join(
        _block(block.strip("\n").splitlines(), folder)
        for block in re.split(r"\n{2,}", markdown)
        if block.strip()
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _block(lines: list[str], folder: Path) -> str:
    first = lines[0]
    if first.startswith(("<details>", "</details>")):
        return "\n".join(lines)
    if first.startswith("#"):
        level, text = len(first) - len(first.lstrip("#")), first.lstrip("# ")
        return f'<h{level} id="{anchor(text)}">{_inline(text)}</h{level}>'
    if picture := re.fullmatch(r"!\[(.*)\]\((.*)\)", first):
        svg = (folder / picture[2]).read_text()
        return f"<figure>{svg[svg.index('<svg') :]}</figure>"
    if first.startswith("|"):
        return _table(lines)
    if first.startswith("* "):
        return "<ul>" + "".join(f"<li>{_inline(line[2:])}</li>" for line in lines) + "</ul>"
    if re.match(r"\d+\. ", first):
        numbered = (line.partition(". ") for line in lines)
        items = "".join(f'<li id="s{n}">{_inline(text)}</li>' for n, _, text in numbered)
        return f"<ol>{items}</ol>"
    return f"<p>{_inline(' '.join(lines))}</p>"


def _table(lines: list[str]) -> str:
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if not line.startswith("| ---")]
    parts = []
    for place, row in enumerate(rows):
        kind = "td" if place else "th"
        cells = (cell.strip().replace("\\|", "|") for cell in row)
        parts.append("".join(f"<{kind}>{_inline(cell)}</{kind}>" for cell in cells))
    return f'<div class="table"><table><tr>{"</tr><tr>".join(parts)}</tr></table></div>'


def _inline(text: str) -> str:
    text = re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", text)
    text = re.sub(r"\[([^\]]+)\]\((#[\w-]+)\)", r'<a href="\2">\1</a>', text)
    return re.sub(r"(?<!\w)\[(\d+)\](?!\()", r'<a href="#s\1">[\1]</a>', text)
