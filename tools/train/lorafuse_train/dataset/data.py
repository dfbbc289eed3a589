"""The dataset: every row checked, with all that it shows the model, before any model is loaded."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

from lorafuse_common.errors import DatasetError
from lorafuse_train.console import progress
from lorafuse_train.dataset.picture_faults import quiet_pillow, similar_name
from lorafuse_train.dataset.pictures import Geometry, upright_size
from lorafuse_train.dataset.rows import Row, expectation, metadata_path, metadata_rows, sidecar_rows
from lorafuse_train.dataset.unpack import unpack_dataset
from lorafuse_train.options.config import EDIT_IMAGE, TrainConfig

MOST_FAULTS = 20
SAME_SHAPE = 0.02
"""How far, relatively, a mask's width/height may be from its picture's."""
Found = TypeVar("Found")
Bucket: TypeAlias = tuple[tuple[int, int, int], tuple[tuple[int, int], ...]]
"""(frames, height, width) of a sample, and (height, width) of each of its controls."""


class Excerpt(NamedTuple):
    """How much of a video is seen, from its first frame on."""

    frames: int
    rate: float | None
    """Frames taken per second; None: all of them."""


@dataclass(frozen=True, slots=True)
class Control:
    """A control picture that can be decoded."""

    path: Path
    sha256: str
    """Of the file's bytes."""
    size: tuple[int, int]
    """(height, width) in which the VAE sees it."""
    is_video: bool = False
    """Whether `path` is a video, of which the first frame is meant."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the model is told of one picture or video."""

    caption: str
    controls: tuple[Control, ...] = ()
    shape: tuple[int, int, int] = (1, 0, 0)
    """(frames, height, width) of what is drawn; matters only where there are controls."""


@dataclass(frozen=True, slots=True)
class Sample:
    """A picture or video that can be decoded, with its caption and control pictures."""

    path: Path
    caption: str
    sha256: str
    """Of the file's bytes."""
    size: tuple[int, int]
    """(height, width) it trains at."""
    mask: Path | None = None
    """The file that says which parts of it are learned, where there is one."""
    excerpt: Excerpt | None = None
    """What is learned of a video; None where it is a picture."""
    controls: tuple[Control, ...] = ()
    source: tuple[int, int] = (0, 0)
    """(height, width) of the file, upright."""

    @property
    def frames(self) -> int:
        """How many frames are drawn; 1 for a picture."""
        return self.excerpt.frames if self.excerpt else 1

    @property
    def shape(self) -> tuple[int, int, int]:
        """(frames, height, width) of what is drawn."""
        return (self.frames, *self.size)

    @property
    def bucket(self) -> Bucket:
        """What samples of one batch have in common."""
        return self.shape, tuple(control.size for control in self.controls)

    @property
    def identity(self) -> tuple[object, ...]:
        """Contents, caption and sizes, which JSON can hold; names and places do not matter."""
        own = (self.sha256, self.caption, self.size)
        if not (self.excerpt or self.controls):
            return own
        return (*own, self.excerpt, [(control.sha256, control.size, control.is_video) for control in self.controls])

    @property
    def pixels(self) -> int:
        """All that goes through the model, controls included."""
        return sum(height * width for height, width in (*[self.size] * self.frames, *self.bucket[1]))

    @property
    def prompt(self) -> Prompt:
        """What the model is told of it."""
        return Prompt(self.caption, self.controls, self.shape)

    @property
    def uncaptioned(self) -> Prompt:
        """The same without its caption; the controls stay."""
        return Prompt("", self.controls, self.shape)


@dataclass(frozen=True, slots=True)
class Survey:
    """A dataset with all that is wrong with it."""

    source: Path
    """The metadata file, or the folder where captions are in .txt files."""
    rows: Sequence[Row]
    samples: Sequence[Sample]
    """Those of the rows without a fault."""
    faults: Sequence[str]


