"""The options of a training: one frozen dataclass that command line, YAML file and documentation share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

BASE, DATA, LORA, TRAINING, MEMORY, SAMPLES, OUTPUT = (
    "Base",
    "Dataset",
    "LoRA",
    "Training",
    "Precision and memory",
    "Samples",
    "Output",
)
LR_SCHEDULERS = (
    "constant_with_warmup",
    "constant",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
)


@dataclass(frozen=True, slots=True)
class Bounds:
    """The values a number may take: `low` itself only where it is not `open`; `high` always."""

    low: float
    high: float = float("inf")
    open: bool = False

    def __contains__(self, value: float) -> bool:
        return (value > self.low if self.open else value >= self.low) and value <= self.high

    def __str__(self) -> str:
        low = f"above {self.low:g}" if self.open else f"at least {self.low:g}"
        return low if self.high == float("inf") else f"{low} and at most {self.high:g}"


POSITIVE, NOT_NEGATIVE, SHARE = Bounds(0, open=True), Bounds(0), Bounds(0, 1)
ONE_OR_MORE = Bounds(1)
SEED = Bounds(0, 2**63 - 1)


@dataclass(frozen=True, slots=True)
class Entry:
    """What an option has besides its type and default."""

    panel: str
    """Its heading in `--help`."""
    help: str
    choices: tuple[str, ...] = ()
    """The values it may take; any where empty."""
    bounds: Bounds | None = None


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything a training can be told; built by `options.resolve_config`, which checks it."""

    fused_model: Annotated[Path, Entry(BASE, "Folder that `lorafuse fuse` wrote: a pipeline or a transformer.")]
    lora_fused: Annotated[
        tuple[Path, ...], Entry(BASE, "Check that this LoRA file is fused into --fused_model. Repeatable.")
    ] = ()
    allow_unfused_base: Annotated[bool, Entry(BASE, "Accept a --fused_model without lorafuse.json.")] = False
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

    dataset_base_path: Annotated[Path, Entry(DATA, "Folder that holds the pictures.")]
    dataset_metadata_path: Annotated[
        Path | None,
        Entry(
            DATA,
            (
                "metadata.csv, .json or .jsonl with the columns image and prompt. "
                "Default: the one in --dataset_base_path, else pictures with .txt files beside them."
            ),
        ),
    ] = None
    data_file_keys: Annotated[str, Entry(DATA, "Columns that hold files.", choices=("image",))] = "image"
    dataset_repeat: Annotated[int, Entry(DATA, "Times each picture is seen in an epoch.", bounds=ONE_OR_MORE)] = 1
    max_pixels: Annotated[
        int, Entry(DATA, "Larger pictures are reduced to this area, in their own shape.", bounds=ONE_OR_MORE)
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

    lora_base_model: Annotated[str, Entry(LORA, "The part that gets the LoRA.", choices=("dit",))] = "dit"
    lora_target_modules: Annotated[
        str, Entry(LORA, "`preset`, name endings such as `to_q,to_k`, or `regex:PATTERN` for full names.")
    ] = "preset"
    lora_rank: Annotated[int, Entry(LORA, "Rank of the new LoRA.", bounds=ONE_OR_MORE)] = 32
    lora_alpha: Annotated[float | None, Entry(LORA, "Its scale is alpha/rank. Default: the rank.", bounds=POSITIVE)] = (
        None
    )
    trainable_models: Annotated[str, Entry(LORA, "Must be empty: a LoRA is trained, never the whole model.")] = ""

    task: Annotated[str, Entry(TRAINING, "sft: flow matching on pictures with captions.", choices=("sft",))] = "sft"
    learning_rate: Annotated[float, Entry(TRAINING, "Peak learning rate.", bounds=NOT_NEGATIVE)] = 1e-4
    num_epochs: Annotated[int, Entry(TRAINING, "Passes over the dataset.", bounds=ONE_OR_MORE)] = 1
    max_train_steps: Annotated[
        int | None, Entry(TRAINING, "Optimiser steps; decides over --num_epochs where given.", bounds=ONE_OR_MORE)
    ] = None
    train_batch_size: Annotated[int, Entry(TRAINING, "Pictures in one pass, of one size.", bounds=ONE_OR_MORE)] = 1
    gradient_accumulation_steps: Annotated[
        int, Entry(TRAINING, "Passes in one optimiser step.", bounds=ONE_OR_MORE)
    ] = 1
    lr_scheduler: Annotated[str, Entry(TRAINING, "Course of the learning rate.", choices=LR_SCHEDULERS)] = (
        "constant_with_warmup"
    )
    lr_warmup_steps: Annotated[
        int | None,
        Entry(TRAINING, "Steps until the peak. Default: a tenth of the run, at most 50.", bounds=NOT_NEGATIVE),
    ] = None
    adam_beta1: Annotated[float, Entry(TRAINING, "AdamW beta1.", bounds=SHARE)] = 0.9
    adam_beta2: Annotated[float, Entry(TRAINING, "AdamW beta2.", bounds=SHARE)] = 0.999
    adam_weight_decay: Annotated[float, Entry(TRAINING, "AdamW weight decay.", bounds=NOT_NEGATIVE)] = 0.01
    adam_epsilon: Annotated[float, Entry(TRAINING, "AdamW epsilon.", bounds=POSITIVE)] = 1e-8
    max_grad_norm: Annotated[float, Entry(TRAINING, "Longer gradients are cut to this norm.", bounds=POSITIVE)] = 1.0
    weighting_scheme: Annotated[
        str,
        Entry(
            TRAINING,
            "Density of the noise level before its shift: logit_normal, or none for uniform.",
            choices=("logit_normal", "none"),
        ),
    ] = "logit_normal"
    logit_mean: Annotated[float, Entry(TRAINING, "Mean of the logit-normal density.")] = 0.0
    logit_std: Annotated[float, Entry(TRAINING, "Width of the logit-normal density.", bounds=POSITIVE)] = 1.0
    timestep_shift: Annotated[
        float | None,
        Entry(
            TRAINING,
            "s in sigma = s u / (1 + (s - 1) u). Default: what the pipeline's scheduler uses at the picture's size.",
            bounds=POSITIVE,
        ),
    ] = None
    seed: Annotated[int, Entry(TRAINING, "Decides order, noise and initial weights.", bounds=SEED)] = 42

    base_dtype: Annotated[
        str, Entry(MEMORY, "Precision of the frozen base; auto: as stored.", choices=("auto", "bf16", "fp32"))
    ] = "auto"
    mixed_precision: Annotated[
        str,
        Entry(
            MEMORY,
            "Compute in bf16 (LoRA weights stay fp32); auto: when the base is bf16.",
            choices=("auto", "bf16", "no"),
        ),
    ] = "auto"
    use_gradient_checkpointing: Annotated[bool, Entry(MEMORY, "Half the memory for a third more time.")] = False

    validation_prompt: Annotated[
        tuple[str, ...],
        Entry(SAMPLES, "A column of the picture grid. Repeatable. Default: up to 8 captions of the dataset."),
    ] = ()
    validation_steps: Annotated[
        int, Entry(SAMPLES, "Draw a grid every so many steps; 0: only at the end.", bounds=NOT_NEGATIVE)
    ] = 0
    validation_inference_steps: Annotated[int, Entry(SAMPLES, "Steps of the long schedule.", bounds=ONE_OR_MORE)] = 30
    validation_guidance_scale: Annotated[
        float, Entry(SAMPLES, "Classifier-free guidance of the long schedule; 1: none.", bounds=ONE_OR_MORE)
    ] = 4.0
    validation_negative_prompt: Annotated[str, Entry(SAMPLES, "What the guidance leads away from.")] = " "
    validation_seed: Annotated[int, Entry(SAMPLES, "Seed of the noise the pictures start from.", bounds=SEED)] = 0

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
    config: Annotated[Path | None, Entry(OUTPUT, "YAML file with these options; the command line wins.")] = None

    @property
    def alpha(self) -> float:
        """The LoRA's alpha; its rank where the user gave none."""
        return float(self.lora_rank) if self.lora_alpha is None else self.lora_alpha

    @property
    def cache(self) -> Path:
        """The cache's folder."""
        return self.cache_dir or self.dataset_base_path / ".lorafuse_cache"

    def warmup_steps(self, total_steps: int) -> int:
        """Steps until the learning rate's peak in a run of `total_steps`."""
        if self.lr_scheduler == "constant":
            return 0
        return min(50, total_steps // 10) if self.lr_warmup_steps is None else self.lr_warmup_steps


def conflicts(config: TrainConfig) -> list[tuple[tuple[str, ...], str]]:
    """Everything in the options that contradicts itself: the options, and what to do."""
    faults: list[tuple[tuple[str, ...], str]] = []
    if config.trainable_models:
        faults.append((("trainable_models",), "must be empty; a LoRA is trained here, never the whole model"))
    if (config.height is None) != (config.width is None):
        faults.append((("height", "width"), "give both, or neither and --max_pixels"))
    if config.lr_scheduler == "constant" and config.lr_warmup_steps:
        faults.append((("lr_warmup_steps",), "'constant' has no warm-up; use --lr_scheduler constant_with_warmup"))
    if not config.lora_target_modules.strip():
        faults.append((("lora_target_modules",), "is empty; give `preset`, name endings or `regex:PATTERN`"))
    if any(not prompt.strip() for prompt in config.validation_prompt):
        faults.append((("validation_prompt",), "is empty"))
    return faults
