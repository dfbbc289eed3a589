"""The options of the LoRA and of how it is trained: adapter, steps, optimizer, noise levels and loss."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from lorafuse_train.options.config_few_step import AUTO, NUMBER
from lorafuse_train.options.entry import (
    LORA,
    NOISE,
    NOT_NEGATIVE,
    NOT_WHOLE,
    ONE_OR_MORE,
    OPTIMIZER,
    POSITIVE,
    SEED,
    SHARE,
    TRAINING,
    Bounds,
    Entry,
)

LR_SCHEDULERS = (
    "constant_with_warmup",
    "constant",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
)
ALPHA = "alpha"
"""The mask that is a picture's own transparency."""
LOSS_WEIGHTINGS = ("none", "sigma_sqrt", "cosmap")
TIMESTEPS = Bounds(0, 1000)
PRODIGY = "prodigy"
WITH_ADAM = ("adamw", "adamw8bit", PRODIGY)
"""The optimizers that --adam_... are for."""


@dataclass(frozen=True, kw_only=True)
class LoraOptions:
    """What is trained."""

    lora_base_model: Annotated[str, Entry(LORA, "The part that gets the LoRA.", choices=("dit",))] = "dit"
    lora_target_modules: Annotated[
        str, Entry(LORA, "`preset`, name endings such as `to_q,to_k`, or `regex:PATTERN` for full names.")
    ] = "preset"
    lora_rank: Annotated[int, Entry(LORA, "Rank of the new LoRA.", bounds=ONE_OR_MORE)] = 32
    lora_alpha: Annotated[float | None, Entry(LORA, "Its scale is alpha/rank. Default: the rank.", bounds=POSITIVE)] = (
        None
    )
    rank_pattern: Annotated[
        tuple[tuple[str, int], ...],
        Entry(
            LORA,
            "Another rank for some modules, such as img_mod.1=8 or regex:PATTERN=8. Repeatable; mapping in YAML.",
            bounds=ONE_OR_MORE,
        ),
    ] = ()
    alpha_pattern: Annotated[
        tuple[tuple[str, float], ...],
        Entry(
            LORA, "Another alpha for some modules, likewise. Default: --lora_alpha, else their rank.", bounds=POSITIVE
        ),
    ] = ()
    lora_dropout: Annotated[
        float, Entry(LORA, "Share of each LoRA layer's inputs that is left out in training.", bounds=NOT_WHOLE)
    ] = 0.0
    use_dora: Annotated[
        bool, Entry(LORA, "DoRA: also learn the length of each row of a weight. Slower, and not read everywhere.")
    ] = False
    use_rslora: Annotated[bool, Entry(LORA, "rsLoRA: scale by alpha/sqrt(rank), for high ranks.")] = False
    init_lora_weights: Annotated[
        str,
        Entry(
            LORA,
            (
                "How the LoRA starts: true: A random, B zero; gaussian: A normal; orthogonal; pissa: from the largest "
                "singular values of each weight; pissa_niter_N: from an estimate of them, much faster (N 4 to 16)."
            ),
            form=r"true|gaussian|orthogonal|pissa|pissa_niter_[1-9]\d*",
            expected="true, gaussian, orthogonal, pissa or pissa_niter_N",
        ),
    ] = "true"
    lora_checkpoint: Annotated[
        Path | None,
        Entry(LORA, "Start from this LoRA file, in any spelling that `lorafuse inspect` knows; its scale is kept."),
    ] = None
    trainable_models: Annotated[str, Entry(LORA, "Must be empty: a LoRA is trained, never the whole model.")] = ""

    @property
    def alpha(self) -> float:
        """The LoRA's alpha; its rank where the user gave none."""
        return float(self.lora_rank) if self.lora_alpha is None else self.lora_alpha

    @property
    def starts_from_components(self) -> bool:
        """Whether the LoRA starts as the principal components of each weight."""
        return self.init_lora_weights.startswith("pissa")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How many steps of how many pictures."""

    task: Annotated[str, Entry(TRAINING, "sft: flow matching on pictures with captions.", choices=("sft",))] = "sft"
    num_epochs: Annotated[int, Entry(TRAINING, "Passes over the dataset.", bounds=ONE_OR_MORE)] = 1
    max_train_steps: Annotated[
        int | None, Entry(TRAINING, "Optimizer steps; decides over --num_epochs where given.", bounds=ONE_OR_MORE)
    ] = None
    train_batch_size: Annotated[int, Entry(TRAINING, "Pictures in one pass, of one size.", bounds=ONE_OR_MORE)] = 1
    gradient_accumulation_steps: Annotated[
        int, Entry(TRAINING, "Passes in one optimizer step.", bounds=ONE_OR_MORE)
    ] = 1
    seed: Annotated[int, Entry(TRAINING, "Decides order, noise and initial weights.", bounds=SEED)] = 42


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """How the LoRA follows its gradient."""

    optimizer: Annotated[
        str,
        Entry(
            OPTIMIZER,
            "adamw, adamw8bit (bitsandbytes), prodigy (prodigyopt), adafactor, or any class as package.module.Class.",
            form=r"adamw|adamw8bit|prodigy|adafactor|[A-Za-z_]\w*(\.[A-Za-z_]\w*)+",
            expected="adamw, adamw8bit, prodigy, adafactor or a class such as torch.optim.NAdam",
        ),
    ] = "adamw"
    optimizer_args: Annotated[
        tuple[tuple[str, Any], ...],
        Entry(OPTIMIZER, "A further argument of the optimizer, such as betas=[0.9,0.95]. Repeatable; mapping in YAML."),
    ] = ()
    learning_rate: Annotated[
        float | None, Entry(OPTIMIZER, "Peak learning rate. Default: 1e-4, and 1 for prodigy.", bounds=NOT_NEGATIVE)
    ] = None
    lr_scheduler: Annotated[str, Entry(OPTIMIZER, "Course of the learning rate.", choices=LR_SCHEDULERS)] = (
        "constant_with_warmup"
    )
    lr_warmup_steps: Annotated[
        int | None,
        Entry(OPTIMIZER, "Steps until the peak. Default: a tenth of the run, at most 50.", bounds=NOT_NEGATIVE),
    ] = None
    lr_num_cycles: Annotated[int, Entry(OPTIMIZER, "Restarts of cosine_with_restarts.", bounds=ONE_OR_MORE)] = 1
    lr_power: Annotated[float, Entry(OPTIMIZER, "Power of polynomial.", bounds=POSITIVE)] = 1.0
    adam_beta1: Annotated[float, Entry(OPTIMIZER, "beta1 of AdamW and Prodigy.", bounds=NOT_WHOLE)] = 0.9
    adam_beta2: Annotated[float, Entry(OPTIMIZER, "beta2 of AdamW and Prodigy.", bounds=NOT_WHOLE)] = 0.999
    adam_weight_decay: Annotated[float, Entry(OPTIMIZER, "Their weight decay.", bounds=NOT_NEGATIVE)] = 0.01
    adam_epsilon: Annotated[float, Entry(OPTIMIZER, "Their epsilon.", bounds=POSITIVE)] = 1e-8
    max_grad_norm: Annotated[
        float, Entry(OPTIMIZER, "Longer gradients are cut to this norm; 0: never.", bounds=NOT_NEGATIVE)
    ] = 1.0
    ema_decay: Annotated[
        float,
        Entry(
            OPTIMIZER,
            (
                "Keep a moving average of the LoRA's weights, such as 0.999; it is what is saved and sampled. "
                "Its decay grows as (1 + n) / (10 + n) up to this. 0: none."
            ),
            bounds=NOT_WHOLE,
        ),
    ] = 0.0
    ema_update_after_step: Annotated[
        int, Entry(OPTIMIZER, "Until this step the average is the weights themselves.", bounds=NOT_NEGATIVE)
    ] = 0

    @property
    def peak_learning_rate(self) -> float:
        """`--learning_rate`, or what suits the optimizer."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1.0 if self.optimizer == PRODIGY else 1e-4

    def warmup_steps(self, total_steps: int) -> int:
        """Steps until the learning rate's peak in a run of `total_steps`."""
        if self.lr_scheduler == "constant":
            return 0
        return min(50, total_steps // 10) if self.lr_warmup_steps is None else self.lr_warmup_steps


@dataclass(frozen=True, kw_only=True)
class NoiseOptions:
    """Which noise levels are drawn, and how much each part of the loss counts."""

    timestep_sampling: Annotated[
        str,
        Entry(
            NOISE,
            (
                "Density of the noise levels: uniform; logit_normal; shift: logit_normal, shifted as the pipeline's "
                "scheduler does at the picture's size; manifest: only the few-step ones of lorafuse.json; "
                "mix:P: those for a share P of the pictures, else shift."
            ),
            form=r"uniform|logit_normal|shift|manifest|mix:(0|1|0?\.\d+|[01]\.0*)",
            expected="uniform, logit_normal, shift, manifest or mix:P with a P from 0 to 1",
        ),
    ] = "shift"
    logit_mean: Annotated[float, Entry(NOISE, "Mean of the logit-normal density.")] = 0.0
    logit_std: Annotated[float, Entry(NOISE, "Width of the logit-normal density.", bounds=POSITIVE)] = 1.0
    timestep_shift: Annotated[
        str | None,
        Entry(
            NOISE,
            (
                "s in sigma = s u / (1 + (s - 1) u), or auto: the pipeline's at the picture's size. "
                "Default: auto for shift and mix, else 1."
            ),
            form=rf"{AUTO}|{NUMBER}",
            expected="auto or a number above 0",
        ),
    ] = None
    min_timestep: Annotated[
        float | None,
        Entry(
            NOISE,
            (
                "Draw no noise level below this, of 0 (a clean picture) to 1000 (noise). Default: 0, or where the "
                "range of the trained expert begins."
            ),
            bounds=TIMESTEPS,
        ),
    ] = None
    max_timestep: Annotated[
        float | None,
        Entry(
            NOISE,
            (
                "Draw none above this; both cut the density off, and do not squeeze it. Default: 1000, or where the "
                "range of the trained expert ends."
            ),
            bounds=TIMESTEPS,
        ),
    ] = None
    loss_weighting: Annotated[
        str,
        Entry(
            NOISE,
            "How a picture counts by its noise level: none: all alike; sigma_sqrt: 1/sigma^2; cosmap: most at 500.",
            choices=LOSS_WEIGHTINGS,
        ),
    ] = "none"
    caption_dropout: Annotated[
        float,
        Entry(
            NOISE, "Share of the pictures that train with an empty caption; for models that use guidance.", bounds=SHARE
        ),
    ] = 0.0
    masked_loss: Annotated[
        str | None,
        Entry(
            NOISE,
            (
                "Learn only where a mask is white: alpha: the picture's own transparency; "
                "otherwise the metadata column that names mask files."
            ),
        ),
    ] = None
    masked_loss_background: Annotated[
        float, Entry(NOISE, "How much what lies outside the mask counts, 1 being as much as inside.", bounds=SHARE)
    ] = 0.0

    @property
    def mask_column(self) -> str | None:
        """The metadata column that names masks; None where none does."""
        return None if self.masked_loss == ALPHA else self.masked_loss

    @property
    def few_step_share(self) -> float:
        """How many of the noise levels are the manifest's."""
        return {"manifest": 1.0}.get(self.timestep_sampling, float(self.timestep_sampling.partition(":")[2] or 0))

    @property
    def fixed_shift(self) -> float | None:
        """The shift for all sizes; None where it is the pipeline's at each size."""
        if self.timestep_shift in (None, AUTO):
            follows = self.timestep_shift == AUTO or self.timestep_sampling not in ("uniform", "logit_normal")
            return None if follows else 1.0
        return float(str(self.timestep_shift))
