"""Options that are each in order and contradict each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TypeAlias

from lorafuse_train.options.config import AUTO_KEYS, IMAGE, NO_TRACKER, PROMPT, VIDEO, TrainConfig
from lorafuse_train.options.config_few_step import MINIBATCH_OT, MOST_MATCHED
from lorafuse_train.options.config_training import PRODIGY, WITH_ADAM

Fault: TypeAlias = tuple[tuple[str, ...], str]
"""The options that are at odds, and what to do."""
DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
ADAM = {"adam_beta1": "betas", "adam_beta2": "betas", "adam_weight_decay": "weight_decay", "adam_epsilon": "eps"}
"""Options with a name of their own, and how optimizers call them."""


def conflicts(config: TrainConfig) -> list[Fault]:
    """Everything in the options that contradicts itself."""
    return [
        *_general(config),
        *_files(config),
        *_video(config),
        *_lora(config),
        *_schedule(config),
        *_optimizer(config),
        *_noise(config),
        *_loss(config),
        *_validation(config),
        *_few_step(config),
        *_result(config),
    ]


def _changed(config: TrainConfig, *names: str) -> list[str]:
    """Those of the options that are not as they are by default."""
    return [name for name in names if getattr(config, name) != DEFAULTS[name]]


def _files(config: TrainConfig) -> Iterator[Fault]:
    keys = config.file_keys
    if config.data_file_keys != AUTO_KEYS:
        if not {IMAGE, VIDEO} & {*keys}:
            yield ("data_file_keys",), f"names neither {IMAGE} nor {VIDEO}, which is what is learned"
        if PROMPT in keys or "" in keys or len({*keys}) < len(keys):
            yield ("data_file_keys",), "expected columns that hold files, each once"


def _video(config: TrainConfig) -> Iterator[Fault]:
    if config.num_frames is not None and config.num_frames % 4 != 1:
        n = config.num_frames // 4
        yield ("num_frames",), f"expected 4n + 1 frames, such as {4 * n + 1} or {4 * n + 5}"


def _general(config: TrainConfig) -> Iterator[Fault]:
    if config.trainable_models:
        yield ("trainable_models",), "must be empty; a LoRA is trained here, never the whole model"
    if (config.height is None) != (config.width is None):
        yield ("height", "width"), "give both, or neither and --max_pixels"
    if not config.lora_target_modules.strip():
        yield ("lora_target_modules",), "is empty; give `preset`, name endings or `regex:PATTERN`"
    if NO_TRACKER in config.report_to and len(config.report_to) > 1:
        yield ("report_to",), f"{NO_TRACKER} leaves no room for others"
    if any(not prompt.strip() for prompt in config.validation_prompt):
        yield ("validation_prompt",), "is empty"


def _lora(config: TrainConfig) -> Iterator[Fault]:
    if config.use_dora and config.starts_from_components:
        yield ("use_dora", "init_lora_weights"), "a DoRA that starts from components has no file for the base as it is"
    if config.lora_checkpoint and config.init_lora_weights != "true":
        yield ("lora_checkpoint", "init_lora_weights"), "both say how the LoRA starts"
    if config.init_lora_weights == "orthogonal":
        for name, ranks in (("lora_rank", [config.lora_rank]), ("rank_pattern", [r for _, r in config.rank_pattern])):
            if any(rank % 2 for rank in ranks):
                yield (name, "init_lora_weights"), "orthogonal needs even ranks"


def _schedule(config: TrainConfig) -> Iterator[Fault]:
    if config.lr_scheduler == "constant" and config.lr_warmup_steps:
        yield ("lr_warmup_steps",), "'constant' has no warm-up; use --lr_scheduler constant_with_warmup"
    for name, scheduler in (("lr_num_cycles", "cosine_with_restarts"), ("lr_power", "polynomial")):
        if _changed(config, name) and config.lr_scheduler != scheduler:
            yield (name, "lr_scheduler"), f"is for --lr_scheduler {scheduler}, which was not asked for"


def _optimizer(config: TrainConfig) -> Iterator[Fault]:
    given = dict(config.optimizer_args)
    if "lr" in given:
        yield ("optimizer_args",), "lr is --learning_rate"
    if "params" in given:
        yield ("optimizer_args",), "params are the LoRA's weights"
    for name in _changed(config, *ADAM):
        if config.optimizer not in WITH_ADAM:
            yield (name, "optimizer"), f"is not for {config.optimizer}; give its own arguments as --optimizer_args"
        elif ADAM[name] in given:
            yield (name, "optimizer_args"), f"both say {ADAM[name]}"
    if config.optimizer == PRODIGY and config.peak_learning_rate <= 0.1:
        yield (
            ("learning_rate", "optimizer"),
            f"prodigy finds its own rate and multiplies it with this one, {config.peak_learning_rate:g}; "
            "leave --learning_rate out, or give about 1",
        )
    if config.ema_update_after_step and not config.ema_decay:
        yield ("ema_update_after_step", "ema_decay"), "without --ema_decay there is no average"


def _noise(config: TrainConfig) -> Iterator[Fault]:
    sampling = config.timestep_sampling
    is_shifted = sampling != "manifest"
    is_normal = is_shifted and sampling != "uniform"
    for name in () if is_normal else _changed(config, "logit_mean", "logit_std"):
        yield (name, "timestep_sampling"), f"{sampling} has no logit-normal density"
    if config.timestep_shift is not None and not is_shifted:
        yield ("timestep_shift", "timestep_sampling"), "manifest takes the noise levels as they are recorded"
    if config.fixed_shift == 0:
        yield ("timestep_shift",), "expected auto or a number above 0"
    least, most = config.min_timestep, config.max_timestep
    if (0 if least is None else least) >= (1000 if most is None else most):
        yield ("min_timestep", "max_timestep"), "nothing lies between them"


def _loss(config: TrainConfig) -> Iterator[Fault]:
    if config.masked_loss_background and config.masked_loss is None:
        yield ("masked_loss_background", "masked_loss"), "without --masked_loss there is no mask"
    if config.mask_column is not None and config.mask_column.strip() in ("image", "prompt", ""):
        yield ("masked_loss",), "expected alpha, or the metadata column that names mask files"


def _validation(config: TrainConfig) -> Iterator[Fault]:
    if config.validation_split >= 1 and config.validation_split != int(config.validation_split):
        yield ("validation_split",), "expected a share below 1, or a whole number of pictures"
    if config.validation_split and config.validation_dataset_path:
        yield ("validation_split", "validation_dataset_path"), "both say what the validation loss is measured on"
    if config.validation_loss_steps and not (config.validation_split or config.validation_dataset_path):
        yield (
            ("validation_loss_steps", "validation_split"),
            "nothing is held out; give --validation_split or --validation_dataset_path",
        )


def _few_step(config: TrainConfig) -> Iterator[Fault]:
    if config.preserve_number == 0:
        for name in _changed(config, "preserve_share", "preserve_count"):
            yield (name, "preserve_weight"), "with weight 0, nothing is preserved"
    if config.noise_coupling == MINIBATCH_OT and not 1 < config.train_batch_size <= MOST_MATCHED:
        yield (
            ("noise_coupling", "train_batch_size"),
            f"{MINIBATCH_OT} deals out the noises of a batch, and is for 2 to {MOST_MATCHED} pictures",
        )


def _result(config: TrainConfig) -> Iterator[Fault]:
    for name in ("lora_name", "trigger_phrase"):
        text = getattr(config, name)
        if text is not None and not text.strip():
            yield (name,), "is empty"
    if config.push_to_hub and config.hub_model_id is None:
        yield ("hub_model_id", "push_to_hub"), "say where to: --hub_model_id owner/name"
    for name in () if config.push_to_hub else _changed(config, "hub_model_id", "hub_private"):
        yield (name, "push_to_hub"), "is for --push_to_hub, which was not asked for"
