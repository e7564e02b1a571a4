"""A report as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hybridize.report.blocks import Block, Figure, HeatMap, Paragraphs, Quotes, Section, Tokens
from hybridize.report.tables import markdown, plain


def document(title: str, sections: Sequence[Section]) -> str:
    """The whole text; figures are files beside it, and what only the page can show is left to it."""
    parts = [f"# {plain(title)}"]
    for section in sections:
        parts.append(f"## {plain(section.title)}")
        parts += [text for block in section.blocks for text in _block(block)]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def _block(block: Block) -> Iterator[str]:
    if isinstance(block, Paragraphs):
        yield "\n\n".join(f"**{label}.** {plain(words)}" if label else plain(words) for label, words in block.parts)
    elif isinstance(block, Figure):
        yield f"![{plain(block.title)}]({block.name}.svg)"
    elif isinstance(block, Quotes):
        for label, words in block.parts:
            yield f"{plain(label)}:\n\n{fenced(words)}"
    elif isinstance(block, HeatMap | Tokens):
        return
    else:
        yield markdown(block, level=3)


def fenced(words: str) -> str:
    """Shown as code: models may write Markdown, HTML or links, which must not become part of the report."""
    fence = "`" * max(3, _longest_run(words) + 1)
    return f"{fence}text\n{words}\n{fence}"


def _longest_run(words: str) -> int:
    longest = run = 0
    for character in words:
        run = run + 1 if character == "`" else 0
        longest = max(longest, run)
    return longest
