"""The options of `lorafuse`, each with its help, for the commands that share them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorafuse_common.manifest import Role

from .choices import Components, Device, Dtype, KeepLoras, Losable, ProblemKind, Rounding

BaseArgument = Annotated[
    str,
    typer.Argument(
        help="A .safetensors file, a model folder or a whole pipeline folder; or on the hub owner/repo[@REVISION] "
        "or hf://owner/repo/PATH[@REVISION]. What exists on disk wins."
    ),
]
LoraOption = Annotated[
    list[str],
    typer.Option(
        "--lora", "--lora_fused", "--lora-fused", metavar="FILE[:STRENGTH][@COMPONENT]", show_default=False,
        help="A LoRA to fuse, strength 1 where none is given; repeat it for several. The format is detected. "
        "@transformer_2 fuses it into that transformer of the pipeline (Wan 2.2 has two). "
        "On the hub: hf://owner/repo/FILE[@REVISION], or owner/repo where it holds one LoRA.",
    ),
]  # fmt: skip
OutOption = Annotated[Path, typer.Option(metavar="DIR", help="The folder to write; it appears complete or not at all.")]
ComponentOption = Annotated[
    str | None,
    typer.Option(help="Which transformer of a pipeline, such as transformer_2. Default: transformer."),
]
ComponentsOption = Annotated[
    Components,
    typer.Option(help="Large files of the pipeline's other components: link (reflink, else symlink) or copy."),
]
AllowOption = Annotated[
    list[ProblemKind] | None,
    typer.Option(metavar="KIND", help=f"Let one kind of problem pass: {', '.join(ProblemKind)}. Repeatable."),
]
ScheduleOption = Annotated[
    str,
    typer.Option(
        metavar="LEVELS|FILE|auto|none",
        help='The few-step schedule to record: noise levels "1,0.9,0.75,0.5"; a JSON file with sigmas, or with steps '
        "and scheduler; a diffusers scheduler_config.json with the steps (FILE:4); none; auto: what the LoRAs state or "
        "are known for, else that of the base.",
    ),
]
RoleOption = Annotated[
    Role | None,
    typer.Option(
        help="deploy: the fused LoRAs stay at inference, and a new LoRA is for the fused model. scaffold: they are "
        "there for training only, and a new LoRA is for the model they are fused into. Default: deploy, and scaffold "
        "for known de-distill adapters.",
    ),
]
KeepLorasOption = Annotated[
    KeepLoras,
    typer.Option(help="copy: keep copies of the LoRAs in the fused folder, for export and training; none."),
]
AlphaOption = Annotated[
    list[str] | None,
    typer.Option(
        "--alpha", metavar="FILE=ALPHA", help="The alpha of all modules of a LoRA, whatever its file says. Repeatable."
    ),
]
WidenOption = Annotated[
    bool,
    typer.Option(
        "--widen-inputs",
        help="Let a LoRA with more input channels (FLUX.1 control) widen the base; config.json is updated.",
    ),
]
DtypeOption = Annotated[
    Dtype, typer.Option(help="What the tensors that the LoRAs change are stored as; float32 keeps the smallest delta.")
]
RoundingOption = Annotated[
    Rounding,
    typer.Option(help="nearest, or stochastic: up or down by chance, so that tiny deltas arrive in the mean."),
]
SeedOption = Annotated[int, typer.Option(help="Of stochastic rounding: the same seed gives the same bytes.")]
WorkersOption = Annotated[
    int | None,
    typer.Option(min=1, help="Threads that edit. Default: one for each core, up to 8. The result is the same."),
]
DeviceOption = Annotated[
    Device, typer.Option(help="Where the arithmetic is done; on cuda to within one rounding of what the CPU gives.")
]
PlainFp8Option = Annotated[
    bool,
    typer.Option(
        "--plain-fp8",
        help="Edit fp8 weights that have no scale. They keep 3 bits of each number: most of a LoRA is rounded away.",
    ),
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Plan only, from headers; write nothing.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
ReportOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Also write a page (HTML) about the result: recipe, what arrived, what to do."),
]
ForceOption = Annotated[
    bool, typer.Option("--force", help="Replace --out where it is another fused checkpoint, or a damaged one.")
]


LoraArgument = Annotated[Path, typer.Argument(help="A LoRA in any dialect; it is only read.")]
ToOption = Annotated[
    str,
    typer.Option(
        metavar="DIALECT",
        help="diffusers, comfyui, kohya or peft; onetrainer, lycoris, lightning, videox, original and genmo work too.",
    ),
]
FileOption = Annotated[
    Path,
    typer.Option(
        "--out", metavar="FILE",
        help="The .safetensors file to write. PEFT expects adapter_model.safetensors in a folder of its own, "
        "and gets its adapter_config.json beside it.",
    ),
]  # fmt: skip
ForOption = Annotated[
    Path | None,
    typer.Option("--base", metavar="BASE", help="The checkpoint it is for, where its names alone do not tell."),
]
FamilyOption = Annotated[
    str | None, typer.Option(metavar="NAME", help="The architecture it is for, such as flux, instead of --base.")
]
LoseOption = Annotated[
    list[Losable] | None,
    typer.Option(metavar="KIND", help="OTHER_COMPONENT: leave out what is not the transformer's (text encoders)."),
]
ReplaceOption = Annotated[bool, typer.Option("--force", help="Replace --out where it has other content.")]
