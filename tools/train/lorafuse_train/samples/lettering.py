"""Texts of any language, drawn with the one font that Pillow brings, which has hardly more than ASCII."""

from __future__ import annotations

import functools
import textwrap
import unicodedata
from typing import TypeAlias

from PIL import ImageFont

Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont
NO_CHARACTER = "\U0010fffe"
"""Never assigned, so that every font draws its "no such character" for it."""
FEWEST_LETTERS = 0.75
"""A text of which less than this share can be drawn is not worth looking at."""
PLAIN = str.maketrans({"\u2014": "-", "\u2013": "-", "\u00ab": '"', "\u00bb": '"', "\u2026": "...", "\u00df": "ss"})


@functools.cache
def load_font(size: int) -> Font:
    """Pillow's own font, about `size` pixels high."""
    return ImageFont.load_default(size=size)


def drawable(text: str, font: Font) -> str | None:
    """`text` in letters that the font has: accents may be missing, a few letters are escaped as in Python.

    None where too much of it cannot be drawn.
    """
    pieces = [_piece(letter, font) for letter in " ".join(text.split())]
    drawn = sum(piece is not None for piece in pieces)
    if drawn < FEWEST_LETTERS * len(pieces):
        return None
    escaped = (letter.encode("unicode_escape").decode() for letter in " ".join(text.split()))
    return "".join(piece if piece is not None else code for piece, code in zip(pieces, escaped, strict=True))


def _piece(letter: str, font: Font) -> str | None:
    """What to draw for one character; None where nothing like it can be drawn."""
    if has_glyph(letter, font):
        return letter
    plain = unicodedata.normalize("NFKD", letter.translate(PLAIN))
    plain = "".join(part for part in plain if not unicodedata.combining(part))
    if plain or unicodedata.combining(letter):
        return plain if all(has_glyph(part, font) for part in plain) else None
    return None


@functools.lru_cache(maxsize=4096)
def has_glyph(letter: str, font: Font) -> bool:
    """Whether the font draws a character as itself."""
    if not letter.isprintable():
        return False
    if isinstance(font, ImageFont.ImageFont):  # Pillow without FreeType: a bitmap font of Latin-1
        return ord(letter) < 256
    mask, absent = font.getmask(letter), font.getmask(NO_CHARACTER)
    return letter == " " or (mask.size, bytes(mask)) != (absent.size, bytes(absent))


def wrapped(text: str, font: Font, width: int, lines: int) -> str:
    """`text` in at most `lines` lines of about `width` pixels; what is left out ends in dots."""
    letters = max(8, int(width / max(font.getlength("n"), 1)))
    return "\n".join(textwrap.wrap(text, letters, max_lines=lines, placeholder="...")) or " "
