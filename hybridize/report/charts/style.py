"""Colours and letters of charts: one style sheet for the page and for the files beside report.md."""

from __future__ import annotations

_LIGHT = "--ink:#1d1d1f;--soft:#66666b;--grid:#e4e4e7;--student:#1f6fb4;--teacher:#77777d;"
_DARK = "--ink:#ececee;--soft:#a0a0a6;--grid:#3a3a3f;--student:#6cb2f0;--teacher:#a5a5ab;"
# Okabe and Ito's colours, which colour-blind readers can tell apart.
_LIGHT += "--c0:#d55e00;--c1:#009e73;--c2:#b8860b;--c3:#a8487f;--c4:#2f8fc4;--c5:#5b4db0;"
_DARK += "--c0:#f08a4b;--c1:#3fc79f;--c2:#e3c04d;--c3:#e08bbd;--c4:#7cc8f5;--c5:#a79cf0;"

NUM_COLOURS = 6
"""Besides student and teacher: the kinds "c0", "c1", ..."""

_KINDS = ("student", "teacher", *(f"c{n}" for n in range(NUM_COLOURS)))

CHART_STYLE = "\n".join(
    [
        f".chart{{{_LIGHT}font-family:system-ui,sans-serif;font-size:12px;color:var(--ink)}}",
        f"@media screen and (prefers-color-scheme:dark){{.chart{{{_DARK}}}}}",
        ".chart text{fill:var(--ink)}.chart text.soft{fill:var(--soft)}",
        ".chart text.head{font-weight:600;font-size:13px}",
        ".chart text.end{text-anchor:end}.chart text.mid{text-anchor:middle}",
        ".chart .grid{stroke:var(--grid);stroke-width:1}.chart .one{stroke:var(--soft);stroke-dasharray:4 3}",
        ".chart .line{fill:none;stroke:currentColor;stroke-width:2;stroke-linejoin:round}",
        ".chart .faint{opacity:.3;stroke-width:1}.chart .dashed{stroke-dasharray:6 4}",
        ".chart .whisker{stroke:currentColor;stroke-width:1.4;fill:none}",
        ".chart .mark{fill:currentColor}.chart .bar{fill:currentColor;opacity:.8}",
        *(f".chart .{kind}{{color:var(--{kind})}}" for kind in _KINDS),
    ]
)


def standalone(svg: str) -> str:
    """An <svg> element as a file of its own: with the style in it, and a width that readers of Markdown can bear."""
    head, body = svg.split(">", 1)
    head = head.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" width="560" ', 1)
    return f"{head}><style>{CHART_STYLE}</style>{body}\n"
