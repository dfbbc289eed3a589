"""The options of a dataset's columns, of `datasets` data sets, and of the commands `check` and `cache`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lorafuse_train.options.entry import CACHE, DATA, ONE_OR_MORE, Entry

CHECK_COMMAND, CACHE_COMMAND = "check", "cache"
ALL = "all"


@dataclass(frozen=True, kw_only=True)
class ColumnOptions:
    """Where rows and captions come from, when not from `image` and `prompt` of a folder."""

    image_column: Annotated[
        str | None, Entry(DATA, "Metadata column with the pictures' names. Default: image, else file_name.")
    ] = None
    caption_column: Annotated[
        str | None, Entry(DATA, "Metadata column with the captions. Default: prompt, else text or caption.")
    ] = None
    dataset_name: Annotated[
        str | None,
        Entry(
            DATA,
            (
                "A data set of the `datasets` library: a name on the hub, a folder of parquet files, or one that "
                "`save_to_disk` wrote. Unpacked to --dataset_base_path, once."
            ),
        ),
    ] = None
    dataset_config_name: Annotated[str | None, Entry(DATA, "The configuration of --dataset_name.")] = None
    dataset_split: Annotated[str, Entry(DATA, "The split of --dataset_name.")] = "train"


@dataclass(frozen=True, kw_only=True)
class CacheOptions:
    """What `check` and `cache` are asked besides what a training would do."""

    json: Annotated[
        bool, Entry(CACHE, "One JSON object on stdout; everything else goes to stderr.", commands=(CHECK_COMMAND,))
    ] = False
    verify_sample: Annotated[
        str,
        Entry(
            CACHE,
            (
                "With --verify: how many entries are computed again and compared with what is stored: a number, "
                "a share such as 0.05, or all."
            ),
            form=rf"[1-9]\d*|0?\.\d*[1-9]\d*|{ALL}",
            expected="a number, a share below 1, or all",
            commands=(CACHE_COMMAND,),
        ),
    ] = "16"
    contact_sheet: Annotated[
        Path | None,
        Entry(
            CACHE,
            "Also draw this PNG: decoded latents with their captions. A .txt beside it has the captions in full.",
            commands=(CACHE_COMMAND,),
        ),
    ] = None
    contact_sheet_pictures: Annotated[
        int,
        Entry(
            CACHE,
            "The most pictures on it, spread evenly over the data set.",
            bounds=ONE_OR_MORE,
            commands=(CACHE_COMMAND,),
        ),
    ] = 64