class FaultyDataset(DatasetError):
    """All that is wrong with a dataset; the text has the first of it."""

    def __init__(self, source: object, faults: Sequence[str]) -> None:
        count = len(faults)
        more = "\n  `lorafuse-train check` lists all of them" if count > MOST_FAULTS else ""
        super().__init__(f"{source}: {count} fault{'s' * (count != 1)}:\n{listed(faults)}{more}")
        self.source, self.faults = source, faults


class _File(NamedTuple):
    """What is known of a file that can be decoded."""

    sha256: str
    size: tuple[int, int]
    excerpt: Excerpt | None = None


def read_dataset(config: TrainConfig, geometry: Geometry) -> list[Sample]:
    """Read and check every row, decoding every picture.

    Raises:
        DatasetError: listing all faults, by row; nothing is skipped.
    """
    found = survey_dataset(config, geometry)
    if found.faults:
        raise FaultyDataset(found.source, found.faults)
    return list(found.samples)


def survey_dataset(config: TrainConfig, geometry: Geometry) -> Survey:
    """Look at every row, decoding every picture.

    Raises:
        DatasetError: there is no dataset, or its metadata file as a whole cannot be read.
    """
    config = unpack_dataset(config)
    root = config.dataset_base_path
    if not root.is_dir():
        raise DatasetError(f"--dataset_base_path {root}: no such folder")
    faults: list[str] = []
    if geometry.fixed and any(side % geometry.multiple for side in geometry.fixed):
        height, width = geometry.fixed
        faults.append(f"--height {height} --width {width}: both must be multiples of {geometry.multiple}")
        geometry = replace(geometry, fixed=None)
    source = metadata_path(config)
    if source is None:
        rows = list(sidecar_rows(config, faults, videos=bool(geometry.frame_step)))
    else:
        rows = list(metadata_rows(config, source, faults))
    if not rows and not faults:
        raise DatasetError(f"{source or root}: no pictures. {expectation()}")
    fitting, geometry = _fitting(rows, geometry, faults)
    with quiet_pillow(), ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        checked = pool.map(lambda row: _check(row, geometry, config), fitting)
        found = list(progress(checked, len(rows), "checking pictures"))
    faults += [sample for sample in found if isinstance(sample, str)]
    samples = [sample for sample in found if isinstance(sample, Sample)]
    faults += _duplicates(rows)
    return Survey(source or root, rows, samples, faults)


def listed(faults: Sequence[str]) -> str:
    """The first of many faults, a line each, and how many more there are."""
    shown = "\n".join(f"  {fault}" for fault in faults[:MOST_FAULTS])
    return f"{shown}\n  and {len(faults) - MOST_FAULTS} more" if len(faults) > MOST_FAULTS else shown


def _fitting(rows: Sequence[Row], geometry: Geometry, faults: list[str]) -> tuple[Sequence[Row], Geometry]:
    """Say once what would be said of every row of a dataset for another kind of model; the rest is checked without."""
    rule, having = geometry.controls, [row for row in rows if row.controls]
    if having and not rule.most:
        faults.insert(
            0,
            f"{len(having)} rows have control pictures (first: {having[0].label}), which a {rule.pipeline} "
            "does not take; leave them out with --data_file_keys image, or without --dataset_control_path",
        )
        return [replace(row, controls=()) for row in rows], geometry
    pictures = [row for row in rows if not (rule.first_frame and row.is_video)]
    if pictures and not having and rule.least:
        faults.insert(
            0,
            f"no row has a control picture, and a {rule.pipeline} draws nothing without. Give each the file "
            f"of the picture to start from, in a column {EDIT_IMAGE!r} (one, or a list; another column with "
            "--data_file_keys image,NAME), or beside .txt files under the same name in --dataset_control_path FOLDER",
        )
        return rows, replace(geometry, controls=replace(rule, least=0))
    return rows, geometry


