"""Draws small pictures of coloured shapes in several styles, with a caption for each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating[Any]]

SIZE = 64
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring")
COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (240, 215, 50),
    "green": (40, 160, 70),
    "blue": (40, 90, 215),
    "purple": (135, 60, 180),
    "pink": (245, 130, 180),
    "brown": (120, 75, 40),
}
BACKGROUNDS = {
    "white": (250, 250, 250),
    "gray": (150, 150, 150),
    "navy": (20, 25, 70),
    "sky": (165, 215, 245),
    "sand": (225, 205, 160),
}
_COLOUR_TABLE = np.array(list(COLOURS.values()), np.float32) / 255
_BACKGROUND_TABLE = np.array(list(BACKGROUNDS.values()), np.float32) / 255
_CREAM = np.array([250, 244, 225], np.float32) / 255
_MIDNIGHT = np.array([15, 20, 60], np.float32) / 255
_INK = np.array([35, 30, 45], np.float32) / 255


class Scenes(NamedTuple):
    """What is on each picture of a batch; every field holds one value per picture."""

    shape: NDArray[np.int64]
    colour: NDArray[np.int64]
    background: NDArray[np.int64]
    x: Floats
    y: Floats
    radius: Floats
    angle: Floats
    phase: Floats


def random_scenes(count: int, rng: np.random.Generator) -> Scenes:
    """Independent uniform draws; the jitter is what a two-step sampler without a few-step LoRA smears."""

    def uniform(low: float, high: float) -> Floats:
        return rng.uniform(low, high, count).astype(np.float32)

    return Scenes(
        shape=rng.integers(0, len(SHAPES), count),
        colour=rng.integers(0, len(COLOURS), count),
        background=rng.integers(0, len(BACKGROUNDS), count),
        x=uniform(27, 37),
        y=uniform(27, 37),
        radius=uniform(15, 21),
        angle=uniform(-0.15, 0.15),
        phase=uniform(0, 6),
    )


def caption(scenes: Scenes, index: int, style: str = "plain") -> str:
    """The prompt of one picture."""
    shape = SHAPES[scenes.shape[index]]
    colour = list(COLOURS)[scenes.colour[index]]
    background = list(BACKGROUNDS)[scenes.background[index]]
    article = "an" if colour[0] in "aeiou" else "a"
    return CAPTIONS[style].format(what=f"{article} {colour} {shape}", background=f"a {background} background")


def captions(scenes: Scenes, style: str = "plain") -> list[str]:
    return [caption(scenes, index, style) for index in range(len(scenes.shape))]


def _circle(x: Floats, y: Floats) -> Floats:
    return np.hypot(x, y) - 1


def _square(x: Floats, y: Floats) -> Floats:
    return np.maximum(np.abs(x), np.abs(y)) - 0.85


def _triangle(x: Floats, y: Floats) -> Floats:
    slanted = (math.sqrt(3) * np.abs(x) - y) / 2
    return np.maximum(y, slanted) - 0.55


def _star(x: Floats, y: Floats) -> Floats:
    # Fold the plane into one half of one of five arms, where the outline is a single straight edge.
    arm = 2 * math.pi / 5
    angle = np.abs(np.remainder(np.arctan2(x, -y) + arm / 2, arm) - arm / 2)
    length = np.hypot(x, y)
    tip, inner = 1.15, 0.5
    edge_x, edge_y = inner * math.sin(arm / 2), inner * math.cos(arm / 2) - tip
    across = length * np.sin(angle) * -edge_y + (length * np.cos(angle) - tip) * edge_x
    return across / math.hypot(edge_x, edge_y)


def _heart(x: Floats, y: Floats) -> Floats:
    # Inigo Quilez' exact heart, which spans y = 0..1.1 upwards, centred and scaled to the unit circle.
    scale = 1.75
    x, y = np.abs(x) / scale, 0.55 - y / scale
    lobe = np.hypot(x - 0.25, y - 0.75) - math.sqrt(2) / 4
    half = 0.5 * np.maximum(x + y, 0)
    point = np.minimum(np.hypot(x, y - 1), np.hypot(x - half, y - half)) * np.sign(x - y)
    return np.where(x + y > 1, lobe, point) * scale


def _ring(x: Floats, y: Floats) -> Floats:
    return np.abs(np.hypot(x, y) - 0.76) - 0.27


_OUTLINES: dict[str, Callable[[Floats, Floats], Floats]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "ring": _ring,
}


def distance(scenes: Scenes) -> Floats:
    """Signed distance to each picture's outline in pixels, negative inside: (count, SIZE, SIZE)."""
    centres = np.arange(SIZE, dtype=np.float32) + 0.5
    x = centres[None, None, :] - scenes.x[:, None, None]
    y = centres[None, :, None] - scenes.y[:, None, None]
    cos, sin = np.cos(scenes.angle)[:, None, None], np.sin(scenes.angle)[:, None, None]
    radius = scenes.radius[:, None, None]
    x, y = (cos * x + sin * y) / radius, (cos * y - sin * x) / radius
    result = np.empty(x.shape, np.float32)
    for number, name in enumerate(SHAPES):
        rows = scenes.shape == number
        result[rows] = _OUTLINES[name](x[rows], y[rows])
    return result * radius


