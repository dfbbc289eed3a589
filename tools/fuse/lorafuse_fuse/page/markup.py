"""HTML and SVG elements from text that comes from anywhere: whatever is not markup is escaped."""

from __future__ import annotations

from html import escape

from lorafuse_fuse.terminal import printable

_VOID = frozenset({"meta", "link", "br", "hr", "col", "wbr"})


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(tag: str, /, *content: str, **attributes: object) -> Markup:
    """`<tag attributes>content</tag>`; of an attribute's name the last underscore is dropped, others are dashes.

    None leaves an attribute out.
    """
    given = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{escape(printable(str(value)))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return Markup(f"<{tag}{given}>" if tag in _VOID else f"<{tag}{given}>{joined(content)}</{tag}>")


def dotted(name: str) -> Markup:
    """A module's name that may be broken after its dots."""
    return Markup(joined([name]).replace(".", ".<wbr>"))


def joined(content: tuple[str, ...] | list[str]) -> Markup:
    """Pieces of markup and of text, one after the other."""
    return Markup(
        "".join(text if isinstance(text, Markup) else escape(printable(text), quote=False) for text in content)
    )
