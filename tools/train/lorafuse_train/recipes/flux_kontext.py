"""FLUX.1 Kontext: FLUX.1 dev with one control picture, whose tokens have positions of their own plane."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS

from lorafuse_train.dataset.pictures import stretched

from .control_latents import PIPELINES_AREA, named_controls
from .flux import Flux
from .recipe import ControlPicture, Encoded, Shape, Size


class FluxKontext(Flux):
    """The recipe of FLUX.1 Kontext dev; without a control picture it draws from text, as its pipeline does."""

    name = "flux_kontext"
    pipelines = ("FluxKontextPipeline",)
    controls = (0, 1)

    def control_size(self, pipeline: Path, picture: Size, target: Size, max_pixels: int) -> Size:
        """Of the 17 sizes that Kontext knows the one of the nearest shape; smaller by as much as `max_pixels` asks."""
        ratio, multiple = picture[1] / picture[0], self.pixel_multiple(pipeline)
        _, width, height = min((abs(ratio - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
        scale = min(1.0, math.sqrt(max_pixels / PIPELINES_AREA))
        # The epsilon keeps 64 * sqrt(1/4) = 31.999... at 32.
        whole = [int(side * scale + 1e-6) // multiple * multiple for side in (height, width)]
        if 0 in whole:
            raise ValueError(f"has the shape of {width}x{height}, which --max_pixels {max_pixels} leaves nothing of")
        return whole[0], whole[1]

    def encode_controls(self, vae: Any, controls: Sequence[ControlPicture], shape: Shape) -> Encoded:
        """Stretched to its size, as by the pipeline; (C, h, w) each."""
        return named_controls(self.encode_image(vae, stretched(each.picture, each.size)) for each in controls)

    def size_arguments(self, height: int, width: int) -> str:
        """Its area too, for the pipeline scales every size to 1024 x 1024 pixels."""
        return f"height={height}, width={width}, max_area={height * width}"
