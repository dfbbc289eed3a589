"""Drawn videos as files that play anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafuse_train.atomic import write_atomically

USUAL_RATE = 16.0
"""Frames a second of Wan's videos."""


def film_path(sheet: Path, column: int) -> Path:
    """Where the film of a column of a grid lies: samples-1.mp4 beside samples.png."""
    return sheet.with_name(f"{sheet.stem}-{column + 1}.mp4")


def write_film(path: Path, videos: Sequence[Tensor], rate: float) -> None:
    """Videos (3, F, H, W) in -1..1 of one size, side by side and playing together, as H.264."""
    whole = torch.cat([*videos], dim=-1).clamp(-1, 1)
    frames = ((whole + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0)  # (F, H, W, 3)
    write_atomically(path, lambda file: _encode(file, frames, rate))


def _encode(file: Path, frames: Tensor, rate: float) -> None:
    import av  # only videos need it

    with av.open(str(file), "w", format="mp4") as container:
        stream: Any = container.add_stream("libx264", rate=Fraction(rate).limit_denominator(1000))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "14"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.contiguous().numpy(), format="rgb24")))
        container.mux(stream.encode())
