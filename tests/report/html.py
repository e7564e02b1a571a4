"""A reader of HTML that holds pages to what a browser would forgive."""

from __future__ import annotations

import re
from html.parser import HTMLParser

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Parses a page; `problems` are tags that do not match, doubled ids and everything that would be loaded."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.problems: list[str] = []
        self.open: list[str] = []
        self.ids: set[str] = set()
        self.targets: set[str] = set()
        self.tags: list[str] = []
        self.words: list[str] = []
        self.titles: list[str] = []
        self.feed(text)
        self.close()
        self.problems += [f"<{tag}> stays open" for tag in self.open]
        self.problems += [f"no #{target}" for target in self.targets - self.ids]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.problems += [f"id {value} twice"] if value in self.ids else []
                self.ids.add(value or "")
            if name == "title":
                self.titles.append(value or "")
            if name == "href" and value and value.startswith("#"):
                self.targets.add(value[1:])
            elif name in ("src", "href", "srcset", "data", "action", "poster") or name.startswith("on"):
                self.problems.append(f"{tag} has {name}={value}")
            if name == "style" and "url(" in (value or ""):
                self.problems.append(f"{tag} loads {value}")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.problems.append(f"</{tag}> closes nothing")

    def handle_data(self, data: str) -> None:
        inside = self.open[-1] if self.open else ""
        if inside == "style" and re.search(r"url\(|@import|https?:", data):
            self.problems.append("the style loads something")
        if inside == "script" and re.search(r"https?:|fetch|import|innerHTML", data):
            self.problems.append("the script loads or writes something")
        if inside not in ("style", "script"):
            self.words.append(data)

    @property
    def text(self) -> str:
        """What is to be read, blanks as one."""
        return " ".join(" ".join(self.words).replace("\u00a0", " ").split())
