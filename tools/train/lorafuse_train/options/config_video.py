"""The options of videos, and of models with two experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from lorafuse_train.options.entry import BASE, DATA, ONE_OR_MORE, POSITIVE, Entry


@dataclass(frozen=True, kw_only=True)
class VideoOptions:
    """How much of a video is seen, and which transformer is trained."""

    component: Annotated[
        str | None,
        Entry(
            BASE,
            (
                "Which transformer of the pipeline is trained: of Wan 2.2 A14B's two experts transformer (high noise "
                "levels) or transformer_2 (low ones). Default: the one that was fused, else transformer."
            ),
            choices=("transformer", "transformer_2"),
        ),
    ] = None
    num_frames: Annotated[
        int | None,
        Entry(
            DATA,
            (
                "Frames of every video, 4n + 1 of them, from its first on; videos with fewer are an error. "
                "Default: as many as there are, up to 81."
            ),
            bounds=ONE_OR_MORE,
        ),
    ] = None
    frame_rate: Annotated[
        float | None,
        Entry(
            DATA,
            (
                "Take so many frames a second of a video file, such as 16 for Wan and 24 for Wan 2.2 TI2V-5B. "
                "Default: all of them; a folder's frames are always taken as they are."
            ),
            bounds=POSITIVE,
        ),
    ] = None
