"""Masks: cut as their pictures are, averaged onto the latents, and refused where they cannot be what was meant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lorafuse_common.errors import DatasetError
from lorafuse_train.dataset.data import Sample, read_dataset
from lorafuse_train.dataset.masks import Masks, read_masks
from lorafuse_train.dataset.pictures import Geometry
from lorafuse_train.options.options import resolve_config


def save(folder: Path, rows: dict[str, Image.Image | None], size: tuple[int, int] = (64, 32)) -> None:
    """Pictures, each with a mask file where one is given."""
    lines = ["image,prompt,mask"]
    for name, mask in rows.items():
        Image.new("RGB", size, "navy").save(folder / f"{name}.png")
        if mask:
            mask.save(folder / f"{name}-mask.png")
        lines.append(f"{name}.png,a {name},{f'{name}-mask.png' if mask else ''}")
    (folder / "metadata.csv").write_text("\n".join(lines))


def read(folder: Path, **given: Any) -> tuple[list[Sample], Masks | None]:
    options = {"fused_model": "x", "dataset_base_path": str(folder), "output_path": "x", "masked_loss": "mask", **given}
    config = resolve_config(options)
    fixed = (config.height, config.width) if config.height and config.width else None
    samples = read_dataset(config, Geometry(8, config.max_pixels, fixed))
    return samples, read_masks(config, samples, lambda size: (size[0] // 4, size[1] // 4))


def white_left(size: tuple[int, int], share: float = 0.5) -> Image.Image:
    mask = np.zeros((size[1], size[0]), dtype=np.uint8)
    mask[:, : int(size[0] * share)] = 255
    return Image.fromarray(mask)


def test_a_mask_becomes_the_share_of_white_in_every_latent(tmp_path: Path) -> None:
    save(tmp_path, {"a": white_left((64, 32), 26 / 64), "b": None})
    samples, masks = read(tmp_path, masked_loss_background=0.2)
    assert masks
    weights = masks.weights(samples)
    assert weights.shape == (2, 8, 16)
    expected = torch.tensor([1.0] * 6 + [0.5] + [0.0] * 9)
    assert torch.allclose(weights[0], 0.2 + 0.8 * expected.expand(8, 16), atol=0.003)
    assert (weights[1] == 1).all()
    assert masks.weights(samples[1:]).shape == (1, 1, 1)
    assert read(tmp_path, masked_loss=None)[1] is None


def test_a_mask_is_cut_as_its_picture_is(tmp_path: Path) -> None:
    """Cut to a square: the middle of the picture, and of a mask of another resolution."""
    save(tmp_path, {"a": white_left((128, 64))})
    samples, masks = read(tmp_path, height=32, width=32)
    assert masks
    assert (masks.grids[samples[0]] - torch.tensor([255] * 4 + [0] * 4)).abs().max() < 10


def test_transparency_is_a_mask(tmp_path: Path) -> None:
    picture = Image.new("RGBA", (32, 32), "red")
    picture.putalpha(white_left((32, 32)))
    picture.save(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("image,prompt\na.png,a square\n")
    samples, masks = read(tmp_path, masked_loss="alpha")
    assert masks and masks.grids[samples[0]].tolist() == [[255] * 4 + [0] * 4] * 8
    picture.convert("RGB").save(tmp_path / "a.png")
    with pytest.raises(DatasetError, match=r"a\.png: has no transparency"):
        read(tmp_path, masked_loss="alpha")


def test_every_fault_at_once(tmp_path: Path) -> None:
    save(tmp_path, {"tall": white_left((32, 64)), "black": Image.new("L", (64, 32)), "lost": white_left((64, 32)),
                    "broken": white_left((64, 32)), "good": white_left((32, 16))})  # fmt: skip
    (tmp_path / "lost-mask.png").unlink()
    (tmp_path / "broken-mask.png").write_bytes(b"no picture")
    with pytest.raises(DatasetError) as caught:
        read(tmp_path)
    message = str(caught.value)
    for part in (
        "3 faults:",
        f"row 1 (line 2): mask {tmp_path}/tall-mask.png: is 32x64; expected the shape of tall.png, which is 64x32",
        f"row 3 (line 4): mask {tmp_path}/lost-mask.png: no such file",
        f"row 4 (line 5): mask {tmp_path}/broken-mask.png: cannot be decoded",
    ):
        assert part in message
    assert "good" not in message
    for name in ("tall", "lost", "broken"):
        white_left((64, 32)).save(tmp_path / f"{name}-mask.png")
    with pytest.raises(DatasetError) as caught:
        read(tmp_path)
    message = str(caught.value)
    assert "--masked_loss mask: 1 fault:" in message
    assert "black-mask.png: is black everywhere; nothing of black.png would be learned" in message
    with pytest.raises(DatasetError, match="--masked_loss masks: no row has a mask there"):
        read(tmp_path, masked_loss="masks")


def test_another_mask_is_another_training(tmp_path: Path) -> None:
    save(tmp_path, {"a": white_left((64, 32))})
    before = read(tmp_path)[1]
    save(tmp_path, {"a": white_left((64, 32), 0.25)})
    after = read(tmp_path)[1]
    assert before and after and before.sha256 != after.sha256
