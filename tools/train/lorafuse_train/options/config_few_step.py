"""The options that keep what was fused: which weights the loss runs through, and what is held to the fused base."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from lorafuse_train.options.entry import FEW_STEP, ONE_OR_MORE, Bounds, Entry

AUTO, FUSED, ORIGINAL, WITHOUT = "auto", "fused", "original", "without:"
NUMBER = r"\d+\.?\d*(?:[eE][+-]?\d+)?|\.\d+"
MINIBATCH_OT, NEAREST = "minibatch_ot", "nearest:"
MAKE_DEDISTILL = "make_dedistill"
MOST_MATCHED = 16
"""The largest micro-batch whose pictures and noises are matched: the time doubles with each more."""


@dataclass(frozen=True, kw_only=True)
class FewStepOptions:
    """How a training on a few-step base keeps its few-step ability."""

    objective_base: Annotated[
        str,
        Entry(
            FEW_STEP,
            (
                "The weights that the training loss runs through. fused: as they are; original: without what was "
                "fused, by the fused LoRAs at strength -1 or, where they cannot be had, the weights of "
                "--original_model; without:FILE,...: without these of the fused LoRAs, by name, so that a fused style "
                "stays. Samples and --preserve_weight use the fused ones. auto: for a few-step base of role deploy "
                "without the LoRAs that brought the few steps where lorafuse.json tells them, else original; for "
                "others fused."
            ),
            form=rf"{AUTO}|{FUSED}|{ORIGINAL}|{WITHOUT}.+",
            expected=f"{AUTO}, {FUSED}, {ORIGINAL} or {WITHOUT}NAME of a fused LoRA",
        ),
    ] = AUTO
    preserve_weight: Annotated[
        str,
        Entry(
            FEW_STEP,
            (
                "Weight of a second loss that holds the LoRA's predictions to the fused base's, for other prompts, "
                "along its own few-step trajectories. auto: 1 for a few-step base of role deploy, else 0 (none)."
            ),
            form=rf"{AUTO}|{NUMBER}",
            expected="auto or a number, 0 or more",
        ),
    ] = AUTO
    preserve_share: Annotated[
        float,
        Entry(
            FEW_STEP,
            "For how many of the pictures that loss is computed: less is faster, at the same weight in the mean.",
            bounds=Bounds(0, 1, open=True),
        ),
    ] = 0.5
    preserve_prompts: Annotated[
        Path | None,
        Entry(FEW_STEP, "Text file with its prompts, one a line. Default: a list for the family."),
    ] = None
    preserve_count: Annotated[
        int,
        Entry(FEW_STEP, "How many trajectories it draws from; kept beside the fused checkpoint.", bounds=ONE_OR_MORE),
    ] = 128
    noise_coupling: Annotated[
        str,
        Entry(
            FEW_STEP,
            (
                "Experimental. Which noise a picture trains with. none: its own draw; nearest:K: the nearest of K; "
                "minibatch_ot: those of a batch dealt out so that the sum of squared distances is least."
            ),
            form=rf"none|{MINIBATCH_OT}|{NEAREST}[1-9]\d*",
            expected="none, minibatch_ot or nearest:K",
        ),
    ] = "none"
    train_adapter: Annotated[
        Path | None,
        Entry(
            FEW_STEP,
            (
                "FILE or FILE:STRENGTH: a LoRA that is added to the base for the training loss only, such as a "
                "de-distill adapter; not in samples, and never saved."
            ),
        ),
    ] = None

    dedistill_prompts: Annotated[
        Path | None,
        Entry(
            FEW_STEP,
            "Text file with the prompts of the pictures, one a line. Default: a list for the family.",
            commands=(MAKE_DEDISTILL,),
        ),
    ] = None
    dedistill_pictures: Annotated[
        int,
        Entry(
            FEW_STEP,
            "How many pictures the base draws; each prompt is drawn as often as it takes.",
            bounds=ONE_OR_MORE,
            commands=(MAKE_DEDISTILL,),
        ),
    ] = 1000

    @property
    def preserve_number(self) -> float | None:
        """`--preserve_weight`; None for auto."""
        return None if self.preserve_weight == AUTO else float(self.preserve_weight)

    @property
    def names_off(self) -> tuple[str, ...]:
        """The LoRAs that `--objective_base without:` names."""
        return tuple(self.objective_base.removeprefix(WITHOUT).split(",")) if WITHOUT in self.objective_base else ()

    @property
    def nearest_of(self) -> int:
        """From how many noises the nearest is taken."""
        return int(self.noise_coupling.removeprefix(NEAREST)) if self.noise_coupling.startswith(NEAREST) else 1

    @property
    def train_adapter_file(self) -> tuple[Path, float] | None:
        """The file of `--train_adapter`, and its strength."""
        if self.train_adapter is None:
            return None
        head, colon, tail = str(self.train_adapter).rpartition(":")
        if colon and not self.train_adapter.is_file():
            try:
                return Path(head), float(tail)
            except ValueError:
                pass  # a colon of the path itself
        return self.train_adapter, 1.0
