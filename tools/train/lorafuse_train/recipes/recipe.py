"""What the trainer asks of a family: encode, predict, decode, all in one convention.

The convention: latents `x0` are normalised and unpacked, (C, h, w), or (C, f, h, w) where the family draws videos;
`sigma = 1` is noise and `x = (1 - sigma) x0 + sigma eps`; the model predicts `v = eps - x0`. A family's own sign,
timestep scale, packing, position ids, masks, guidance and use of control pictures live in its recipe and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from PIL import Image
from torch import Tensor, nn

Encoded: TypeAlias = Mapping[str, Tensor]
"""What the encoders say of one caption and its control pictures, unpadded; the recipe that made it knows the names."""
Condition: TypeAlias = Mapping[str, Tensor]
"""Several `Encoded` collated into one batch."""
Size: TypeAlias = tuple[int, int]
"""(height, width) in pixels."""
Shape: TypeAlias = tuple[int, int, int]
"""(frames, height, width) of what is drawn; a picture has 1 frame."""
Latent: TypeAlias = tuple[int, ...]
"""(C, h, w), or (C, f, h, w) where the family draws videos."""


class ControlPicture(NamedTuple):
    """A picture that the model is shown: what to edit, a reference, or the first frame of a video."""

    picture: Image.Image
    """Upright RGB, in its own size."""
    size: Size
    """What `Recipe.control_size` chose for it."""


class Guidance(StrEnum):
    """How a model follows a guidance scale other than 1."""

    CFG = "CFG"
    """By a second prediction, for the negative prompt; `Recipe.guide` combines the two."""
    EMBEDDED = "embedded"
    """It is told the scale as it is told sigma, in `condition["guidance"]`, and predicts once."""
    NONE = "none"
    """Not at all; its pipeline ignores the scale."""


class Recipe(Protocol):
    """One trainable family."""

    @property
    def family(self) -> str:
        """Its name in `lorafuse_common.families`."""

    @property
    def name(self) -> str:
        """Its own name, where a family has several recipes; part of every cache key."""

    @property
    def pipelines(self) -> tuple[str, ...]:
        """The classes in a model_index.json that it trains for, none of them another recipe's of the family."""

    @property
    def version(self) -> int:
        """Raised whenever `encode_image` or `encode_text` would give other numbers; part of every cache key."""

    @property
    def text_parts(self) -> tuple[str, ...]:
        """Folders of the pipeline that `encode_text` depends on."""

    @property
    def optional_parts(self) -> tuple[str, ...]:
        """Those of `text_parts` that a pipeline may be without, if its model_index.json says so."""

    def pixel_multiple(self, pipeline: Path) -> int:
        """What height and width must be multiples of."""

    def latent_shape(self, pipeline: Path, height: int, width: int, frames: int = 1) -> Latent:
        """The shape of the latents of `frames` frames of `height` x `width` pixels."""

    @property
    def frame_step(self) -> int:
        """A video has 1 + n * frame_step frames; 0 where the family draws pictures, without a frame dimension."""

    @property
    def controls(self) -> tuple[int, int]:
        """The least and the most control pictures that a sample may have."""

    @property
    def first_frame_control(self) -> bool:
        """Whether a video's own first frame is its control picture where the dataset names no other."""

    @property
    def text_sees_controls(self) -> bool:
        """Whether `encode_text` looks at the control pictures."""

    def control_size(self, pipeline: Path, picture: Size, target: Size, max_pixels: int) -> Size:
        """The size in which the VAE sees a control picture of size `picture` beside a `target`.

        `max_pixels` stands for the area that the family's pipeline would scale it to; 0 where it is too small.
        """

    def load_vae(self, pipeline: Path, device: torch.device) -> nn.Module:
        """The VAE, ready to encode and decode."""

    def encode_image(self, vae: Any, pixels: Tensor) -> Tensor:
        """Pixels in -1..1, fp32 -> x0, fp32: the mean of the posterior, normalised.

        (3, H, W) -> (C, h, w), or (3, F, H, W) -> (C, f, h, w) where the family draws videos.
        """

    def encode_controls(self, vae: Any, controls: Sequence[ControlPicture], shape: Shape) -> Encoded:
        """What the VAE says of the control pictures of one sample of that shape; names differ from `encode_text`'s."""

    def decode(self, vae: Any, x0: Tensor) -> Tensor:
        """The inverse of `encode_image`: pixels in -1..1, fp32."""

    def load_text_encoder(self, pipeline: Path, device: torch.device) -> Any:
        """What `encode_text` needs, in the precision it is stored in."""

    def encode_text(self, encoder: Any, caption: str, controls: Sequence[ControlPicture] = ()) -> Encoded:
        """One caption, as the family's pipeline encodes it; with its controls, where `text_sees_controls`."""

    def is_cut(self, encoded: Encoded) -> bool:
        """Whether a caption is as long as the family's pipeline reads, so that its end may be missing."""

    def collate(self, captions: Sequence[Encoded]) -> Condition:
        """Pad and mask so that a sample's prediction does not depend on its neighbours in the batch.

        Each holds what `encode_text` gave and, where the sample has controls, what `encode_controls` gave; all samples
        of a batch have as many controls of the same sizes.
        """

    def predict(self, transformer: Any, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """v, fp32, for x (B, C, h, w) or (B, C, f, h, w) of the same shape at the noise levels sigma (B,).

        A model that embeds guidance is told `condition["guidance"]` (B,); 1 where there is none, as in training.
        """

    def guidance(self, pipeline: Path, config: Mapping[str, Any]) -> Guidance:
        """How the transformer with this config.json is guided in that pipeline."""

    def default_guidance(self, pipeline: Path, config: Mapping[str, Any]) -> float:
        """The scale (1: none) at which that pipeline draws where it is told none."""

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance of two predictions of one shape, as the family's pipeline combines them."""

    def guidance_arguments(self, scale: float) -> str:
        """How a call of the family's pipeline asks for that guidance, as Python text."""

    def size_arguments(self, height: int, width: int) -> str:
        """How a call of the family's pipeline asks for a size, as Python text."""

    def sigmas(self, pipeline: Path, steps: int, latent: Latent) -> tuple[float, ...]:
        """The noise levels that the pipeline visits in `steps` steps at a latent size, without the final 0."""

    def shift(self, pipeline: Path, latent: Latent) -> float:
        """s in `sigma = s u / (1 + (s - 1) u)`, as the pipeline's scheduler shifts at a latent size."""


def latent_shape(recipe: Recipe, pipeline: Path, shape: Shape) -> Latent:
    """`Recipe.latent_shape` of what is drawn."""
    frames, height, width = shape
    return recipe.latent_shape(pipeline, height, width, frames)


class TextOnly:
    """What most families have in common, to be inherited: they draw pictures, from text alone."""

    frame_step: int = 0
    controls: tuple[int, int] = (0, 0)
    first_frame_control: bool = False
    text_sees_controls: bool = False

    def control_size(self, pipeline: Path, picture: Size, target: Size, max_pixels: int) -> Size:
        """Never asked."""
        raise AssertionError("this family takes no control pictures")

    def encode_controls(self, vae: Any, controls: Sequence[ControlPicture], shape: Shape) -> Encoded:
        """Nothing to say."""
        return {}

    def size_arguments(self, height: int, width: int) -> str:
        """As nearly all pipelines take it."""
        return f"height={height}, width={width}"

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """n + scale (p - n), as nearly all pipelines combine them."""
        return negative + scale * (positive - negative)
