"""Heat maps as HTML tables: the number in the cell, the full number where the pointer rests."""

from __future__ import annotations

from html import escape

from hybridize.report.blocks import Heat, HeatMap

_HOT = 0.55
"""From this level on the colour is so strong that letters need the other colour."""


def heat_map(block: HeatMap) -> str:
    """A <figure> with the table in a box that scrolls by itself."""
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in block.columns)
    head = f'<thead><tr><th scope="col">{escape(block.corner)}</th>{columns}</tr></thead>'
    rows = "".join(
        f'<tr><th scope="row">{escape(label)}</th>{"".join(map(_cell, cells))}</tr>' for label, cells in block.rows
    )
    table = f'<table class="heat"><caption>{escape(block.title)}</caption>{head}<tbody>{rows}</tbody></table>'
    note = f'<p class="note">{escape(block.note)}</p>' if block.note else ""
    return f'<figure><div class="scroll" tabindex="0">{table}</div>{note}</figure>'


def _cell(heat: Heat | None) -> str:
    if heat is None:
        return '<td class="none">-</td>'
    hot = ' class="hot"' if heat.level > _HOT else ""
    return f'<td{hot} style="--v:{heat.level:.3f}" title="{escape(heat.full)}">{escape(heat.text)}</td>'
