"""Which parts of a picture are learned: masks as weights on the grid of its latents."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from lorafuse_common.errors import DatasetError
from lorafuse_train.dataset.data import FaultyDataset, Sample
from lorafuse_train.dataset.pictures import UNDECODABLE, WITH_ALPHA, open_picture
from lorafuse_train.options.config import TrainConfig
from lorafuse_train.options.config_training import ALPHA

Grid: TypeAlias = Callable[[tuple[int, int]], tuple[int, int]]
"""(height, width) of a picture -> that of its latents."""


@dataclass(frozen=True, slots=True)
class Masks:
    """The masks of a dataset."""

    background: float
    """The weight outside of them."""
    grids: Mapping[Sample, Tensor]
    """(h, w), uint8, 255 inside; samples without a mask are absent."""
    sha256: str

    def weights(self, samples: Sequence[Sample]) -> Tensor:
        """(B, h, w) of samples of one size, fp32; 1 everywhere where a sample has no mask."""
        shape = next((grid.shape for sample in samples if (grid := self.grids.get(sample)) is not None), (1, 1))
        whole = torch.full(shape, 255, dtype=torch.uint8)
        inside = torch.stack([self.grids.get(sample, whole) for sample in samples]).float() / 255
        return self.background + (1 - self.background) * inside


def masked(config: TrainConfig, samples: Sequence[Sample]) -> list[Sample]:
    """Those of the samples that have a mask, of the kind that the options ask for."""
    if config.masked_loss is None:
        return []
    return [sample for sample in samples if config.masked_loss == ALPHA or sample.mask]


def read_masks(config: TrainConfig, samples: Sequence[Sample], grid: Grid) -> Masks | None:
    """Read the mask of every sample; None where the options ask for none.

    Raises:
        FaultyDataset: masks cannot be used; all of them.
        DatasetError: there is none.
    """
    if config.masked_loss is None:
        return None
    having = masked(config, samples)
    if not having:
        raise DatasetError(f"--masked_loss {config.masked_loss}: no row has a mask there; expected a file's name")

    def read(sample: Sample) -> Tensor | str:
        if sample.excerpt:
            return f"{sample.path}: is a video; masks are for pictures"
        try:
            found = _read(sample, grid(sample.size))
        except (OSError, ValueError) as error:
            return f"{sample.mask or sample.path}: {error}"
        if not config.masked_loss_background and not found.any():
            return f"{sample.mask or sample.path}: is black everywhere; nothing of {sample.path.name} would be learned"
        return found

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        grids = dict(zip(having, pool.map(read, having), strict=True))
    faults = [fault for fault in grids.values() if isinstance(fault, str)]
    if faults:
        raise FaultyDataset(f"--masked_loss {config.masked_loss}", faults)
    good = {sample: found for sample, found in grids.items() if isinstance(found, Tensor)}
    digest = hashlib.sha256(b"".join(found.numpy().tobytes() for found in good.values())).hexdigest()
    return Masks(config.masked_loss_background, good, digest)


def _read(sample: Sample, grid: tuple[int, int]) -> Tensor:
    """A mask, cut and scaled as its picture is, each latent weighted by the share of white in it."""
    if sample.mask is None:
        mask = _alpha(sample.path.read_bytes())
    else:
        mask = open_picture(sample.mask.read_bytes()).convert("L")
    height, width = sample.size
    fitted = ImageOps.fit(mask, (width, height), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(fitted.resize((grid[1], grid[0]), Image.Resampling.BOX)))


def _alpha(raw: bytes) -> Image.Image:
    try:
        with Image.open(io.BytesIO(raw)) as file:
            file.load()
            upright = ImageOps.exif_transpose(file)
    except UNDECODABLE as error:
        raise ValueError(f"cannot be decoded ({error})") from error
    if upright.mode not in WITH_ALPHA and "transparency" not in upright.info:
        raise ValueError("has no transparency")
    return upright.convert("RGBA").getchannel("A")
