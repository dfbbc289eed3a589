"""What is in a dataset, in numbers: sizes, buckets, captions, and what stands in it twice."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

from lorafuse_train.dataset.captions import Lengths
from lorafuse_train.dataset.data import Sample
from lorafuse_train.dataset.headers import Header

NOTEWORTHY_CROP = 0.05
"""The share of a picture's area that may be cut off without a word."""
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class BucketCount:
    """The samples that train in one shape."""

    frames: int
    height: int
    width: int
    controls: tuple[tuple[int, int], ...]
    """(height, width) of each control picture."""
    samples: int
    reduced: int
    enlarged: int
    cropped: int
    """Those that lose more than `NOTEWORTHY_CROP` of their area."""


@dataclass(frozen=True, slots=True)
class CaptionCount:
    """How long the captions are."""

    unit: str
    shortest: int
    median: float
    longest: int
    read: int | None
    """How many units the family reads; None where that is not known."""
    cut: tuple[str, ...]
    """The files whose captions are longer."""


@dataclass(frozen=True, slots=True)
class Twice:
    """What several samples have in common."""

    what: str
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Statistics:
    """A dataset in numbers. Files are named relative to the dataset's folder."""

    samples: int
    videos: int
    bytes: int
    """Of all picture files."""
    formats: tuple[tuple[str, int], ...]
    """Format and pixels of picture files, with how many there are."""
    smallest: tuple[int, int] | None
    """(height, width) of the file with the smallest area."""
    largest: tuple[int, int] | None
    largest_enlargement: float
    """The largest factor by which the sides of a picture grow; 1 where none does."""
    buckets: tuple[BucketCount, ...]
    full_batches: int
    incomplete_batches: int
    """In an epoch; a batch holds one bucket, and what is left of a bucket is a smaller batch."""
    controls: int
    captions: CaptionCount | None
    same_bytes: tuple[Twice, ...]
    same_caption: tuple[Twice, ...]
    same_name: tuple[Twice, ...]
    same_stem: tuple[Twice, ...]
    """In one folder, but for the ending: what has its caption in a .txt file has the same caption."""


def gather_statistics(
    samples: Sequence[Sample],
    headers: Sequence[Header],
    lengths: Lengths,
    root: Path,
    batch_size: int,
    repeat: int,
) -> Statistics:
    """Count; `lengths` are of the samples' captions, `root` is what names are relative to."""
    name = _namer(root)
    sources = sorted((sample.source for sample in samples), key=lambda size: size[0] * size[1])
    buckets = _buckets(samples)
    counts = [bucket.samples * repeat for bucket in buckets]
    different = {sample.path: sample for sample in samples}.values()
    return Statistics(
        samples=len(samples),
        videos=sum(sample.excerpt is not None for sample in samples),
        bytes=sum(header.nbytes for header in headers),
        formats=tuple(Counter(f"{header.format} {header.pixels}" for header in headers).most_common()),
        smallest=sources[0] if sources else None,
        largest=sources[-1] if sources else None,
        largest_enlargement=max((enlargement(sample) for sample in samples), default=1.0),
        buckets=buckets,
        full_batches=sum(count // batch_size for count in counts),
        incomplete_batches=sum(count % batch_size > 0 for count in counts),
        controls=sum(len(sample.controls) for sample in samples),
        captions=_captions(samples, lengths, name),
        same_bytes=_twice(different, lambda sample: sample.sha256, lambda sample: "", name),
        same_caption=_twice(samples, lambda sample: sample.caption, lambda sample: sample.caption, name),
        same_name=_twice(different, lambda s: s.path.name.casefold(), lambda s: s.path.name, name),
        same_stem=_twice(different, lambda s: s.path.with_suffix(""), lambda s: "", name),
    )


def enlargement(sample: Sample) -> float:
    """By what factor the sides of a picture grow; 1 where they do not."""
    return max(1.0, _scale(sample))


def crop(sample: Sample) -> float:
    """The share of a picture's area that is cut off."""
    scale, (height, width) = _scale(sample), sample.source
    return 1 - sample.size[0] * sample.size[1] / (height * scale * width * scale)


def _scale(sample: Sample) -> float:
    """The picture is scaled until it covers what it trains at."""
    return max(new / old for new, old in zip(sample.size, sample.source, strict=True))


def _namer(root: Path) -> Callable[[Path], str]:
    def name(path: Path) -> str:
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)

    return name


def _buckets(samples: Sequence[Sample]) -> tuple[BucketCount, ...]:
    groups: dict[Hashable, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[sample.bucket].append(sample)
    return tuple(
        BucketCount(
            group[0].frames,
            *group[0].size,
            tuple(control.size for control in group[0].controls),
            len(group),
            sum(_scale(sample) < 1 for sample in group),
            sum(_scale(sample) > 1 for sample in group),
            sum(crop(sample) > NOTEWORTHY_CROP for sample in group),
        )
        for group in sorted(groups.values(), key=len, reverse=True)
    )


def _captions(samples: Sequence[Sample], lengths: Lengths, name: Callable[[Path], str]) -> CaptionCount | None:
    if not samples:
        return None
    counts, read = lengths.counts, lengths.longest
    cut = [
        name(sample.path) for sample, count in zip(samples, counts, strict=True) if read is not None and count > read
    ]
    return CaptionCount(lengths.unit, min(counts), median(counts), max(counts), read, tuple(cut))


def _twice(
    samples: Iterable[Sample],
    key: Callable[[Sample], Key],
    what: Callable[[Sample], str],
    name: Callable[[Path], str],
) -> tuple[Twice, ...]:
    """The groups of more than one, the largest first."""
    groups: dict[Key, list[Sample]] = defaultdict(list)
    for sample in samples:
        groups[key(sample)].append(sample)
    several = sorted((group for group in groups.values() if len(group) > 1), key=len, reverse=True)
    return tuple(Twice(what(group[0]), tuple(name(sample.path) for sample in group)) for group in several)