def _check(row: Row, geometry: Geometry, config: TrainConfig) -> Sample | str:
    """The sample, or all that is wrong with the row as one text."""
    faults = [] if row.caption else [row.fault or "the caption is empty"]
    file = _attempt(row.path, lambda path: _look(path, row, geometry, config), faults)
    size = geometry.size(*file.size) if file else (0, 0)
    if file and 0 in size:
        found, most = f"{file.size[1]}x{file.size[0]}", geometry.max_pixels
        reduced = f" and is reduced to --max_pixels {most}" * (file.size[0] * file.size[1] > most)
        faults.append(f"{row.path}: is {found} pixels{reduced}; both sides need at least {geometry.multiple}")
    if row.mask:
        _attempt(row.mask, lambda path: _require_mask(path, row.path, file), faults, "mask ")
    rule = geometry.controls
    controls = [
        control
        for path in row.controls
        if (control := _attempt(path, lambda path: _control(path, size, geometry), faults, "control picture "))
    ]
    if file and file.excerpt and rule.first_frame and not row.controls:
        controls = [Control(row.path, file.sha256, rule.size(file.size, size), is_video=True)]
    elif not rule.least <= len(row.controls) <= rule.most:
        expected = f"{rule.least}" if rule.least == rule.most else f"{rule.least} to {rule.most}"
        faults.append(f"has {len(row.controls)} control pictures; a {rule.pipeline} takes {expected}")
    if faults or file is None:
        return f"{row.label}: {'; '.join(faults)}"
    return Sample(row.path, row.caption, file.sha256, size, row.mask, file.excerpt, tuple(controls), file.size)


def _attempt(path: Path, look: Callable[[Path], Found], faults: list[str], what: str = "") -> Found | None:
    """What `look` finds at `path`; where it cannot be looked at, None and a fault."""
    try:
        return look(path)
    except FileNotFoundError:
        faults.append(f"{what}{path}: no such file{similar_name(path)}")
    except OSError as error:
        faults.append(f"{what}{path}: cannot be read ({error.strerror})")
    except ValueError as error:
        faults.append(f"{what}{path}: {error}")
    return None


def _look(path: Path, row: Row, geometry: Geometry, config: TrainConfig) -> _File:
    """Raises ValueError where the file is not what the family draws, or cannot be decoded."""
    if not row.is_video:
        return _picture(path)
    if not geometry.frame_step:
        raise ValueError(f"is a video; a {geometry.controls.pipeline} draws pictures")
    from lorafuse_train.dataset.video import Timing, probe_video, video_sha256  # only videos need its libraries

    timing = Timing(config.num_frames, config.frame_rate)
    clip = probe_video(path, timing)
    excerpt = Excerpt(timing.of(clip.frames), timing.rate)
    return _File(video_sha256(path), (clip.height, clip.width), excerpt)


def _picture(path: Path) -> _File:
    raw = path.read_bytes()
    return _File(hashlib.sha256(raw).hexdigest(), upright_size(raw))


def _control(path: Path, target: tuple[int, int], geometry: Geometry) -> Control:
    """Raises ValueError where the picture cannot be decoded or used."""
    file = _picture(path)
    size = geometry.controls.size(file.size, target) if geometry.controls.most else (0, 0)
    if 0 in size and geometry.controls.most and 0 not in target:
        raise ValueError(f"is {file.size[1]}x{file.size[0]} pixels, which is too small")
    return Control(path, file.sha256, size)


def _require_mask(path: Path, picture: Path, file: _File | None) -> None:
    """Raises ValueError where the mask cannot be decoded, or is not of the picture's shape."""
    height, width = upright_size(path.read_bytes())
    if file and abs(width * file.size[0] / (height * file.size[1]) - 1) > SAME_SHAPE:
        expected = f"{file.size[1]}x{file.size[0]}"
        raise ValueError(f"is {width}x{height}; expected the shape of {picture.name}, which is {expected}")


def _duplicates(rows: Sequence[Row]) -> list[str]:
    """Rows that repeat an earlier one; the same picture under another caption is fine."""
    first: dict[Row, Row] = {}
    faults = []
    for row in rows:
        earlier = first.setdefault(replace(row, label="", mask=None), row)
        if earlier is not row:
            faults.append(f"{row.label}: repeats {earlier.label}; --dataset_repeat shows every picture more often")
    return faults
