"""Options: one source for command line, YAML and defaults, and every fault at once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer.main

from lorafuse_common.errors import ConfigError
from lorafuse_train import cli
from lorafuse_train.options.config import TrainConfig
from lorafuse_train.options.options import OPTIONS, dump_config, resolve_config

GIVEN: dict[str, Any] = {"fused_model": "fused", "dataset_base_path": "data", "output_path": "out"}
NAMES = [
    "fused_model",
    "lora_fused",
    "allow_unfused_base",
    "allow_base_mismatch",
    "verify",
    "pretrained_model_name_or_path",
    "original_model",
    "dataset_base_path",
    "dataset_metadata_path",
    "data_file_keys",
    "dataset_control_path",
    "dataset_repeat",
    "max_pixels",
    "height",
    "width",
    "cache_dir",
    "component",
    "num_frames",
    "frame_rate",
    "image_column",
    "caption_column",
    "dataset_name",
    "dataset_config_name",
    "dataset_split",
    "lora_base_model",
    "lora_target_modules",
    "lora_rank",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "lora_dropout",
    "use_dora",
    "use_rslora",
    "init_lora_weights",
    "lora_checkpoint",
    "trainable_models",
    "task",
    "num_epochs",
    "max_train_steps",
    "train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "optimizer",
    "optimizer_args",
    "learning_rate",
    "lr_scheduler",
    "lr_warmup_steps",
    "lr_num_cycles",
    "lr_power",
    "adam_beta1",
    "adam_beta2",
    "adam_weight_decay",
    "adam_epsilon",
    "max_grad_norm",
    "ema_decay",
    "ema_update_after_step",
    "timestep_sampling",
    "logit_mean",
    "logit_std",
    "timestep_shift",
    "min_timestep",
    "max_timestep",
    "loss_weighting",
    "caption_dropout",
    "masked_loss",
    "masked_loss_background",
    "objective_base",
    "preserve_weight",
    "preserve_share",
    "preserve_prompts",
    "preserve_count",
    "noise_coupling",
    "train_adapter",
    "dedistill_prompts",
    "dedistill_pictures",
    "base_dtype",
    "mixed_precision",
    "use_gradient_checkpointing",
    "max_memory",
    "validation_prompt",
    "validation_prompts",
    "validation_steps",
    "validation_inference_steps",
    "validation_guidance_scale",
    "validation_negative_prompt",
    "validation_seed",
    "validation_split",
    "validation_dataset_path",
    "validation_loss_steps",
    "json",
    "verify_sample",
    "contact_sheet",
    "contact_sheet_pictures",
    "output_path",
    "overwrite_output_dir",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "resume_from_checkpoint",
    "report_to",
    "tracker_project_name",
    "config",
    "lora_name",
    "trigger_phrase",
    "export",
    "push_to_hub",
    "hub_model_id",
    "hub_private",
]


def test_the_surface_is_frozen() -> None:
    """A new option is a decision; it belongs in this list and in the documentation."""
    assert list(OPTIONS) == NAMES
    commands = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
    assert {"train", "show-timesteps"} <= set(commands)
    for name in ("train", "show-timesteps", "check", "cache"):
        taken = {option.name for option in OPTIONS.values() if name in (option.entry.commands or (name,))}
        assert {parameter.name for parameter in commands[name].params} == taken
    assert all(option.entry.help and option.entry.panel for option in OPTIONS.values())


def test_the_command_line_wins_over_the_file_and_the_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("lora-rank: 8\nlearning_rate: 2e-4\nseed: null\nvalidation_prompt: [a, b]\nverify: yes\n")
    config = resolve_config({**GIVEN, "config": str(file), "lora_rank": "16"})
    assert (config.lora_rank, config.learning_rate, config.seed) == (16, 2e-4, 42)
    assert config.validation_prompt == ("a", "b")
    assert config.verify is True
    assert config.dataset_base_path == Path("data")


def test_required_options_may_stand_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("\n".join(f"{name}: {value}" for name, value in GIVEN.items()))
    assert resolve_config({"config": str(file)}) == TrainConfig(
        fused_model=Path("fused"), dataset_base_path=Path("data"), output_path=Path("out"), config=file
    )


def test_every_fault_is_reported_at_once(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("lora_rnk: 8\nnum_epochs: [3]\nadam_beta1: 2\nlogit_mean: 1\nlogit-mean: 2\n")
    given = {"config": str(file), "lora_rank": "many", "task": "dpo", "height": "64", "trainable_models": "dit"}
    with pytest.raises(ConfigError) as caught:
        resolve_config(given)
    message = str(caught.value)
    for part in (
        "unknown key 'lora_rnk' (did you mean 'lora_rank'?)",
        f"{file}: logit_mean is given twice",
        f"{file}: num_epochs: found [3], expected a whole number",
        f"{file}: adam_beta1: found 2.0, expected at least 0 and below 1",
        "--lora_rank: found 'many', expected a whole number",
        "--task: found 'dpo', expected 'sft'",
        "height, width: give both",
        "trainable_models: must be empty",
        *(f"--{name} is missing" for name in GIVEN),
    ):
        assert part in message


@pytest.mark.parametrize("text", ["- a list", "just text", "a: [", "\0"])
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"train\.yaml"):
        resolve_config({**GIVEN, "config": str(file)})
    with pytest.raises(ConfigError, match="cannot be read"):
        resolve_config({**GIVEN, "config": str(tmp_path / "absent.yaml")})


@pytest.mark.parametrize("raw", [True, 1.5, [1], {}, "", "nan"])
def test_values_that_are_no_whole_number(raw: Any) -> None:
    with pytest.raises(ConfigError, match="lora_rank"):
        resolve_config({**GIVEN, "lora_rank": raw})


@pytest.mark.parametrize("raw", ["nan", "inf", True, "fast"])
def test_values_that_are_no_number(raw: Any) -> None:
    with pytest.raises(ConfigError, match="learning_rate"):
        resolve_config({**GIVEN, "learning_rate": raw})


def test_what_is_dumped_reads_back_as_the_same_config(tmp_path: Path) -> None:
    given = {"validation_prompt": ["ünï: {x}", "b"], "lora_fused": ["a b.safetensors"], "init_lora_weights": "true"}
    patterns = {"rank_pattern": ["to_q=8", "regex:.*=[12]=4"], "optimizer_args": ["betas=[0.9, 0.99]", "eps=1e-8"]}
    config = resolve_config({**GIVEN, **given, **patterns})
    file = tmp_path / "train_config.yaml"
    file.write_text(dump_config(config))
    again = resolve_config({"config": str(file)})
    assert dump_config(again) == dump_config(config)
    for name in (*given, *patterns):
        assert getattr(again, name) == getattr(config, name)
    assert again.rank_pattern == (("to_q", 8), ("regex:.*=[12]", 4))


def test_dashes_work_in_names_and_stay_in_values(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def record(given: dict[str, Any]) -> TrainConfig:
        seen.append({name: value for name, value in given.items() if value})
        raise ConfigError("enough")

    monkeypatch.setattr(cli, "resolve_config", record)
    arguments = ["train", "--lora-rank", "8", "--validation-prompt", "--a-b", "--output_path=my-out", "--verify"]
    with pytest.raises(ConfigError, match="enough"):
        cli.app([*arguments, "--validation_prompt", "c"], standalone_mode=False)
    assert seen == [{"lora_rank": "8", "validation_prompt": ["--a-b", "c"], "output_path": "my-out", "verify": True}]


def test_a_fault_is_one_message_and_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["lorafuse-train", "train", "--lora_rank", "x"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    out, err = capsys.readouterr()
    assert (caught.value.code, out) == (1, "")
    assert err.startswith("lorafuse-train: the options cannot be used:")
    monkeypatch.setenv("RANK", "1")  # only the main process of several speaks
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr() == ("", "")


def test_help_waits_for_no_heavy_import() -> None:
    code = (
        "import sys; from lorafuse_train.cli import app\n"
        "try: app(['train', '--help'])\nexcept SystemExit: pass\n"
        "print(*{'torch', 'diffusers', 'peft', 'accelerate', 'transformers'} & set(sys.modules))"
    )
    path = ":".join(entry for entry in sys.path if entry)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": path, "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "--lora_rank" in done.stdout
    assert done.stdout.splitlines()[-1] == ""
