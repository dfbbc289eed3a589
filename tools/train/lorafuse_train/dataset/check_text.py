"""What `check` has counted, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lorafuse_train.dataset.captions import measure_captions
from lorafuse_train.dataset.data import Sample
from lorafuse_train.dataset.dataset_statistics import (
    NOTEWORTHY_CROP,
    BucketCount,
    CaptionCount,
    Statistics,
    Twice,
    gather_statistics,
)
from lorafuse_train.options.config import TrainConfig

MOST_BUCKETS, MOST_GROUPS, MOST_NAMES = 20, 10, 5


def describe_statistics(statistics: Statistics, config: TrainConfig) -> str:
    """A page about a dataset."""
    return "\n".join(
        [
            *_files(statistics),
            *_buckets(statistics, config),
            *_batches(statistics, config),
            *_captions(statistics.captions),
            *_groups("the same bytes under several names", statistics.same_bytes),
            *_groups("the same caption for several samples", statistics.same_caption),
            *_groups("names that differ only in the ending", statistics.same_stem),
            *_groups("the same name in several folders, which is fine here", statistics.same_name),
        ]
    )


def describe_in_short(samples: Sequence[Sample], config: TrainConfig) -> list[str]:
    """What a training should not be silent about; a line each."""
    lengths = measure_captions([sample.caption for sample in samples], None)
    root, batch = config.dataset_base_path, config.train_batch_size
    found = gather_statistics(samples, (), lengths, root, batch, config.dataset_repeat)
    told = list(_enlarged(found))
    if found.incomplete_batches > found.full_batches:
        told += _batches(found, config)
    if found.same_bytes:
        files, groups = sum(len(group.files) for group in found.same_bytes), found.same_bytes
        told.append(f"{files} files hold the bytes of another, such as {_names(groups[0].files)}")
    return [f"  {line}" for line in told] + ["  `lorafuse-train check` says more"] * bool(told)


def _files(found: Statistics) -> Iterator[str]:
    videos = f", {found.videos} of them videos" if found.videos else ""
    controls = f", with {found.controls} control pictures" if found.controls else ""
    yield f"samples: {found.samples}{videos}{controls}"
    if found.formats:
        formats = ", ".join(f"{count} {what}" for what, count in found.formats)
        yield f"pictures: {formats}; {found.bytes / 1e6:,.1f} MB"
    if found.smallest and found.largest:
        yield f"sizes of the files: {_size(found.smallest)} to {_size(found.largest)}"


def _buckets(found: Statistics, config: TrainConfig) -> Iterator[str]:
    if not found.buckets:
        return
    asked = f"--height {config.height} --width {config.width}" if config.height else f"--max_pixels {config.max_pixels}"
    yield f"buckets at {asked}: {len(found.buckets)}"
    for bucket in found.buckets[:MOST_BUCKETS]:
        yield f"  {bucket.samples:>6} of {_shape(bucket)}{_changes(bucket)}"
    if len(found.buckets) > MOST_BUCKETS:
        others = sum(bucket.samples for bucket in found.buckets[MOST_BUCKETS:])
        yield f"  {others:>6} in {len(found.buckets) - MOST_BUCKETS} more"
    yield from _enlarged(found)


def _enlarged(found: Statistics) -> Iterator[str]:
    enlarged = sum(bucket.enlarged for bucket in found.buckets)
    if enlarged:
        yield (
            f"{enlarged} samples are smaller than what they train at and are enlarged, up to "
            f"{found.largest_enlargement:.2f} times"
        )


def _changes(bucket: BucketCount) -> str:
    counts = [
        (bucket.reduced, "reduced"),
        (bucket.enlarged, "enlarged"),
        (bucket.cropped, f"lose more than {NOTEWORTHY_CROP:.0%} of their area"),
    ]
    told = [f"{count} {what}" for count, what in counts if count]
    return f": {', '.join(told)}" if told else ""


def _shape(bucket: BucketCount) -> str:
    frames = f"{bucket.frames} frames of " if bucket.frames > 1 else ""
    controls = f" with controls {', '.join(map(_size, bucket.controls))}" if bucket.controls else ""
    return f"{frames}{_size((bucket.height, bucket.width))}{controls}"


def _size(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]}"


def _batches(found: Statistics, config: TrainConfig) -> Iterator[str]:
    if config.train_batch_size > 1 and found.samples:
        yield (
            f"an epoch in batches of {config.train_batch_size}: {found.full_batches} full, {found.incomplete_batches} "
            "smaller, for what is left of a bucket; every sample counts the same"
        )


def _captions(found: CaptionCount | None) -> Iterator[str]:
    if found is None:
        return
    yield f"captions: {found.shortest} to {found.longest} {found.unit}, half of them below {found.median:g}"
    if found.cut:
        yield (
            f"  {len(found.cut)} are longer than the {found.read} {found.unit} that the family reads, and are cut off "
            f"there: {_names(found.cut)}"
        )


def _groups(what: str, groups: Sequence[Twice]) -> Iterator[str]:
    if not groups:
        return
    yield f"{what}: {len(groups)}"
    for group in groups[:MOST_GROUPS]:
        caption = f"{_shortened(group.what)!r}: " if group.what else ""
        yield f"  {caption}{_names(group.files)}"
    if len(groups) > MOST_GROUPS:
        yield f"  and {len(groups) - MOST_GROUPS} more"


def _names(files: Sequence[str]) -> str:
    more = f" and {len(files) - MOST_NAMES} more" if len(files) > MOST_NAMES else ""
    return ", ".join(files[:MOST_NAMES]) + more


def _shortened(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[: most - 3]}..."
