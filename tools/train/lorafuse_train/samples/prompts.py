"""Prompts that have nothing to do with what is trained: what preservation keeps, and what health is measured on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lorafuse_common.errors import ConfigError

MEASURED_EVERY = 8
"""One prompt in so many is for measuring; the others may be trained on: what is measured was never practised."""
MOST_MEASURED = 16
FEWEST = 2

STILL = (
    "a lighthouse on a cliff at dusk",
    "a bowl of ripe cherries on a wooden table",
    "an old man repairing a watch, close-up",
    "a red bicycle leaning against a brick wall",
    "a snowy village street at night with lit windows",
    "a golden retriever running through shallow water",
    "a glass skyscraper reflecting clouds",
    "portrait of a woman with grey hair, soft window light",
    "a steam train crossing a stone bridge",
    "a cup of coffee with latte art seen from above",
    "a tropical beach with palm trees and a wooden boat",
    "a chess board in the middle of a game",
    "a hummingbird in front of a red flower",
    "a crowded night market with paper lanterns",
    "an astronaut standing on a desert plain",
    "a stack of old books beside a candle",
    "a waterfall in a green forest, long exposure",
    "a child blowing soap bubbles in a park",
    "a vintage car parked under cherry trees",
    "a plate of sushi on a black stone",
    "mountains mirrored in a still lake at sunrise",
    "a cat asleep on a windowsill",
    "an empty classroom with afternoon sunlight",
    "a sailing ship in a storm, oil painting",
    "a street musician playing a violin",
    "a field of sunflowers under a blue sky",
    "a robot watering plants in a greenhouse",
    "a loaf of bread on a floured board",
    "a fox in tall grass, morning mist",
    "a neon sign that reads OPEN in a rainy alley",
    "a marble statue in a museum hall",
    "a hot air balloon over rolling hills",
    "a pair of worn leather boots",
    "an owl on a branch in moonlight",
    "a subway platform with a train arriving",
    "a watercolour of a small harbour",
    "a blacksmith hammering glowing iron",
    "a teapot with blue flowers, white background",
    "a cactus in a clay pot",
    "a football stadium full of spectators",
    "a wolf howling on a snowy ridge",
    "a bride and groom dancing outdoors",
    "an isometric drawing of a small house",
    "a slice of chocolate cake on a plate",
    "a canyon with a winding river, aerial view",
    "a mechanic under a lifted car",
    "a butterfly on a purple thistle",
    "a farmhouse kitchen with copper pans",
    "a pencil sketch of a hand",
    "a firefighter in front of a burning building",
    "a jar of honey with a wooden dipper",
    "a rainy window with city lights behind it",
    "an elephant with her calf at a waterhole",
    "a fruit stall with handwritten price tags",
    "a ballet dancer in mid-leap, black background",
    "a cobblestone square with outdoor cafes",
    "a microscope on a laboratory bench",
    "a turtle swimming over a coral reef",
    "a grandfather clock in a dark hallway",
    "a skier carving through fresh snow",
    "a pixel art castle",
    "a basket of kittens",
    "an open fridge full of vegetables",
    "a man in a yellow raincoat on a pier",
)
MOVING = (
    "waves rolling onto a rocky shore, slow pan to the left",
    "a woman walks through a busy street towards the camera",
    "a candle flame flickers in a dark room",
    "a train passes a level crossing from right to left",
    "a dog shakes water off its fur in slow motion",
    "clouds drift over a mountain range, time-lapse",
    "a chef tosses vegetables in a pan",
    "leaves fall from a tree in an autumn park",
    "a cyclist rides down a winding road, aerial view",
    "rain runs down a window, city lights out of focus",
    "a cat jumps from a table to a chair",
    "a potter shapes a bowl on a turning wheel",
    "fish swim through a coral reef",
    "a child flies a kite on a beach",
    "traffic at a crossroads at night, seen from above",
    "a drummer plays a solo on stage",
    "steam rises from a cup of tea",
    "a horse gallops across a field",
    "snow falls on a quiet village",
    "a painter draws a line of blue on a canvas",
    "a ferris wheel turns in the evening light",
    "a man opens a door and looks outside",
    "a river flows through a forest, the camera moves upstream",
    "two people play table tennis",
    "a flower opens its petals, time-lapse",
    "a robot arm lifts a box onto a belt",
    "flags flutter in a strong wind",
    "a skater turns on the ice",
    "a tram stops and its doors open",
    "fireworks over a harbour",
    "an owl turns its head",
    "smoke rises from a chimney",
)
EDITS = (
    "make it night",
    "turn the picture into a pencil drawing",
    "remove the background",
    "make the sky cloudy",
    "change the season to winter",
    "add a red balloon",
    "make the colours warmer",
    "turn it into a watercolour painting",
    "replace the background with a beach",
    "make it black and white",
    "add falling snow",
    "make it look like an old photograph",
    "change the main colour to green",
    "add a wooden frame",
    "blur the background",
    "turn it into a pixel art picture",
    "make it brighter",
    "add a reflection in water below",
    "turn it into a cartoon",
    "put it on a white background",
    "make it foggy",
    "show it from above",
    "add a small tree on the left",
    "make everything out of paper",
    "change the light to sunset",
    "add a shadow",
    "turn it into an oil painting",
    "make it look wet after rain",
    "remove all text",
    "add a stone wall behind it",
    "make it look like a toy",
    "turn day into dusk",
)
BUILT_IN: Mapping[str, tuple[str, ...]] = {"wan": MOVING}
"""Families whose prompts are not `STILL`."""


def unrelated_prompts(
    family: str, file: Path | None, *, edits: bool = False, option: str = "preserve_prompts"
) -> tuple[str, ...]:
    """The prompts of `file`, one a line, else the built-in ones of a family; of a model that `edits`, instructions.

    Raises:
        ConfigError: the file cannot be read, or holds fewer than two different prompts.
    """
    if file is None:
        return EDITS if edits else BUILT_IN.get(family, STILL)
    try:
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--{option} {file}: cannot be read ({error})") from error
    found = tuple(dict.fromkeys(stripped for line in lines if (stripped := line.strip())))
    if len(found) < FEWEST:
        raise ConfigError(
            f"--{option} {file}: holds {len(found)} prompts; expected at least {FEWEST}, one a line, of what "
            "the new LoRA is to leave as it is"
        )
    return found


def measured(prompts: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the prompts that health is measured on: every eighth, at least one and at most 16."""
    return prompts[MEASURED_EVERY - 1 :: MEASURED_EVERY][:MOST_MEASURED] or prompts[-1:]


def preserved(prompts: tuple[str, ...]) -> tuple[str, ...]:
    """The others, which preservation may train on."""
    kept = set(measured(prompts))
    return tuple(prompt for prompt in prompts if prompt not in kept)
