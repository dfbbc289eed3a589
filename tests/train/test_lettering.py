"""Texts of any language under pictures: nothing crashes, and nothing is drawn as something else."""

from __future__ import annotations

import pytest
from PIL import Image, ImageDraw, ImageFont

from lorafuse_train.samples.lettering import drawable, has_glyph, load_font, wrapped


def test_what_the_font_has_stays() -> None:
    text = 'A red fox, 3/4 view (50 %): "it\'s" #1 @home_2~'
    assert drawable(text, load_font(14)) == text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("caf\u00e9 cre\u0301me", "cafe creme"),
        ("a \u2014 b\u00b2", "a - b2"),
        ("Stra\u00dfe", "Strasse"),
        ("a fox called \u4e2d here", "a fox called \\u4e2d here"),
        ("two\nlines \t and  blanks", "two lines and blanks"),
        ("a red fox\u200b there", "a red fox\\u200b there"),
        ("", ""),
        ("\u4e00\u53ea\u7ea2\u8272\u7684\u72d0\u72f8", None),
        ("\U0001f98a\U0001f98a", None),
        ("\u0642\u0637\u0629", None),
    ],
)
def test_other_letters(text: str, expected: str | None) -> None:
    assert drawable(text, load_font(14)) == expected


def test_the_bitmap_font_of_a_pillow_without_freetype() -> None:
    font = ImageFont.load_default_imagefont()
    assert has_glyph("\u00e9", font)
    assert not has_glyph("\u4e2d", font)
    text = drawable("caf\u00e9 \u4e2d fox fox fox", font)
    assert text is not None
    ImageDraw.Draw(Image.new("RGB", (200, 20))).text((0, 0), text, font=font)


def test_wrapping() -> None:
    lines = wrapped("a word " * 100, load_font(14), 200, 3).split("\n")
    assert len(lines) == 3
    assert lines[-1].endswith("...")
    assert wrapped("", load_font(14), 200, 3) == " "
