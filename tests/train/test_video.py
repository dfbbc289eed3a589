"""Videos as files and as folders of frames: what is read of them, and what is said of those that cannot be used."""

from __future__ import annotations

import csv
import struct
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from train import tiny_wan

from lorafuse_common.errors import ConfigError, DatasetError
from lorafuse_train.dataset.data import Sample, read_dataset
from lorafuse_train.dataset.pictures import Geometry, to_pixels
from lorafuse_train.dataset.video import Clip, Timing, frame_paths, probe_video, read_frames, video_pixels, video_sha256
from lorafuse_train.options.config import TrainConfig
from lorafuse_train.options.options import resolve_config
from lorafuse_train.samples.film import write_film

GEOMETRY = Geometry(16, 64 * 64, None, frame_step=4)


def shades(count: int, size: tuple[int, int] = (32, 32)) -> list[Image.Image]:
    """Frames that can be told apart by their grey: frame n is 8 n."""
    return [Image.new("RGB", size, (8 * n,) * 3) for n in range(count)]


def numbers(frames: Any) -> list[int]:
    """Which of the `shades` these are."""
    return [round(float(np.asarray(frame).mean()) / 8) for frame in frames]


def save_timed(path: Path, times: list[float], base: int = 1000) -> Path:
    """A video whose frame n, the n-th of the shades, is shown from `times[n]` seconds on."""
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=base)
        stream.width = stream.height = 32
        stream.pix_fmt, stream.time_base, stream.codec_context.time_base = (
            "yuv444p",
            Fraction(1, base),
            Fraction(1, base),
        )
        stream.options = {"crf": "1", "bf": "0"}
        for picture, time in zip(shades(len(times)), times, strict=True):
            frame = av.VideoFrame.from_ndarray(np.asarray(picture), format="rgb24")
            frame.pts, frame.time_base = round(time * base), Fraction(1, base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", "libx264"), (".mkv", "libx264"), (".webm", "libvpx-vp9")])
def test_a_file_gives_its_frames_in_order(tmp_path: Path, suffix: str, codec: str) -> None:
    path = tiny_wan.save_video(tmp_path / f"a{suffix}", shades(12), codec=codec)
    assert numbers(read_frames(path, 81)) == [*range(12)]
    assert numbers(read_frames(path, 5)) == [*range(5)]
    assert probe_video(path, Timing()) == Clip(12, 32, 32)
    assert probe_video(path, Timing(5)) == Clip(5, 32, 32)


def test_a_folder_gives_its_frames_by_number(tmp_path: Path) -> None:
    """frame_2 before frame_10, whatever lies beside them."""
    folder = tiny_wan.save_folder(tmp_path / "a", shades(12))
    (folder / "notes.txt").write_text("no frame")
    (folder / ".hidden.png").write_bytes(b"no frame")
    assert numbers(read_frames(folder, 81)) == [*range(12)]
    assert [path.name for path in frame_paths(folder)][:3] == ["frame_0.png", "frame_1.png", "frame_2.png"]
    assert probe_video(folder, Timing()) == Clip(12, 32, 32)
    assert numbers(read_frames(folder, 81, rate=3.0)) == [*range(12)]  # at that rate already


@pytest.mark.parametrize(
    ("times", "rate", "expected"),
    [
        ([n / 16 for n in range(12)], 16.0, [*range(12)]),
        ([n / 16 for n in range(12)], 8.0, [0, 2, 4, 6, 8, 10]),
        ([n / 24 for n in range(12)], 16.0, [0, 1, 3, 4, 6, 7, 9, 10]),
        ([n / 8 for n in range(4)], 16.0, [0, 0, 1, 1, 2, 2, 3]),
        ([0.0, 0.1, 0.5, 0.6], 10.0, [0, 1, 1, 1, 1, 2, 3]),  # a variable rate
        ([2.0, 2.1, 2.2], 10.0, [0, 1, 2]),  # that does not begin at 0
    ],
)
def test_a_rate_takes_what_is_on_the_screen(
    tmp_path: Path, times: list[float], rate: float, expected: list[int]
) -> None:
    path = save_timed(tmp_path / "a.mkv", times)
    found = numbers(read_frames(path, 81, rate))
    # How long the last frame stays is the container's word.
    assert found[: len(expected)] == expected
    assert {*found[len(expected) :]} <= {expected[-1]}
    assert numbers(read_frames(path, 2, rate)) == expected[:2]


def test_pixels_are_those_of_pictures(tmp_path: Path) -> None:
    frames = tiny_wan.frames(9, (48, 40))
    folder = tiny_wan.save_folder(tmp_path / "a", frames)
    pixels = video_pixels(folder, 5, None, (32, 32))
    assert pixels.shape == (3, 5, 32, 32)
    assert torch.equal(pixels[:, 3], to_pixels(frames[3], (32, 32)))
    file = tiny_wan.save_video(tmp_path / "a.mp4", frames)
    assert (video_pixels(file, 5, None, (32, 32)) - pixels).abs().mean() < 0.02
    with pytest.raises(ValueError, match="has 9 frames, expected 13"):
        video_pixels(file, 13, None, (32, 32))


@pytest.mark.parametrize(("degrees", "matrix"), [(90, (0, 1, -1, 0)), (180, (-1, 0, 0, -1)), (270, (0, -1, 1, 0))])
def test_what_a_phone_recorded_lying_down_is_set_upright(
    tmp_path: Path, degrees: int, matrix: tuple[int, int, int, int]
) -> None:
    """`matrix` is a track header's: of a picture that is to be turned by so many degrees clockwise."""
    upright = Image.new("RGB", (48, 32), "navy")
    upright.paste("red", (0, 0, 16, 16))
    lying = upright.rotate(degrees, expand=True)
    path = tiny_wan.save_video(tmp_path / "a.mp4", [lying] * 3)
    raw = bytearray(path.read_bytes())
    at = raw.index(b"tkhd") + 4 + 40
    a, b, c, d = (value * 65536 for value in matrix)
    raw[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 0x40000000)
    path.write_bytes(raw)
    (first,) = read_frames(path, 1)
    assert first.size == (48, 32)
    assert np.abs(np.asarray(first).astype(int) - np.asarray(upright)).mean() < 6
    assert probe_video(path, Timing()) == Clip(3, 32, 48)


def test_content_is_told_apart(tmp_path: Path) -> None:
    one, other = (tiny_wan.save_folder(tmp_path / name, shades(3)) for name in ("a", "b"))
    assert video_sha256(one) == video_sha256(other)
    Image.new("RGB", (32, 32), "red").save(other / "frame_1.png")
    assert video_sha256(one) != video_sha256(other)


@pytest.mark.parametrize("keep", [0.4, 0.8])
@pytest.mark.parametrize("early", [True, False])
def test_a_file_that_ends_early_is_reported(tmp_path: Path, keep: float, early: bool) -> None:
    """With the index before the frames all seems well until one is missing; with it behind them there is none."""
    path = tmp_path / "a.mp4"
    noise = np.random.default_rng(0)
    with av.open(str(path), "w", options={"movflags": "faststart"} if early else {}) as container:
        stream: Any = container.add_stream("libx264", rate=16)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for _ in range(40):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(noise.integers(0, 255, (64, 64, 3), np.uint8))))
        container.mux(stream.encode())
    assert probe_video(path, Timing(5)).frames == 5
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * keep)])
    with pytest.raises(ValueError, match=r"damaged, or ends early|cannot be decoded|ends early"):
        probe_video(path, Timing(5))


