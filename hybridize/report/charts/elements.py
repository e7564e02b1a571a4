"""SVG elements as text; everything that is written between or inside them is escaped."""

from __future__ import annotations

import html

WIDTH = 400
"""Of every chart, in units of its viewBox: a phone shows it at about nine tenths of a pixel a unit."""


def element(name: str, body: str = "", **attributes: object) -> str:
    """One element; `kind` becomes its class, numbers are rounded to a tenth, and _ in names becomes -."""
    parts = []
    for key, value in attributes.items():
        written = "class" if key == "kind" else key.replace("_", "-")
        text = f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
        parts.append(f' {written}="{html.escape(text)}"')
    return f"<{name}{''.join(parts)}>{body}</{name}>"


def text(words: str, x: float, y: float, kind: str = "") -> str:
    """Words with their left end, middle (kind "mid") or right end ("end") at x, their foot at y."""
    return element("text", html.escape(words), x=float(x), y=float(y), **({"kind": kind} if kind else {}))


def line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    """A straight line."""
    return element("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), kind=kind)


def words_width(words: str) -> float:
    """About how wide words are in the charts' letters."""
    return 6.4 * len(words)


def shortened(words: str, width: float) -> str:
    """Words that fit into a width, cut in the middle if they do not: the ends of names tell them apart."""
    most = max(3, int(width / 6.4))
    if len(words) <= most:
        return words
    return words[: most // 2] + "…" + words[len(words) - (most - 1 - most // 2) :]


def drawing(title: str, height: float, parts: list[str]) -> str:
    """The <svg> element with its title at the top."""
    name = element("title", html.escape(title))
    head = text(title, 4, 16, "head")
    box = f"0 0 {WIDTH} {height:.0f}"
    return element("svg", name + head + "".join(parts), kind="chart", viewBox=box, role="img", aria_label=title)
