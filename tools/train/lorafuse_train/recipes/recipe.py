"""What the trainer asks of a family: encode, predict, decode, all in one convention.

The convention: latents `x0` are normalised and unpacked, (C, h, w); `sigma = 1` is noise and
`x = (1 - sigma) x0 + sigma eps`; the model predicts `v = eps - x0`. A family's own sign, timestep scale, packing,
position ids, masks and guidance live in its recipe and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

Encoded: TypeAlias = Mapping[str, Tensor]
"""What a text encoder says of one caption, unpadded; the recipe that made it knows the names."""
Condition: TypeAlias = Mapping[str, Tensor]
"""Several `Encoded` collated into one batch."""


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

    def latent_shape(self, pipeline: Path, height: int, width: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a picture of `height` x `width` pixels."""

    def load_vae(self, pipeline: Path, device: torch.device) -> nn.Module:
        """The VAE, ready to encode and decode."""

    def encode_image(self, vae: Any, pixels: Tensor) -> Tensor:
        """Pixels (3, H, W) in -1..1, fp32 -> x0 (C, h, w), fp32: the mean of the posterior, normalised."""

    def decode(self, vae: Any, x0: Tensor) -> Tensor:
        """x0 (C, h, w) -> pixels (3, H, W) in -1..1, fp32."""

    def load_text_encoder(self, pipeline: Path, device: torch.device) -> Any:
        """What `encode_text` needs, in the precision it is stored in."""

    def encode_text(self, encoder: Any, caption: str) -> Encoded:
        """One caption, as the family's pipeline encodes it."""

    def is_cut(self, encoded: Encoded) -> bool:
        """Whether a caption is as long as the family's pipeline reads, so that its end may be missing."""

    def collate(self, captions: Sequence[Encoded]) -> Condition:
        """Pad and mask so that a caption's prediction does not depend on its neighbours in the batch."""

    def predict(self, transformer: Any, x: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """v (B, C, h, w), fp32, for x (B, C, h, w) at the noise levels sigma (B,).

        A model that embeds guidance is told `condition["guidance"]` (B,); 1 where there is none, as in training.
        """

    def guidance(self, pipeline: Path, config: Mapping[str, Any]) -> Guidance:
        """How the transformer with this config.json is guided in that pipeline."""

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance of two predictions (B, C, h, w), as the family's pipeline combines them."""

    def guidance_arguments(self, scale: float) -> str:
        """How a call of the family's pipeline asks for that guidance, as Python text."""

    def sigmas(self, pipeline: Path, steps: int, latent: tuple[int, int, int]) -> tuple[float, ...]:
        """The noise levels that the pipeline visits in `steps` steps at a latent size, without the final 0."""

    def shift(self, pipeline: Path, latent: tuple[int, int, int]) -> float:
        """s in `sigma = s u / (1 + (s - 1) u)`, as the pipeline's scheduler shifts at a latent size."""
