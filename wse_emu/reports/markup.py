"""HTML as text that knows whether it is escaped already: what is not `Markup` is escaped when it enters an element."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from html import escape
from typing import Final

_VOID: Final = frozenset({"meta", "rect", "path"})
"""Elements that close themselves if they have no content."""


class Markup(str):
    """Text that is HTML: never escaped again."""

    __slots__ = ()


Child = str | int | None


def tag(name: str, /, *children: Child, **attributes: str | float | None) -> Markup:
    """An element.

    Parameters
    ----------
    name : str
    *children : Markup, str, int or None
        Text that is not `Markup` is escaped, None is left out.
    **attributes : str, number or None
        None is left out; a trailing underscore is dropped, other underscores become hyphens. Values are escaped.

    >>> tag("p", "a < b", tag("b", "c"), class_="x")
    '<p class="x">a &lt; b<b>c</b></p>'
    """
    words = [name]
    for key, value in attributes.items():
        if value is not None:
            words.append(f'{key.rstrip("_").replace("_", "-")}="{escape(_number(value))}"')
    if name in _VOID and not children:
        return Markup(f"<{' '.join(words)}/>")
    return Markup(f"<{' '.join(words)}>{join(children)}</{name}>")


def join(children: Iterable[Child], separator: str = "") -> Markup:
    """Several children as one piece; text that is not `Markup` is escaped, None is left out."""
    parts = (str(c) if isinstance(c, Markup) else escape(str(c)) for c in children if c is not None)
    return Markup(separator.join(parts))


def _number(value: str | float) -> str:
    """A float as short as SVG needs it."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def table(
    heads: Sequence[Child], rows: Iterable[Sequence[Child]], foot: Sequence[Child] | None = None, *, id: str | None = None,
    style: str | None = None, failed: Container[int] = (),
) -> Markup:  # fmt: skip
    """A table that scrolls sideways where it is too wide.

    Parameters
    ----------
    heads : sequence
    rows : iterable of sequences
        The first entry of each names the row.
    foot : sequence, optional
        Likewise, for a last row of sums.
    id : str, optional
        Of the table.
    style : str, optional
        Classes: "words" aligns to the left, "narrow" takes no more width than a few columns need.
    failed : container of int
        Indices of rows to mark.
    """

    def line(cells: Sequence[Child], mark: bool = False) -> Markup:
        first, *others = cells
        return tag("tr", tag("th", first, scope="row"), *(tag("td", cell) for cell in others), class_="failed" if mark else None)

    head = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in heads)))
    body = tag("tbody", *(line(cells, i in failed) for i, cells in enumerate(rows)))
    end = None if foot is None else tag("tfoot", line(foot))
    return tag("div", tag("table", head, body, end, id=id, class_=style), class_="scroll", tabindex=0)
