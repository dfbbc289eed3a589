"""One video, a file or a folder of frames: its upright RGB pictures, at the rate and in the number it trains at."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import av
import torch
from PIL import Image
from torch import Tensor

from lorafuse_train.dataset.pictures import SUFFIXES as PICTURE_SUFFIXES
from lorafuse_train.dataset.pictures import open_picture, to_pixels

FRAME_STEP = 4
"""Videos have 4n + 1 frames: every model so far has a VAE that makes one latent frame of the first, then of each 4."""
MOST_FRAMES = 81
"""Of a video where nothing was said: what Wan is made for."""
LATE = 1e-3
"""Seconds by which a frame may be late and still be the one shown at a time; containers round to milliseconds."""


@dataclass(frozen=True, slots=True)
class Clip:
    """What the frames of a video are, once they are upright and at the rate that was asked for."""

    frames: int
    """How many there are, counted no further than was asked."""
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Which frames of a video a training sees."""

    frames: int | None = None
    """How many, counted from the first; None: as many of 81, 77, ... as there are."""
    rate: float | None = None
    """Frames a second that are taken of a file; None: all of them. A folder's frames are at that rate already."""

    def __post_init__(self) -> None:
        assert self.frames is None or self.frames % FRAME_STEP == 1

    @property
    def most(self) -> int:
        """The frames that are looked at."""
        return self.frames or MOST_FRAMES

    def of(self, found: int) -> int:
        """The frames to train on where `found` were found.

        Raises:
            ValueError: they are too few.
        """
        if self.frames is None:
            return (found - 1) // FRAME_STEP * FRAME_STEP + 1
        if found < self.frames:
            at = f" at {self.rate:g} frames a second" if self.rate else ""
            raise ValueError(f"has {found} frames{at}; --num_frames asks for {self.frames}")
        return self.frames


def probe_video(path: Path, timing: Timing) -> Clip:
    """Decode the frames that are needed, and read the rest of the file.

    Raises:
        ValueError: it is no video, damaged, ends early, has frames of several sizes or none.
        OSError: it cannot be read.
    """
    sizes = [(frame.height, frame.width) for frame in read_frames(path, timing.most, timing.rate)]
    if not sizes:
        raise ValueError("has no frames")
    if len(set(sizes)) > 1:
        number = next(number for number, size in enumerate(sizes, 1) if size != sizes[0])
        first, other = (f"{width}x{height}" for height, width in (sizes[0], sizes[number - 1]))
        raise ValueError(f"its frames differ in size: frame 1 is {first}, frame {number} is {other}")
    if path.is_file():
        _require_whole(path)
    return Clip(len(sizes), *sizes[0])


def video_pixels(path: Path, frames: int, rate: float | None, size: tuple[int, int]) -> Tensor:
    """(3, F, H, W) in -1..1, fp32: the first `frames`, each scaled and cut to `size` (height, width) as a picture is.

    Raises:
        ValueError: it cannot be decoded, or has fewer.
    """
    pixels = [to_pixels(frame, size) for frame in read_frames(path, frames, rate)]
    if len(pixels) < frames:
        raise ValueError(f"has {len(pixels)} frames, expected {frames}")
    return torch.stack(pixels, 1)


def read_frames(path: Path, most: int, rate: float | None = None) -> Iterator[Image.Image]:
    """The first `most` frames, upright and RGB; of a file at `rate` a second, of a folder as they are.

    Raises:
        ValueError: no video, or damaged before its end; names the frame of a folder.
        OSError: it cannot be read.
    """
    found = _folder_frames(path) if path.is_dir() else _file_frames(path, rate)
    for _, frame in zip(range(most), found, strict=False):
        yield frame


def frame_paths(folder: Path) -> list[Path]:
    """The pictures of a folder in the order of the numbers in their names: frame_2 before frame_10."""
    found = [p for p in folder.iterdir() if p.suffix.lower() in PICTURE_SUFFIXES and not p.name.startswith(".")]
    return sorted(found, key=lambda path: _natural(path.name))


def video_sha256(path: Path) -> str:
    """Of the bytes of a file, or of those of a folder's frames in their order."""
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for frame in frame_paths(path):
        digest.update(hashlib.sha256(frame.read_bytes()).digest())
    return digest.hexdigest()


def _natural(name: str) -> list[tuple[int, str]]:
    parts = re.split(r"(\d+)", name.lower())
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _folder_frames(folder: Path) -> Iterator[Image.Image]:
    for path in frame_paths(folder):
        try:
            yield open_picture(path.read_bytes())
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from error


def _file_frames(path: Path, rate: float | None) -> Iterator[Image.Image]:
    frames = _decoded(path)
    for frame in frames if rate is None else _at_rate(frames, rate):
        picture = Image.fromarray(frame.to_ndarray(format="rgb24"))
        # What a phone that was held upright records lies on its side, and says by how much.
        yield picture.rotate(frame.rotation, expand=True) if frame.rotation else picture


def _decoded(path: Path) -> Iterator[av.VideoFrame]:
    with path.open("rb"):  # for an ordinary error where there is none, or it may not be read
        pass
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError("has no video in it")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield from container.decode(stream)
    except av.FFmpegError as error:
        raise ValueError(f"cannot be decoded ({error.strerror})") from error


def _at_rate(frames: Iterable[av.VideoFrame], rate: float) -> Iterator[av.VideoFrame]:
    """What is on the screen at 0, 1/rate, 2/rate, ... seconds after the first frame."""
    shown, start, count = None, 0.0, 0
    for frame in frames:
        if frame.time is None:
            raise ValueError("has frames without a time; leave --frame_rate out, or convert it to another container")
        if shown is None:
            start = frame.time
        else:
            while start + count / rate + LATE < frame.time:
                yield shown
                count += 1
        shown = frame
    if shown is not None:
        stated = float(shown.duration * shown.time_base) if shown.duration and shown.time_base else 0.0
        lasting = max(stated, 2 * LATE)
        while start + count / rate + LATE < shown.time + lasting:
            yield shown
            count += 1


def _require_whole(path: Path) -> None:
    """Read all packets without decoding them.

    Raises:
        ValueError: the file ends before its container says.
    """
    last = 0.0
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    raise ValueError("is damaged, or ends early")
                if packet.pts is not None and packet.time_base:
                    last = max(last, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            seconds = _stated_seconds(stream)
    except av.FFmpegError as error:
        raise ValueError(f"is damaged, or ends early ({error.strerror})") from error
    if seconds and last < 0.9 * seconds - 0.5:
        raise ValueError(f"ends early: after {last:.1f} of {seconds:.1f} seconds")


def _stated_seconds(stream: av.VideoStream) -> float | None:
    """How long the video is by its container's own account; None where it does not say."""
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    found = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    return int(found[1]) * 3600 + int(found[2]) * 60 + float(found[3]) if found else None