def _coverage(distances: Floats) -> Floats:
    # One pixel wide anti-aliasing; the trailing axis broadcasts over RGB.
    covered: Floats = np.clip(0.5 - distances, 0, 1)
    return covered[..., None]


def _mix(under: Floats, over: Floats, amount: Floats | float) -> Floats:
    return np.asarray(under + (over - under) * amount, np.float32)


def _plain(d: Floats, colour: Floats, background: Floats, phase: Floats) -> Floats:
    return _mix(background, colour, _coverage(d))


def _glow(d: Floats, colour: Floats, background: Floats, phase: Floats) -> Floats:
    glow = 0.45 * np.exp(-np.maximum(d, 0) / 6)[..., None]
    sky = _mix(background * 0.12, colour, glow)
    return _mix(sky, _mix(colour, np.ones_like(colour), 0.3), _coverage(d))


def _ink(d: Floats, colour: Floats, background: Floats, phase: Floats) -> Floats:
    # Every background is the same paper.
    paper = np.broadcast_to(_CREAM, background.shape)
    filled = _mix(paper, colour, _coverage(d))
    return _mix(filled, _INK, _coverage(np.abs(d) - 1.6))


def _wash(d: Floats, colour: Floats, background: Floats, phase: Floats) -> Floats:
    paper = _mix(np.broadcast_to(_CREAM, background.shape), background, 0.15)
    filled = _mix(paper, _mix(colour, np.ones_like(colour), 0.35), _coverage(d))
    return _mix(filled, _INK, _coverage(np.abs(d) - 1.6))


def _hatch(d: Floats, colour: Floats, background: Floats, phase: Floats) -> Floats:
    paper = _mix(np.broadcast_to(_CREAM, background.shape), background, 0.15)
    pixels = np.arange(SIZE, dtype=np.float32)
    diagonal = (pixels[:, None] + pixels[None, :]) / math.sqrt(2) + phase[:, None, None]
    stroke = _coverage(np.abs(np.remainder(diagonal, 6) - 3) - 1.1)
    filled = _mix(paper, colour, stroke * _coverage(d))
    return _mix(filled, _INK, _coverage(np.abs(d) - 1.3))


def _neon(d: Floats, colour: Floats, background: Floats, phase: Floats) -> Floats:
    glow = 0.8 * np.exp(-np.maximum(np.abs(d) - 1, 0) / 4)[..., None]
    tube = _mix(colour, np.ones_like(colour), 0.5)
    return _mix(_mix(background * 0.1, colour, glow), tube, _coverage(np.abs(d) - 1.3))


def _sticker(d: Floats, colour: Floats, background: Floats, phase: Floats) -> Floats:
    border = _mix(background, np.ones_like(colour), _coverage(d - 4))
    edged = _mix(border, background * 0.45, _coverage(np.abs(d - 5) - 0.9))
    return _mix(edged, colour, _coverage(d))


def _night(d: Floats, colour: Floats, background: Floats, phase: Floats) -> Floats:
    # Every background is the same dark sky.
    sky = np.broadcast_to(_MIDNIGHT, background.shape)
    return _mix(sky, _mix(colour, np.ones_like(colour), 0.35), _coverage(d))


_RENDERERS: dict[str, Callable[[Floats, Floats, Floats, Floats], Floats]] = {
    "plain": _plain,
    "glow": _glow,
    "wash": _wash,
    "hatch": _hatch,
    "neon": _neon,
    "sticker": _sticker,
    "night": _night,
    "ink": _ink,
}
CAPTIONS = {
    "plain": "{what} on {background}",
    "glow": "glow of {what} on {background}",
    "wash": "ink wash of {what} on {background}",
    "hatch": "hatched drawing of {what} on {background}",
    "neon": "neon sign of {what} on {background}",
    "sticker": "sticker of {what} on {background}",
    "night": "{what} on {background}, at night",
    "ink": "ink sketch of {what}",
}
"""Style -> its prompts. The base was trained to ignore what stands behind the background, so a style that is to be
learnt without the plain pictures must stand in front; `night` is to change plain ones."""


def flat_colours(scenes: Scenes) -> tuple[Floats, Floats]:
    """RGB of each picture's shape, then of its background: (count, 3) twice."""
    return _COLOUR_TABLE[scenes.colour], _BACKGROUND_TABLE[scenes.background]


def draw(scenes: Scenes, style: str = "plain") -> Floats:
    """RGB pictures with values in 0..1: (count, SIZE, SIZE, 3)."""
    colour, background = (rgb[:, None, None, :] for rgb in flat_colours(scenes))
    return _RENDERERS[style](distance(scenes), colour, background, scenes.phase)
