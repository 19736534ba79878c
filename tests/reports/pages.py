"""Reading a page as a strict reader would: well-formed, self-contained, its tables and pictures as values."""

from __future__ import annotations

import re
from collections import defaultdict
from html.parser import HTMLParser

VOID = frozenset({"meta", "br", "hr", "img", "input", "link"})


class Page(HTMLParser):
    """One page; raises at the first tag that is not closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.tables: dict[str, list[list[str]]] = defaultdict(list)
        """Rows of cells of the tables that have an id; a number with its bar is the number."""
        self.cells: dict[str, list[str]] = defaultdict(list)
        """By section, the numbers written into heat maps."""
        self.titles: dict[str, list[str]] = defaultdict(list)
        """By section, what pointers are told."""
        self.sections: dict[str, str] = defaultdict(str)
        """Text of the sections, without that of pictures."""
        self._open: list[tuple[str, str]] = []
        self._section = self._table = ""
        self.feed(text)
        self.close()
        assert self._open == [], f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)
        if tag not in VOID:
            self._open.append((tag, dict(attrs).get("class") or ""))
        if tag == "section":
            self._section = dict(attrs)["id"] or ""
        if tag == "table":
            self._table = dict(attrs).get("id") or ""
        if tag == "tr" and self._table:
            self.tables[self._table].append([])
        if tag in ("td", "th") and self._table:
            self.tables[self._table][-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        name, _ = self._open.pop()
        assert name == tag, f"</{tag}> closes <{name}>"
        if tag == "table":
            self._table = ""
        if tag == "section":
            self._section = ""

    def handle_data(self, data: str) -> None:
        inside, style = self._open[-1] if self._open else ("", "")
        if inside == "title" and len(self._open) > 2 and self._open[1][0] == "body":
            self.titles[self._section].append(data)
        elif inside == "text":
            if style.startswith("in "):
                self.cells[self._section].append(data)
        elif inside not in ("style", "title"):
            self.sections[self._section] += data
            if self._table and any(name in ("td", "th") for name, _ in self._open):
                self.tables[self._table][-1][-1] += data

    def _note(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            self.attributes.append((tag, name, value or ""))
            if name == "id":
                self.ids.append(value or "")
            if name == "href":
                self.links.append(value or "")


def read(text: str) -> Page:
    """The page, after the checks that every page must pass: well-formed, nothing loaded, nothing that runs, links inside."""
    assert text.startswith("<!doctype html>\n<html")
    page = Page(text.removeprefix("<!doctype html>"))
    assert page.tags & {"script", "link", "img", "image", "iframe", "object", "embed", "base", "form", "use", "foreignObject"} == set()
    assert [a for a in page.attributes if a[1].startswith("on") or a[1] in ("src", "srcset", "xlink:href", "style", "action")] == []
    assert re.findall(r"https?:|//[a-z]|@import|url\(|javascript:|data:", text, flags=re.IGNORECASE) == []
    assert len(page.ids) == len(set(page.ids))
    assert page.links
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert ("meta", "content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    return page


def integer(cell: str) -> int:
    """A number with its thousands apart."""
    return int(cell.replace(",", ""))
