"""Qwen-Image-Edit: control pictures after the target's tokens, and in the prompt that Qwen2.5-VL reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageEditPipeline, QwenImageEditPlusPipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import CONDITION_IMAGE_SIZE
from PIL import Image
from transformers import Qwen2VLProcessor

from lorafuse_train.dataset.pictures import stretched

from .control_latents import MANY, PIPELINES_AREA, named_controls
from .qwen_image import QwenImage, load_text_parts
from .recipe import ControlPicture, Encoded, Shape, Size

STEP = 32
"""Of which the pipelines make both sides of a control picture a multiple."""
LONGEST_RATIO = 100
"""Of a control picture's sides; the text encoder's processor refuses 200, and rounding to `STEP` may add to it."""


class QwenImageEdit(QwenImage):
    """The recipe of the first Qwen-Image-Edit: one picture, which the text encoder sees as large as the VAE does."""

    name = "qwen_image_edit"
    pipelines = ("QwenImageEditPipeline",)
    text_parts = ("text_encoder", "tokenizer", "processor")
    controls = (1, 1)
    text_sees_controls = True
    pipeline_class: Any = QwenImageEditPipeline

    def control_size(self, pipeline: Path, picture: Size, target: Size, max_pixels: int) -> Size:
        """An area of 1024 x 1024, or `max_pixels` where that is less, in the picture's shape, small or large.

        Raises:
            ValueError: it is so long that nothing would remain of its short side.
        """
        return _sized(picture, min(max_pixels, PIPELINES_AREA))

    def encode_controls(self, vae: Any, controls: Sequence[ControlPicture], shape: Shape) -> Encoded:
        """Stretched to its size, as by the pipeline; (C, h, w) each."""
        return named_controls(self.encode_image(vae, stretched(each.picture, each.size)) for each in controls)

    def load_text_encoder(self, pipeline: Path, device: torch.device) -> Any:
        """The pipeline with nothing but processor, tokenizer and text encoder, so that the template is its own."""
        parts = load_text_parts(pipeline, device)
        processor = StillProcessor.from_pretrained(pipeline / "processor")
        return self.pipeline_class(**parts, processor=processor, scheduler=None, vae=None, transformer=None)

    @torch.no_grad()
    def encode_text(self, encoder: Any, caption: str, controls: Sequence[ControlPicture] = ()) -> Encoded:
        """`embeds` (L, D) in the encoder's precision, of caption and pictures; the pipelines cut nothing."""
        seen = [control.picture.resize(self.seen_size(control)[::-1], Image.Resampling.LANCZOS) for control in controls]
        embeds, _ = encoder.encode_prompt(caption, image=seen, device=encoder.text_encoder.device)
        return {"embeds": embeds[0].cpu()}

    def seen_size(self, control: ControlPicture) -> Size:
        """The size in which the text encoder sees a control picture, before its processor's own scaling."""
        return control.size

    def is_cut(self, encoded: Encoded) -> bool:
        """Never."""
        return False


class QwenImageEditPlus(QwenImageEdit):
    """The recipe of Qwen-Image-Edit-2509 and -2511: several pictures, which the text encoder sees smaller.

    2511's transformer treats the tokens of control pictures as free of noise (`zero_cond_t`), and finds them by itself.
    """

    name = "qwen_image_edit_plus"
    pipelines = ("QwenImageEditPlusPipeline",)
    controls = (1, MANY)
    pipeline_class = QwenImageEditPlusPipeline

    def seen_size(self, control: ControlPicture) -> Size:
        """An area of 384 x 384."""
        return _sized((control.picture.height, control.picture.width), CONDITION_IMAGE_SIZE)


class StillProcessor(Qwen2VLProcessor):  # type: ignore[misc]  # transformers is untyped
    """`Qwen2VLProcessor` without its part for videos, which needs torchvision and is not asked for anything here."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None, **rest: Any):
        super().__init__(image_processor, tokenizer, None, chat_template=chat_template, **rest)


def _sized(picture: Size, area: int) -> Size:
    """(height, width) of that area in the shape of `picture`, as `calculate_dimensions` of the pipelines."""
    ratio = picture[1] / picture[0]
    width = math.sqrt(area * ratio)
    height, width = round(width / ratio / STEP) * STEP, round(width / STEP) * STEP
    if not (height and width) or max(picture) > LONGEST_RATIO * min(picture):
        raise ValueError(f"is {picture[1]}x{picture[0]} pixels; one side is too short for the other")
    return height, width
