"""The options of a training: one frozen dataclass that command line, YAML file and documentation share."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lorafuse_train.options.config_dataset import CacheOptions, ColumnOptions
from lorafuse_train.options.config_few_step import FewStepOptions
from lorafuse_train.options.config_output import ResultOptions
from lorafuse_train.options.config_training import LoraOptions, NoiseOptions, OptimizerOptions, TrainingOptions
from lorafuse_train.options.config_video import VideoOptions
from lorafuse_train.options.entry import BASE, DATA, MEMORY, NOT_NEGATIVE, ONE_OR_MORE, OUTPUT, SAMPLES, SEED, Entry

AUTO_KEYS, IMAGE, VIDEO, PROMPT, EDIT_IMAGE = "auto", "image", "video", "prompt", "edit_image"
"""What `data_file_keys` is by default, and the usual columns of a dataset."""
TRACKERS = ("tensorboard", "wandb", "trackio")
NO_TRACKER = "none"


@dataclass(frozen=True, kw_only=True)
class BaseOptions:
    """The frozen base."""

    fused_model: Annotated[Path, Entry(BASE, "Folder that `lorafuse fuse` wrote: a pipeline or a transformer.")]
    lora_fused: Annotated[
        tuple[Path, ...], Entry(BASE, "Check that this LoRA file is fused into --fused_model. Repeatable.")
    ] = ()
    allow_unfused_base: Annotated[bool, Entry(BASE, "Accept a --fused_model without lorafuse.json.")] = False
    allow_base_mismatch: Annotated[
        bool,
        Entry(BASE, "Accept a --lora_checkpoint, or a checkpoint to resume from, that was trained on another base."),
    ] = False
    verify: Annotated[
        bool, Entry(BASE, "Also compare the sha256 of every file of --fused_model with lorafuse.json.")
    ] = False
    pretrained_model_name_or_path: Annotated[
        Path | None,
        Entry(BASE, "Pipeline folder with VAE and text encoder, where --fused_model is a bare transformer folder."),
    ] = None
    original_model: Annotated[
        Path | None, Entry(BASE, "Pipeline folder of the base before fusing; adds its pictures to the final grid.")
    ] = None


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """The pictures and their captions."""

    dataset_base_path: Annotated[Path, Entry(DATA, "Folder that holds the pictures.")]
    dataset_metadata_path: Annotated[
        Path | None,
        Entry(
            DATA,
            (
                "metadata.csv, .json or .jsonl with the columns image (or video), prompt and edit_image. "
                "Default: the one in --dataset_base_path, else pictures with .txt files beside them."
            ),
        ),
    ] = None
    data_file_keys: Annotated[
        str,
        Entry(
            DATA,
            (
                "Columns that hold files, such as image,edit_image: image or video is learned, every other one holds "
                "control pictures, one or a list. auto: image, video and edit_image, where they are there."
            ),
            form=r"[^,]+(,[^,]+)*",
            expected="auto, or columns with commas between them",
        ),
    ] = AUTO_KEYS
    dataset_control_path: Annotated[
        tuple[Path, ...],
        Entry(
            DATA,
            (
                "Folder with the control pictures of pictures that have .txt files, under the same names. Repeatable: "
                "a second control picture each."
            ),
        ),
    ] = ()
    dataset_repeat: Annotated[int, Entry(DATA, "Times each picture is seen in an epoch.", bounds=ONE_OR_MORE)] = 1
    max_pixels: Annotated[
        int,
        Entry(
            DATA,
            "Larger pictures are reduced to this area, in their own shape. Control pictures have the family's sizes "
            "for it.",
            bounds=ONE_OR_MORE,
        ),
    ] = 1_048_576
    height: Annotated[
        int | None, Entry(DATA, "With --width: cut every picture to this height.", bounds=ONE_OR_MORE)
    ] = None
    width: Annotated[int | None, Entry(DATA, "With --height: cut every picture to this width.", bounds=ONE_OR_MORE)] = (
        None
    )
    cache_dir: Annotated[
        Path | None,
        Entry(DATA, "Where latents and text embeddings are kept. Default: <dataset_base_path>/.lorafuse_cache"),
    ] = None

    @property
    def file_keys(self) -> tuple[str, ...]:
        """The columns that `--data_file_keys` names."""
        return tuple(key.strip() for key in self.data_file_keys.split(","))


@dataclass(frozen=True, kw_only=True)
class MemoryOptions:
    """Precision and memory."""

    base_dtype: Annotated[
        str,
        Entry(
            MEMORY, "Precision of the frozen base; auto: as stored, or bf16 for fp16.", choices=("auto", "bf16", "fp32")
        ),
    ] = "auto"
    mixed_precision: Annotated[
        str,
        Entry(
            MEMORY,
            "Compute in bf16 (LoRA weights stay fp32); auto: when the base is bf16.",
            choices=("auto", "bf16", "no"),
        ),
    ] = "auto"
    use_gradient_checkpointing: Annotated[
        bool, Entry(MEMORY, "Compute activations again instead of keeping them: a third more time, far less memory.")
    ] = False
    max_memory: Annotated[
        str | None,
        Entry(
            MEMORY,
            "Refuse, before the weights are loaded, a training that needs more than this, such as 24GB.",
            form=r"(?i)\d+(\.\d+)?\s*([GM]i?B?)?",
            expected="a size such as 24GB or 22.5GiB",
        ),
    ] = None

    @property
    def max_memory_bytes(self) -> int | None:
        """`--max_memory` in bytes; GB are 1000^3, GiB are 1024^3."""
        found = re.match(r"([\d.]+)\s*([gm]?)(i?)", self.max_memory.lower()) if self.max_memory else None
        if found is None:
            return None
        return int(float(found[1]) * (1024 if found[3] else 1000) ** (2 if found[2] == "m" else 3))


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """The pictures that are drawn during a training."""

    validation_prompt: Annotated[
        tuple[str, ...],
        Entry(SAMPLES, "A column of the picture grid. Repeatable. Default: up to 8 captions of the dataset."),
    ] = ()
    validation_prompts: Annotated[
        Path | None,
        Entry(
            SAMPLES,
            (
                "Columns from a file: .txt with one prompt a line; .csv, .json, .jsonl or .yaml with prompt and, where "
                "wanted, seed, height, width, steps, guidance_scale, negative_prompt and edit_image."
            ),
        ),
    ] = None
    validation_steps: Annotated[
        int,
        Entry(
            SAMPLES,
            "Draw a grid and measure the few-step health every so many steps; 0: only before the first and at the end.",
            bounds=NOT_NEGATIVE,
        ),
    ] = 0
    validation_inference_steps: Annotated[int, Entry(SAMPLES, "Steps of the long schedule.", bounds=ONE_OR_MORE)] = 30
    validation_guidance_scale: Annotated[
        float | None,
        Entry(SAMPLES, "Guidance of the long schedule; 1: none. Default: what suits the family.", bounds=ONE_OR_MORE),
    ] = None
    validation_negative_prompt: Annotated[str, Entry(SAMPLES, "What the guidance leads away from.")] = " "
    validation_seed: Annotated[int, Entry(SAMPLES, "Seed of the noise the pictures start from.", bounds=SEED)] = 0
    validation_split: Annotated[
        float,
        Entry(
            SAMPLES,
            (
                "Hold so many pictures, or below 1 this share of them, back from the training and measure the loss on "
                "them, at noise that is the same in every run. Which ones is decided by their content."
            ),
            bounds=NOT_NEGATIVE,
        ),
    ] = 0.0
    validation_dataset_path: Annotated[
        Path | None, Entry(SAMPLES, "Measure that loss on this dataset folder instead, in the same form.")
    ] = None
    validation_loss_steps: Annotated[
        int,
        Entry(SAMPLES, "Measure it every so many steps; 0: whenever a grid is drawn.", bounds=NOT_NEGATIVE),
    ] = 0


@dataclass(frozen=True, kw_only=True)
class OutputOptions:
    """What is written, and where."""

    output_path: Annotated[Path, Entry(OUTPUT, "Folder for LoRA, logs and samples.")]
    overwrite_output_dir: Annotated[bool, Entry(OUTPUT, "Train again where --output_path holds a LoRA.")] = False
    checkpointing_steps: Annotated[
        int,
        Entry(OUTPUT, "Save LoRA and state to checkpoint-N every so many steps; 0: never.", bounds=NOT_NEGATIVE),
    ] = 0
    checkpoints_total_limit: Annotated[
        int | None, Entry(OUTPUT, "Keep only so many of the newest checkpoints.", bounds=ONE_OR_MORE)
    ] = None
    resume_from_checkpoint: Annotated[
        str | None,
        Entry(OUTPUT, "Go on from `latest` in --output_path (a fresh start where there is none) or from this folder."),
    ] = None
    report_to: Annotated[
        tuple[str, ...],
        Entry(
            OUTPUT,
            "Where the metrics go besides metrics.csv and metrics.jsonl. Repeatable. Default: tensorboard.",
            choices=(*TRACKERS, NO_TRACKER),
        ),
    ] = ("tensorboard",)
    tracker_project_name: Annotated[str, Entry(OUTPUT, "The project that wandb and trackio file a run under.")] = (
        "lorafuse"
    )
    config: Annotated[Path | None, Entry(OUTPUT, "YAML file with these options; the command line wins.")] = None


@dataclass(frozen=True, kw_only=True)
class TrainConfig(  # dataclasses collect fields from the last class to the first
    ResultOptions,
    OutputOptions,
    CacheOptions,
    SampleOptions,
    MemoryOptions,
    FewStepOptions,
    NoiseOptions,
    OptimizerOptions,
    TrainingOptions,
    LoraOptions,
    ColumnOptions,
    VideoOptions,
    DataOptions,
    BaseOptions,
):
    """Everything a training can be told; built by `options.resolve_config`, which checks it."""

    @property
    def cache(self) -> Path:
        """The cache's folder."""
        return self.cache_dir or self.dataset_base_path / ".lorafuse_cache"
