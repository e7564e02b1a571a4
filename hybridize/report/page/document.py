"""The page as a whole."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from html import escape

from hybridize.report.blocks import Block, Figure, HeatMap, Paragraphs, Quotes, Section, Tokens
from hybridize.report.page.heat import heat_map
from hybridize.report.page.script import SCRIPT
from hybridize.report.page.style import STYLE
from hybridize.report.page.tokens import token_view
from hybridize.report.tables import Table

_INTERVAL = re.compile(r" (?=[(±])")
"""Where the spread of a number begins."""


def document(title: str, sections: Sequence[Section]) -> str:
    """The HTML text."""
    links = "".join(f'<li><a href="#{_anchor(s.title)}">{escape(s.title)}</a></li>' for s in sections)
    body = "\n".join(_section(section) for section in sections)
    needs_script = any(isinstance(block, Tokens) for section in sections for block in section.blocks)
    script = f"<script>{SCRIPT}</script>\n" if needs_script else ""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        f'<header><h1>{escape(title)}</h1><nav aria-label="Sections"><ul>{links}</ul></nav></header>\n'
        f"<main>\n{body}\n</main>\n<footer></footer>\n{script}</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    """Charts that follow each other stand in one box, and so do heat maps; tables beside them where there is room."""
    parts = []
    for kind, blocks in itertools.groupby(section.blocks, type):
        box = {Figure: "figures", HeatMap: "maps", Table: "table"}.get(kind, "words")
        written = [_block(block) for block in blocks]
        boxes = written if kind is Table else ["\n".join(written)]
        parts += [f'<div class="{box}">\n{inner}\n</div>' for inner in boxes]
    anchor = _anchor(section.title)
    head = f'<section aria-labelledby="{anchor}">\n<h2 id="{anchor}">{escape(section.title)}</h2>\n<div class="parts">'
    return "\n".join([head, *parts, "</div>\n</section>"])


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _block(block: Block) -> str:
    if isinstance(block, Paragraphs):
        return "\n".join(_paragraph(label, words) for label, words in block.parts)
    if isinstance(block, Figure):
        return f"<figure>{block.svg}</figure>"
    if isinstance(block, HeatMap):
        return heat_map(block)
    if isinstance(block, Quotes):
        return "\n".join(f"<h3>{escape(label)}</h3>\n<pre>{escape(words)}</pre>" for label, words in block.parts)
    if isinstance(block, Tokens):
        return token_view(block.shown)
    return _table(block)


def _paragraph(label: str, words: str) -> str:
    words = escape(words).replace("× ", "×&nbsp;").replace(" %", "&nbsp;%")
    return f"<p><strong>{escape(label)}.</strong> {words}</p>" if label else f"<p>{words}</p>"


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.header)
    rows = "\n".join(
        f'<tr><th scope="row">{escape(label)}</th>{"".join(map(_cell, cells))}</tr>' for label, *cells in table.rows
    )
    note = f'\n<p class="note">{escape(table.note)}</p>' if table.note else ""
    return (
        f'<h3>{escape(table.title)}</h3>\n<div class="scroll" tabindex="0"><table class="plain">'
        f"<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div>{note}"
    )


def _cell(words: str) -> str:
    """A number stays in one line; on a phone its interval or error may stand in the next."""
    parts = _INTERVAL.split(escape(words), maxsplit=1)
    if len(parts) == 1:
        return f"<td>{parts[0]}</td>"
    return f'<td class="spread">{" ".join(f"<span>{part}</span>" for part in parts)}</td>'
