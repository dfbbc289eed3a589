"""python examples/shapes/make_dataset.py --out /tmp/shapes-dataset

Draws the training pictures of the demo's new style, with a metadata.csv of their prompts.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import drawing
import numpy as np
from PIL import Image

STYLE = "ink"


def make_dataset(out: Path, count: int, seed: int, style: str) -> None:
    """Writes 000.png ... and metadata.csv with the columns image and prompt."""
    scenes = drawing.random_scenes(count, np.random.default_rng(seed))
    pixels = np.rint(drawing.draw(scenes, style) * 255).astype(np.uint8)
    prompts = drawing.captions(scenes, style)
    out.mkdir(parents=True, exist_ok=True)
    digits = len(str(count - 1))
    with (out / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["image", "prompt"])
        for number, (picture, prompt) in enumerate(zip(pixels, prompts, strict=True)):
            name = f"{number:0{digits}}.png"
            Image.fromarray(picture).save(out / name)
            rows.writerow([name, prompt])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the pictures to")
    parser.add_argument("--count", type=int, default=128, help="number of pictures (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other pictures (default: %(default)s)")
    parser.add_argument(
        "--style", choices=list(drawing.CAPTIONS), default=STYLE, help="drawing style (default: %(default)s)"
    )
    options = parser.parse_args()
    if options.count < 1:
        parser.error(f"--count {options.count}: there must be at least one picture")
    make_dataset(options.out, options.count, options.seed, options.style)
    print(f"{options.out}: {options.count} pictures")


if __name__ == "__main__":
    main()