def dataset(folder: Path, rows: list[tuple[str, str]], column: str = "video") -> Path:
    with (folder / "metadata.csv").open("w", newline="") as file:
        csv.writer(file).writerows([(column, "prompt"), *rows])
    return folder


def options(folder: Path, **more: Any) -> TrainConfig:
    return resolve_config({"fused_model": "x", "dataset_base_path": str(folder), "output_path": "x", **more})


def test_videos_train_at_4n_plus_1_frames(tmp_path: Path) -> None:
    tiny_wan.save_video(tmp_path / "a.mp4", shades(12, (64, 48)))
    tiny_wan.save_folder(tmp_path / "b", shades(5))
    tiny_wan.save_video(tmp_path / "c.mp4", shades(90))
    Image.new("RGB", (32, 32)).save(tmp_path / "d.png")
    folder = dataset(tmp_path, [("a.mp4", "a"), ("b", "b"), ("c.mp4", "c")])
    found: list[Sample] = read_dataset(options(folder), GEOMETRY)
    assert [sample.shape for sample in found] == [(9, 48, 64), (5, 32, 32), (81, 32, 32)]
    found = read_dataset(options(folder, frame_rate="8"), GEOMETRY)
    assert [sample.frames for sample in found] == [5, 5, 45]  # a folder's are taken as they are
    found = read_dataset(options(folder, num_frames="5"), GEOMETRY)
    assert len({sample.sha256 for sample in found}) == 3
    assert {sample.frames for sample in found} == {5}


def test_every_video_that_cannot_be_used_is_listed(tmp_path: Path) -> None:
    tiny_wan.save_video(tmp_path / "short.mp4", shades(8))
    tiny_wan.save_folder(tmp_path / "mixed", [*shades(5), *shades(4, (48, 32))])
    tiny_wan.save_folder(tmp_path / "broken", shades(9))
    (tmp_path / "broken" / "frame_3.png").write_bytes(b"nothing")
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.mp4").write_text("nothing")
    names = ["short.mp4", "mixed", "broken", "empty", "text.mp4", "absent.mp4"]
    folder = dataset(tmp_path, [(name, name) for name in names])
    with pytest.raises(DatasetError) as caught:
        read_dataset(options(folder, num_frames="9"), GEOMETRY)
    said = str(caught.value).splitlines()
    assert "6 faults" in said[0]
    for line, expected in zip(
        said[1:],
        [
            "row 1 (line 2): " + str(tmp_path / "short.mp4") + ": has 8 frames; --num_frames asks for 9",
            "its frames differ in size: frame 1 is 32x32, frame 6 is 48x32",
            "frame_3.png: cannot be decoded",
            "has no frames",
            "text.mp4: cannot be decoded",
            "absent.mp4: no such file",
        ],
        strict=True,
    ):
        assert expected in line


def test_a_number_of_frames_that_no_video_can_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_frames: expected 4n \\+ 1 frames, such as 17 or 21"):
        options(tmp_path, num_frames="16")


def test_films_play(tmp_path: Path) -> None:
    frames = tiny_wan.frames(9, (48, 32))
    video = torch.stack([to_pixels(frame, (32, 48)) for frame in frames], 1)
    write_film(tmp_path / "a.mp4", [video, -video], 16.0)
    found = [*read_frames(tmp_path / "a.mp4", 81)]
    assert len(found) == 9
    assert found[0].size == (96, 32)
    left = torch.stack([to_pixels(frame.crop((0, 0, 48, 32)), (32, 48)) for frame in found], 1)
    assert (left - video).abs().mean() < 0.08
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == 16
