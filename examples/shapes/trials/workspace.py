"""The folder of an experiment: what all trainings share, each made once."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from maker.text import all_captions

from trials.measure import train_style_judge
from trials.variants import OLD_PROMPTS, TrainedOn

DEMO = Path(__file__).parents[1]
PICTURES = 128
COMMON = {
    "lora_rank": "16",
    "learning_rate": "2e-3",
    "lr_scheduler": "cosine",
    "lr_warmup_steps": "20",
    "train_batch_size": "16",
    "base_dtype": "fp32",
    "report_to": "none",
    "validation_inference_steps": "16",
    "validation_guidance_scale": "2",
}
"""What every training has in common; that of the demo's train.yaml."""
DEDISTILL = {"lora_rank": "16", "learning_rate": "5e-4", "lr_scheduler": "cosine", "train_batch_size": "16",
             "base_dtype": "fp32", "report_to": "none", "validation_inference_steps": "16"}  # fmt: skip
"""How the scaffold is trained; a low rate, for its size."""


@dataclass(frozen=True, slots=True)
class Workspace:
    """Where everything lies, and how much of it there is."""

    out: Path
    steps: int
    style: str
    samples: int
    """Pictures a score."""
    threads: int

    @property
    def judge(self) -> Path:
        """The classifier."""
        return self.out / "judge.pt"

    @property
    def dataset(self) -> Path:
        """Pictures of the new style."""
        return self.out / f"dataset-{self.style}"

    def checkpoint(self, which: TrainedOn) -> Path:
        """A pipeline folder."""
        if which is TrainedOn.ORIGINAL:
            return DEMO / "base"
        return self.out / (f"{which}-{self.steps}" if which is TrainedOn.SCAFFOLD else which)

    def run_of(self, name: str) -> Path:
        """What belongs to one training, named by variant and seed, or to the base as it is."""
        return self.out / f"{self.style}-{self.steps}-{self.samples}" / name

    def prepare(self, needs: set[TrainedOn]) -> None:
        """Make what is not there: checkpoints, data set, classifier."""
        self.out.mkdir(parents=True, exist_ok=True)
        fused = self.checkpoint(TrainedOn.FUSED)
        if not (fused / "lorafuse.json").is_file():
            self.call("lorafuse_fuse", "fuse", str(DEMO / "base"), "--lora", str(DEMO / "lightning.safetensors"),
                      "--out", str(fused))  # fmt: skip
        if not (self.dataset / "metadata.csv").is_file():
            self.python(str(DEMO / "make_dataset.py"), "--out", str(self.dataset), "--style", self.style,
                        "--count", str(PICTURES))  # fmt: skip
        if not self.judge.is_file():
            torch.set_num_threads(self.threads)
            unfinished = self.judge.with_suffix(".tmp")
            torch.save(train_style_judge().state_dict(), unfinished)
            unfinished.replace(self.judge)
        if TrainedOn.SCAFFOLD in needs and not (self.checkpoint(TrainedOn.SCAFFOLD) / "lorafuse.json").is_file():
            self._make_scaffold(fused)

    def _make_scaffold(self, fused: Path) -> None:
        """A de-distill adapter of the fused base, fused into it."""
        adapter = self.out / f"dedistill-{self.steps}"
        options = flags({**DEDISTILL, "max_train_steps": str(self.steps), "height": "64", "width": "64"})
        lora, out = adapter / "pytorch_lora_weights.safetensors", self.checkpoint(TrainedOn.SCAFFOLD)
        self.call(
            "lorafuse_train", "make-dedistill", "--fused_model", str(fused), "--output_path", str(adapter),
            "--overwrite_output_dir", "--dedistill_prompts", OLD_PROMPTS, "--dedistill_pictures", "256", *options,
        )  # fmt: skip
        self.call("lorafuse_fuse", "fuse", str(fused), "--lora", str(lora), "--role", "scaffold", "--out", str(out))

    def call(self, module: str, *arguments: str) -> None:
        """Run a command of lorafuse, which prints what it does."""
        self.python("-m", module, *arguments)

    def python(self, *arguments: str) -> None:
        """Run Python in a process of its own, which gives back its memory."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "HF_HUB_OFFLINE": "1"}
        subprocess.run([sys.executable, *arguments], check=True, env=environment)


def flags(options: dict[str, str]) -> list[str]:
    """Options as a command line has them."""
    return [part for name, value in options.items() for part in (f"--{name}", value)]


def write_json(path: Path, value: object) -> None:
    """A file that appears complete or not at all, so that an interrupted experiment goes on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def write_prompts(path: Path) -> None:
    """Every plain caption, in an order that mixes them; how `prompts.txt` was made."""
    captions = all_captions()
    random.Random(0).shuffle(captions)
    path.write_text("\n".join(captions) + "\n", encoding="utf-8")
