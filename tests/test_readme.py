"""The README is true: every flag is in it, and every flag in it exists."""

from __future__ import annotations

import re

import typer
from conftest import ROOT

from lorafuse_fuse.cli import app
from lorafuse_train.options.options import OPTIONS
from lorafuse_train.samples.sample_options import SAMPLE_OPTIONS

README = (ROOT / "README.md").read_text(encoding="utf-8")
MENTIONED = set(re.findall(r"--[a-z][a-z0-9_-]*", README))
ELSEWHERE = {
    "--local-dir",  # hf download
    "--multi_gpu", "--num_processes", "--cpu",  # accelerate launch
    "--preset_lora_path", "--preset_lora_model", "--model_paths", "--model_id_with_origin_paths",  # DiffSynth-Studio
    "--stage", "--threads",  # the demo's maker
    "--help", "--strict",
}  # fmt: skip


def fuse_flags() -> set[str]:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return {flag for command in commands.values() for param in command.params for flag in param.opts if "--" in flag}


def train_flags() -> set[str]:
    return {f"--{name}" for name in (*OPTIONS, *SAMPLE_OPTIONS)}


def test_every_flag_has_its_place() -> None:
    assert fuse_flags() | train_flags() <= MENTIONED


def test_every_flag_named_exists() -> None:
    assert fuse_flags() | train_flags() | ELSEWHERE >= MENTIONED


def test_every_target_is_listed() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = next(line for line in makefile.splitlines() if line.startswith(".PHONY")).split()[1:]
    assert all(re.search(rf"^{target}:.*## \S", makefile, re.MULTILINE) for target in phony)
    assert set(re.findall(r"\bmake ([a-z]+)\b", README)) - {"help"} <= set(phony)
