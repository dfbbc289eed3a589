"""The options of `lorafuse-train sample`, and how they are read and checked."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from lorafuse_common.errors import ConfigError
from lorafuse_train.options.entry import BASE, LORA, MEMORY, ONE_OR_MORE, OUTPUT, SAMPLES, SEED, Entry
from lorafuse_train.options.option import Option, option_of


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """Everything that `sample` can be told."""

    fused_model: Annotated[Path, Entry(BASE, "Folder that `lorafuse fuse` wrote: a pipeline or a transformer.")]
    allow_unfused_base: Annotated[bool, Entry(BASE, "Accept a --fused_model without lorafuse.json.")] = False
    pretrained_model_name_or_path: Annotated[
        Path | None,
        Entry(BASE, "Pipeline folder with VAE and text encoder, where --fused_model is a bare transformer folder."),
    ] = None
    lora: Annotated[
        tuple[str, ...],
        Entry(
            LORA,
            (
                "FILE[:STRENGTH][@COMPONENT]: a LoRA in any spelling that `lorafuse inspect` knows; several are added "
                "up. Repeatable. Every prompt is drawn without and with them."
            ),
        ),
    ] = ()
    allow_base_mismatch: Annotated[bool, Entry(LORA, "Accept a --lora that was trained on another base.")] = False
    prompt: Annotated[tuple[str, ...], Entry(SAMPLES, "What to draw. Repeatable.")] = ()
    prompts_file: Annotated[
        Path | None,
        Entry(
            SAMPLES,
            (
                "Prompts from a file: .txt with one a line; .csv, .json, .jsonl or .yaml with prompt and, where "
                "wanted, seed, height, width, steps, guidance_scale, negative_prompt and edit_image."
            ),
        ),
    ] = None
    negative_prompt: Annotated[str, Entry(SAMPLES, "What the guidance leads away from.")] = " "
    edit_image: Annotated[
        tuple[Path, ...], Entry(SAMPLES, "A picture that an edit model starts from, for every --prompt. Repeatable.")
    ] = ()
    steps: Annotated[
        int | None,
        Entry(
            SAMPLES,
            "Steps, as the pipeline spaces them. Default: the few-step schedule of lorafuse.json, else 30.",
            bounds=ONE_OR_MORE,
        ),
    ] = None
    guidance_scale: Annotated[
        float | None,
        Entry(SAMPLES, "Guidance; 1: none. Default: that of lorafuse.json, else the family's.", bounds=ONE_OR_MORE),
    ] = None
    height: Annotated[int | None, Entry(SAMPLES, "With --width: pixels. Default: what the LoRA was trained at.")] = None
    width: Annotated[int | None, Entry(SAMPLES, "With --height: pixels. Else 1024.")] = None
    num_frames: Annotated[
        int, Entry(SAMPLES, "Frames, for models that draw videos; 1: a picture.", bounds=ONE_OR_MORE)
    ] = 1
    seed: Annotated[
        int, Entry(SAMPLES, "Noise of `torch.Generator().manual_seed(SEED)`, the same for every prompt.", bounds=SEED)
    ] = 0
    base_dtype: Annotated[
        str,
        Entry(MEMORY, "Precision of the base; auto: as stored, or bf16 for fp16.", choices=("auto", "bf16", "fp32")),
    ] = "auto"
    mixed_precision: Annotated[
        str, Entry(MEMORY, "Compute in bf16; auto: when the base is bf16.", choices=("auto", "bf16", "no"))
    ] = "auto"
    output_path: Annotated[Path, Entry(OUTPUT, "Folder for grid.png and a PNG for each picture.")]


_HINTS = typing.get_type_hints(SampleConfig, include_extras=True)
SAMPLE_OPTIONS: Mapping[str, Option] = {
    field.name: option_of(field, _HINTS[field.name]) for field in dataclasses.fields(SampleConfig)
}


def resolve_sample(given: Mapping[str, Any]) -> SampleConfig:
    """The options of a run: what was `given` on the command line, then defaults; None and [] mean "not given".

    Raises:
        ConfigError: listing every wrong type, value out of range, missing option and contradiction.
    """
    chosen = {name: raw for name, raw in given.items() if raw is not None and raw != []}
    faults: list[str] = []
    values: dict[str, Any] = {}
    for name, raw in chosen.items():
        try:
            values[name] = SAMPLE_OPTIONS[name].read(raw)
        except ValueError as error:
            faults.append(f"--{name}: {error}")
    faults += [f"--{name} is missing" for name, o in SAMPLE_OPTIONS.items() if o.required and name not in chosen]
    if "prompt" not in chosen and "prompts_file" not in chosen:
        faults.append("--prompt, --prompts_file: nothing to draw; give one of them")
    if any(not str(text).strip() for text in values.get("prompt", ())):
        faults.append("--prompt: is empty")
    if ("height" in chosen) != ("width" in chosen):
        faults.append("--height, --width: give both, or neither")
    if faults:
        raise ConfigError("the options cannot be used:\n" + "\n".join(f"  {fault}" for fault in faults))
    return SampleConfig(**values)


@dataclass(frozen=True, slots=True)
class WantedLora:
    """One `--lora`."""

    path: Path
    strength: float = 1.0
    component: str | None = None
    """The transformer it is for, where the user said."""


def parse_lora(text: str) -> WantedLora:
    """FILE[:STRENGTH][@COMPONENT]; a path that exists wins.

    Raises:
        ConfigError: no such file, or what follows the colon is no strength.
    """
    if Path(text).expanduser().is_file():
        return WantedLora(Path(text).expanduser())
    rest, at, component = text.rpartition("@")
    if not at or "/" in component or ":" in component:
        rest, component = text, ""
    head, colon, tail = rest.rpartition(":")
    strength = 1.0
    if colon and not Path(rest).expanduser().is_file():
        try:
            strength = float(tail)
        except ValueError:
            raise ConfigError(f"--lora {text}: {tail!r} is no strength; expected FILE[:STRENGTH][@COMPONENT]") from None
        rest = head
    if not -1e3 < strength < 1e3:
        raise ConfigError(f"--lora {text}: strength {strength:g} is out of range; strengths are about 1")
    path = Path(rest).expanduser()
    if not path.is_file():
        raise ConfigError(f"--lora {text}: no file {path}")
    return WantedLora(path, strength, component or None)
